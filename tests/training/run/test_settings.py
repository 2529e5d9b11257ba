import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from twotower.training.corpus.shards import Corpus
from twotower.training.denoising import Denoising, DenoisingConfig
from twotower.training.run.ranks import Ranks
from twotower.training.run.trainer import TrainConfig, Trainer


def test_sharding_needs_ranks_and_no_compiler(make: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard is set for one process, must be for several ranks"):
        make(tiny("*"), corpus, tmp_path, shard=True)
    objective = Denoising(tiny("*"), DenoisingConfig(compile=True))
    with pytest.raises(ValueError, match="shard and compile are both set"):
        Trainer(objective, corpus, TrainConfig(steps=1, shard=True), tmp_path, Ranks(0, 2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": -1}, "batch_size is -1, must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0, must be at least 1"),
        ({"steps": 0}, "steps is 0, must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, must be above 0"),
        ({"seed": -1}, r"seed is -1, must be in \[0, 2\*\*63\); give another"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, must be 0 or more"),
        ({"weight_decay": math.nan}, "weight_decay is nan, must be 0 or more"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0, must be above 0"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0, must be in \[0, 1\)"),
        ({"spike_factor": 0.5}, "spike_factor is 0.5, must be above 1"),
        ({"micro_batch_size": -1}, "micro_batch_size is -1, must be 0 .the whole batch. or more"),
    ],
)
def test_bad_settings_raise(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 5} | changed)


def test_an_output_folder_that_is_a_file_raises(make: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, must be a folder to write to; give another"):
        make(tiny("*"), corpus, tmp_path / "file")


def test_the_state_of_another_model_raises(train: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    train(tiny("llama"), corpus, tmp_path)
    with pytest.raises(
        ValueError, match=r"config.\w+ is .*, but .* is of a run with .*; give that again, or another output folder"
    ):
        train(tiny("*-"), corpus, tmp_path, steps=9)
