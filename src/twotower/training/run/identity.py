"""The record of a run that its saved states keep, so that a run with other settings does not resume from them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from twotower.config import TwoTowerConfig
from twotower.training.config import DenoisingConfig, Phase, Share, TrainConfig
from twotower.training.corpus.shards import Corpus
from twotower.training.objectives.protocol import Objective
from twotower.training.run.weights import TensorStream, own_tensors

# How many rows of a corpus, and how many numbers of each tensor, are hashed.
_ROWS = 16
_NUMBERS = 16
# Settings that change how a step is computed and not what it learns
_COMPUTED = ("recompute", "compile")
_UNRECORDED = (*_COMPUTED, "carried")
_RUN_SETTINGS = {field.name for field in dataclasses.fields(TrainConfig)} - {"seed"}
# What may be another when a run resumes, because no step that is done would have been another: how steps are computed,
# kept and measured, which ones count as faults, and the plan of those to come.
_HARMLESS = (
    *("micro_batch_size", "shard", "past_positions", "checkpoint_every", "evaluate_every", "ema_decay"),
    *("spike_factor", "skip_limit", "steps", "decay_steps", "final_learning_rate"),
)
_FIX = "give the same again, or another output folder"


def model_identity(objective: Objective[Any], weights: Callable[[], TensorStream] | None) -> dict[str, Any]:
    """The model that a run starts from: its config, and a hash of the first numbers of every tensor. `weights` streams
    the tensors where the model is on the meta device."""
    lines = []
    for name, tensor in own_tensors(objective, weights):
        first = tensor[(0,) * (tensor.ndim - 1)][:_NUMBERS].float().cpu()
        lines.append(f"{name} {tuple(tensor.shape)} {first.numpy().tobytes().hex()}")
    return config_identity(objective.model.config) | {"weights": _hash("\n".join(sorted(lines)))}


def config_identity(config: TwoTowerConfig) -> dict[str, Any]:
    """The values of a model's config, under names that begin with `config.`."""
    values = dataclasses.asdict(config)
    del values["carried"]
    return {f"config.{name}": value for name, value in values.items()}


def corpus_identity(corpus: Corpus) -> str:
    """The corpus's size and a hash of some of its rows, as text."""
    places = sorted({int(i) for i in np.linspace(0, len(corpus) - 1, _ROWS)})
    content = b"".join(part.tobytes() for place in places for part in corpus.row(place))
    return f"{len(corpus)} rows of {corpus.length} tokens, {_hash(content.hex())}"


def settings_identity(what: object) -> dict[str, Any]:
    """The settings of an objective's config that decide what is learnt, by name."""
    return {name: value for name, value in all_settings(what).items() if name not in _COMPUTED}


def all_settings(what: object) -> dict[str, Any]:
    """The settings of an objective's config, by name."""
    assert dataclasses.is_dataclass(what)
    assert not isinstance(what, type)
    return dataclasses.asdict(what)


def denoising_config(state: Path, run: dict[str, Any]) -> DenoisingConfig:
    """The settings of the denoising run recorded in `run`. Raises ValueError for a record of another kind of run."""
    names = [f.name for f in dataclasses.fields(DenoisingConfig) if f.name not in _COMPUTED]
    run = _as_now(run)
    if not run.keys() >= set(names):
        raise _another_kind(state)
    kinds = {"phases": Phase, "objective": Share, "masks": Share}
    tuples = {name: tuple(kind(*parts) for parts in run[name]) for name, kind in kinds.items()}
    return DenoisingConfig(**{n: run[n] for n in names} | tuples)


class Change(NamedTuple):
    """A setting that is another than the one a saved state was trained with."""

    name: str
    before: object
    after: object

    @property
    def is_harmless(self) -> bool:
        """Whether the steps that are done would have been the same."""
        return self.name in _HARMLESS

    def __str__(self) -> str:
        name = "the hash of the weights to start from" if self.name == "weights" else self.name
        return f"{name} is {self.after!r} and was {self.before!r}"


def changes(state: Path, was: dict[str, Any], now: dict[str, Any], step: int) -> tuple[Change, ...]:
    """How the run that is to resume, `now`, differs from the record `was` of a state after `step` steps, in what
    records hold. Phases that begin after `step` are left out. Raises ValueError for another kind of run."""
    was, now = (json.loads(json.dumps(_as_now(run))) for run in (was, now))  # JSON makes lists of tuples
    if ("phases" in was) != ("phases" in now):
        raise _another_kind(state)
    if "learning_rate" not in was:  # records of older versions have no settings of the run but its seed
        now = {name: value for name, value in now.items() if name in was or name not in _RUN_SETTINGS}
    found = []
    for name in sorted(was.keys() | now.keys()):
        before, after = was.get(name), now.get(name)
        if name == "phases":
            before, after = ([phase for phase in run["phases"] if phase[0] < step] for run in (was, now))
        if before != after:
            found.append(Change(name, before, after))
    return tuple(found)


def check_changes(state: Path, found: Sequence[Change], *, allowed: bool = False) -> None:
    """Raises ValueError for another model, and unless `allowed` for other settings that decide what is learnt."""
    model = [change for change in found if change.name == "weights" or change.name.startswith("config.")]
    if model:
        raise ValueError(f"{_listed(model)} in {state}, which is of a run with another model; {_FIX}")
    harmful = [change for change in found if not change.is_harmless]
    if harmful and not allowed:
        raise ValueError(
            f"{_listed(harmful)} in {state}, so the steps to come would not belong to those that are done; {_FIX}, or "
            "give --allow-changes (in Python allow_changes=True) to go on with the new values"
        )


def _listed(found: Sequence[Change]) -> str:
    return ", ".join(str(change) for change in found)


def _as_now(run: dict[str, Any]) -> dict[str, Any]:
    """A record under today's names, in which settings that came later have their defaults, which do what was done
    before. One of a run that distilled keeps that setting: the loss of that name is another one now."""
    run = {name: value for name, value in run.items() if (name, value) != ("distil_weight", 0.0)}
    kinds: list[tuple[str, type]] = [("config.", TwoTowerConfig)]
    if "phases" in run:
        kinds.append(("", DenoisingConfig))
    if "learning_rate" in run:
        kinds.append(("", TrainConfig))
    later = {
        f"{prefix}{field.name}": field.default
        for prefix, kind in kinds
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING and field.name not in _UNRECORDED
    }
    return later | run


def _another_kind(state: Path) -> ValueError:
    return ValueError(f"{state} is of a run of another kind, `train` or `pretrain`; give another output folder")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
