import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.model.two_tower import TwoTower
from twotower.training.corpus.shards import Corpus, CorpusRows, write_shard
from twotower.training.objectives.denoising import Denoising, DenoisingConfig
from twotower.training.run.trainer import StepReport, TrainConfig, Trainer


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Counting upwards from anywhere: each token is a function of its neighbours."""
    ids = (np.arange(24)[:, None] * 7 + np.arange(24)) % 36 + 4
    write_shard(
        tmp_path / "corpus" / "0.safetensors", CorpusRows(ids, np.broadcast_to(np.arange(24) > 0, ids.shape), ids * 0)
    )
    return Corpus(tmp_path / "corpus", vocab_size=40)


@pytest.fixture
def make() -> Callable[..., Trainer]:
    """make(model, corpus, folder, **settings): a trainer of a denoiser, with settings of both kinds."""

    def made(model: TwoTower, corpus: Corpus, folder: Path, **settings: Any) -> Trainer:
        names = {f.name for f in dataclasses.fields(DenoisingConfig)}
        what = DenoisingConfig(**{k: v for k, v in settings.items() if k in names})
        run = {"steps": 8, "batch_size": 4, "warmup_steps": 2, "checkpoint_every": 3}
        config = TrainConfig(**run | {k: v for k, v in settings.items() if k not in names})
        return Trainer(Denoising(model, what), corpus, config, folder)

    return made


@pytest.fixture
def train(make: Callable[..., Trainer]) -> Callable[..., list[StepReport]]:
    """train(model, corpus, folder, **settings): the reports of such a trainer's run."""

    def trained(*arguments: Any, **settings: Any) -> list[StepReport]:
        reports: list[StepReport] = []
        make(*arguments, **settings).run(reports.append)
        return reports

    return trained
