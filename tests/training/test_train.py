import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import twotower
from twotower.checkpoints import save
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower
from twotower.training.config import DenoisingConfig, TrainConfig
from twotower.training.corpus.shards import CorpusRows, write_shard
from twotower.training.run.trainer import StepReport
from twotower.training.train import train

CONFIG = TrainConfig(steps=3, batch_size=4, warmup_steps=0, evaluate_every=3)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    ids = np.arange(128).reshape(8, 16) % 30 + 4
    write_shard(tmp_path / "corpus" / "0.safetensors", CorpusRows(ids, ids > 0, ids * 0))
    return tmp_path / "corpus"


def test_a_model_is_trained_in_place_saved_and_resumed(
    tiny: Callable[..., TwoTower], corpus: Path, tmp_path: Path
) -> None:
    save(tiny("M*", block_size=8), tmp_path / "start")
    model = twotower.load(tmp_path / "start", pack=False)
    before = {name: tensor.clone() for name, tensor in model.released_tensors().items()}
    reports: list[StepReport] = []
    train(model, str(corpus), str(tmp_path / "out"), CONFIG, held_out=corpus, report=reports.append)
    assert [done.step for done in reports] == [1, 2, 3]
    assert reports[-1].held_out is not None
    after = model.released_tensors()
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(after["context_lm_head.weight"], before["context_lm_head.weight"])
    resumed = twotower.load(tmp_path / "start", pack=False)
    train(resumed, corpus, tmp_path / "out", CONFIG, DenoisingConfig(), held_out=corpus, report=reports.append)
    assert len(reports) == 3  # the run was over
    assert torch.equal(resumed.released_tensors()["lm_head.weight"], after["lm_head.weight"])


def test_models_that_cannot_learn_are_named(tiny: Callable[..., TwoTower], corpus: Path, tmp_path: Path) -> None:
    save(tiny("*"), tmp_path / "start")
    with pytest.raises(ValueError, match="packed for inference"):
        train(twotower.load(tmp_path / "start"), corpus, tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match=r"held in torch\.bfloat16, must be float32"):
        train(twotower.load(tmp_path / "start", dtype="bfloat16", pack=False), corpus, tmp_path / "out", CONFIG)


def test_rows_longer_than_the_positions_are_asked_for(
    tiny: Callable[..., TwoTower], corpus: Path, tmp_path: Path
) -> None:
    model = tiny("*", carried={"max_position_embeddings": 15})
    ids = np.full((4, 8), 5)
    write_shard(tmp_path / "shorter" / "0.safetensors", CorpusRows(ids, ids > 0, ids * 0))
    for rows, held_out in ((corpus, tmp_path / "shorter"), (tmp_path / "shorter", corpus)):
        with pytest.raises(SettingError, match=r"row_length is 16, must be at most 15, .*set past_positions"):
            train(model, rows, tmp_path / "out", CONFIG, held_out=held_out)
    assert not (tmp_path / "out").exists()
    train(model, corpus, tmp_path / "out", dataclasses.replace(CONFIG, past_positions=True), held_out=corpus)
