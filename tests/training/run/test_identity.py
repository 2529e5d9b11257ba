"""The runs that may not resume from a state."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twotower.checkpoints import save
from twotower.checkpoints.hf import load_model, read_config, released_stream
from twotower.model.two_tower import TwoTower
from twotower.training.config import DenoisingConfig, Phase
from twotower.training.corpus.shards import Corpus, CorpusRows, write_shard
from twotower.training.objectives.denoising import Denoising
from twotower.training.run.checkpointing import latest_state, read_progress
from twotower.training.run.identity import denoising_config, model_identity
from twotower.training.run.trainer import Start, TrainConfig, Trainer

WHAT = {"phases": (Phase(0, 8), Phase(2, 4)), "context": "trained", "level_per": "example"}
RUN = {"steps": 2, "batch_size": 2}


def rows(folder: Path, seed: int) -> Corpus:
    ids = np.random.default_rng(seed).integers(4, 40, (8, 12))
    write_shard(folder / "0.safetensors", CorpusRows(ids, np.ones_like(ids), ids * 0))
    return Corpus(folder, vocab_size=40)


def train(model: TwoTower, corpus: Corpus, folder: Path, settings: dict[str, Any], what: dict[str, Any]) -> Trainer:
    trainer = Trainer(Denoising(model, DenoisingConfig(**WHAT | what)), corpus, TrainConfig(**RUN | settings), folder)
    trainer.run(lambda done: None)
    return trainer


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return rows(tmp_path / "corpus", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "what", "message"),
    [
        (
            {"seed": 1},
            {},
            r"seed is 1 and was 0 in .*step-00000002, .* give the same again, .* --allow-changes",
        ),
        (
            {"learning_rate": 0.05, "batch_size": 4},
            {},
            "batch_size is 4 and was 2, learning_rate is 0.05 and was 0.001",
        ),
        ({"warmup_steps": 7}, {}, "warmup_steps is 7 and was 100 in"),
        ({"weight_decay": 0.1}, {}, "weight_decay is 0.1 and was 0.0 in"),
        ({"max_grad_norm": 2.0}, {}, "max_grad_norm is 2.0 and was 1.0 in"),
        ({"bf16": True}, {}, "bf16 is True and was False in"),
        ({}, {"reduction": "example_mean"}, "reduction is 'example_mean' and was 'masked_mean' in"),
        ({}, {"later_weight": 0.5}, "later_weight is 0.5 and was 0.0 in"),
        ({}, {"phases": (Phase(0, 8), Phase(1, 4))}, r"phases is \[\[0, 8\], \[1, 4\]\] and was \[\[0, 8\]\] in"),
    ],
)
def test_a_run_with_other_settings_is_refused(
    settings: dict[str, Any], what: dict[str, Any], message: str, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    train(tiny("M*"), corpus, tmp_path, {}, {})
    with pytest.raises(ValueError, match=message):
        train(tiny("M*"), corpus, tmp_path, {"steps": 4} | settings, what)


def test_another_model_and_another_corpus_of_the_same_shapes_are_refused(
    tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    train(tiny("M*"), corpus, tmp_path, {}, {})
    other = tiny("M*")
    other.released_tensors()["denoiser_tower.layers.1.mixer.k_proj.weight"].mul_(2)
    with pytest.raises(
        ValueError, match=r"the weights to start from is '.*' and was '.*' in .* of a run with another model"
    ):
        train(other, corpus, tmp_path, {"steps": 4}, {})
    with pytest.raises(ValueError, match=r"config.rope_theta is 5.0 and was 10000.0 in"):
        train(tiny("M*", rope_theta=5.0), corpus, tmp_path, {"steps": 4}, {})
    with pytest.raises(ValueError, match=r"corpus is '8 rows of 12 tokens, .*' and was '8 rows of 12"):
        train(tiny("M*"), rows(tmp_path / "other", 1), tmp_path, {"steps": 4}, {})


def test_what_may_change_may(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    train(tiny("M*"), corpus, tmp_path, {}, {})
    settings = {"steps": 4, "spike_factor": 0.0, "micro_batch_size": 1, "checkpoint_every": 2, "ema_decay": 0.5}
    what = {"phases": (Phase(0, 8), Phase(3, 2)), "recompute": True}
    assert train(tiny("M*"), corpus, tmp_path, settings, what).step == 4
    state = latest_state(tmp_path)
    assert state is not None
    assert denoising_config(state, read_progress(state)["run"]) == DenoisingConfig(**WHAT | {"phases": what["phases"]})


@pytest.mark.parametrize("what", [{}, {"lora_rank": 2}, {"context": "tied"}])
def test_a_model_is_known_however_it_is_opened(what: dict[str, Any], tiny: Callable, tmp_path: Path) -> None:
    save(tiny("M*-E"), tmp_path, max_shard_bytes=10_000)
    config = DenoisingConfig(**what)
    with torch.device("meta"):
        empty = Denoising(TwoTower(read_config(tmp_path)), config)
    streamed = model_identity(empty, functools.partial(released_stream, tmp_path))
    assert model_identity(Denoising(load_model(tmp_path), config), None) == streamed


def test_a_state_from_before_there_were_objectives_goes_on(
    make: Callable, train: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    """As 1744038 recorded a run: with the weight of a distillation that was off, without `objective` and `masks`."""
    train(tiny("*", block_size=8), corpus, tmp_path, steps=2)
    state = latest_state(tmp_path)
    progress = json.loads((state / "progress.json").read_text())
    for name in ("objective", "masks", "trajectory_passes", "trajectory_threshold"):
        del progress["run"][name]
    for weight, steps in ((0.5, 3), (0.0, 4)):
        progress["run"]["distil_weight"] = weight
        (state / "progress.json").write_text(json.dumps(progress))
        if weight:
            with pytest.raises(ValueError, match=r"distil_weight is None and was 0.5"):
                train(tiny("*", block_size=8), corpus, tmp_path, steps=steps)
        else:
            assert len(train(tiny("*", block_size=8), corpus, tmp_path, steps=steps)) == 2
            assert denoising_config(state, progress["run"]) == DenoisingConfig()


def test_what_has_changed_is_told_and_recorded(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    train(tiny("M*"), corpus, tmp_path, {"steps": 4, "decay_steps": 2}, {})
    starts: list[Start] = []
    config = TrainConfig(**RUN | {"steps": 8, "decay_steps": 2, "batch_size": 4})
    trainer = Trainer(Denoising(tiny("M*"), DenoisingConfig(**WHAT)), corpus, config, tmp_path)
    with pytest.raises(ValueError, match="batch_size is 4 and was 2"):
        trainer.run(lambda done: None, begin=starts.append)
    assert starts == []
    inputs = {"model": "here"}
    assert trainer.run(lambda done: None, begin=starts.append, inputs=inputs, allow_changes=True)
    state = tmp_path / "state" / "step-00000004"
    (start,) = starts
    assert start[:3] == (state, 4, 4 * 2 * 12)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert start.loss == pytest.approx(sum(line["loss"] for line in lines[:4]) / 4)
    rates = [line["learning_rate"] for line in lines]
    fell = f"the learning rate, which had begun to fall, rises from {rates[3]:.2g} to {rates[4]:.2g}"
    assert start.notes == ("batch_size is 4 and was 2", "steps is 8 and was 4", fell)
    calls = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [call["from_step"] for call in calls] == [0, 4]
    assert calls[1]["settings"] == json.loads(
        json.dumps(inputs | dataclasses.asdict(config) | dataclasses.asdict(DenoisingConfig(**WHAT)))
    )
    assert {"began", "command", "twotower", "commit", "torch", "python", "host", "device", "ranks"} <= calls[1].keys()
    progress = read_progress(tmp_path / "state" / "step-00000008")
    assert progress["calls"] == calls
    assert progress["tokens"] == 4 * 2 * 12 + 4 * 4 * 12


def test_the_state_of_an_older_version_goes_on_and_says_what_it_does_not_know(
    tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    train(tiny("M*"), corpus, tmp_path, {}, {})
    file = tmp_path / "state" / "step-00000002" / "progress.json"
    old = json.loads(file.read_text())
    for name in dataclasses.asdict(TrainConfig()).keys() - {"seed"} | {"grid", "config.rope_theta"}:
        del old["run"][name]
    file.write_text(json.dumps({name: old[name] for name in ("step", "samples", "guard", "run")}))
    starts: list[Start] = []
    config = TrainConfig(**RUN | {"steps": 4, "learning_rate": 0.5})
    trainer = Trainer(Denoising(tiny("M*"), DenoisingConfig(**WHAT)), corpus, config, tmp_path)
    assert trainer.run(lambda done: None, begin=starts.append)
    assert starts[0].notes == (
        "an older version saved it without learning rate, batch size and the like: give those of then",
    )


def test_versions_and_devices_that_changed_are_told(
    tiny: Callable, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny("M*"), corpus, tmp_path, {}, {})
    monkeypatch.setattr(torch, "__version__", "9.9")
    starts: list[Start] = []
    trainer = Trainer(Denoising(tiny("M*"), DenoisingConfig(**WHAT)), corpus, TrainConfig(**RUN), tmp_path)
    trainer.run(lambda done: None, begin=starts.append)
    (note,) = starts[0].notes
    assert note.startswith("torch is 9.9 and was ")
