from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.training.corpus.shards import Corpus
from twotower.training.objectives.denoising import Denoising, DenoisingConfig
from twotower.training.run.ranks import Ranks
from twotower.training.run.trainer import TrainConfig, Trainer


def test_sharding_needs_ranks_and_no_compiler(make: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="shard is True, must be left out for one process; start several with torchrun"
    ):
        make(tiny("*"), corpus, tmp_path, shard=True)
    objective = Denoising(tiny("*"), DenoisingConfig(compile=True))
    with pytest.raises(ValueError, match="shard is True, must be left out with compile"):
        Trainer(objective, corpus, TrainConfig(steps=1, shard=True), tmp_path, Ranks(0, 2))


def test_an_output_folder_that_is_a_file_raises(make: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, must be a folder to write to; give another"):
        make(tiny("*"), corpus, tmp_path / "file")


def test_the_state_of_another_model_raises(train: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    train(tiny("llama"), corpus, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"config.\w+ is .* and was .* in .*, which is of a run with another model; give the same",
    ):
        train(tiny("*-"), corpus, tmp_path, steps=9)
