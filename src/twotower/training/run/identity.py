"""The record of a run that its saved states keep, so that a run with other settings does not resume from them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from twotower.config import TwoTowerConfig
from twotower.training.config import DenoisingConfig, Phase, Share
from twotower.training.corpus.shards import Corpus
from twotower.training.objectives.protocol import Objective
from twotower.training.run.weights import TensorStream, own_tensors

# How many rows of a corpus, and how many numbers of each tensor, are hashed.
_ROWS = 16
_NUMBERS = 16
# Settings that change how a step is computed and not what it learns: they may differ when a run resumes.
_FREE = ("recompute", "compile")
# What the records of older runs lack, with the values that those runs had.
_LATER_SETTINGS = {"objective": [], "masks": [], "trajectory_passes": 3, "trajectory_threshold": 0.8}


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
    assert dataclasses.is_dataclass(what)
    assert not isinstance(what, type)
    return {name: value for name, value in dataclasses.asdict(what).items() if name not in _FREE}


def denoising_config(state: Path, run: dict[str, Any]) -> DenoisingConfig:
    """The settings of the denoising run recorded in `run`. Raises ValueError for a record of another kind of run."""
    names = [f.name for f in dataclasses.fields(DenoisingConfig) if f.name not in _FREE]
    run = _as_now(run)
    if not run.keys() >= set(names):
        raise _another_kind(state)
    kinds = {"phases": Phase, "objective": Share, "masks": Share}
    tuples = {name: tuple(kind(*parts) for parts in run[name]) for name, kind in kinds.items()}
    return DenoisingConfig(**{n: run[n] for n in names} | tuples)


def check_same(state: Path, was: dict[str, Any], now: dict[str, Any], step: int) -> None:
    """Raises ValueError where the record `was` of a state after `step` steps differs from the run that is to resume,
    `now`. Phases that begin after `step` may differ."""
    was = _as_now(was)
    if was.keys() != now.keys():
        raise _another_kind(state)
    now = json.loads(json.dumps(now))  # `was` was read from JSON, where tuples have become lists
    for name in sorted(was):
        before, after = was[name], now[name]
        if name == "phases":
            before, after = ([phase for phase in phases if phase[0] < step] for phases in (before, after))
        if before != after:
            what = "the hash of the weights to start from" if name == "weights" else name
            raise ValueError(
                f"{what} is {after!r}, but {state} is of a run with {before!r}; give that again, or another output "
                "folder"
            )


def _as_now(run: dict[str, Any]) -> dict[str, Any]:
    """A record under today's names. One of a run that distilled stays as it is: that loss is another one now."""
    if run.get("distil_weight") != 0.0:
        return run
    return {name: value for name, value in run.items() if name != "distil_weight"} | _LATER_SETTINGS


def _another_kind(state: Path) -> ValueError:
    return ValueError(f"{state} is of a run of another kind, `train` or `pretrain`; give another output folder")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
