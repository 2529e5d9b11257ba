from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.config import TwoTowerConfig
from twotower.errors import SettingError
from twotower.training.corpus.row_length import check_row_length
from twotower.training.corpus.sampling import SampleConfig, sample_shard
from twotower.training.corpus.text import TextConfig


def positions(count: int | None, **fields: int) -> TwoTowerConfig:
    sizes = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8}
    return TwoTowerConfig(pattern="-", carried={"max_position_embeddings": count}, **sizes, **fields)


@pytest.mark.parametrize(("settings", "most"), [(TextConfig, 1024), (SampleConfig, 256)])
def test_rows_of_which_no_length_is_asked_are_no_longer_than_the_positions(settings: type, most: int) -> None:
    found = [settings().row_length(positions(count)) for count in (None, most + 1, most, 100)]
    assert found == [most, most, most, 100]


@pytest.mark.parametrize("settings", [TextConfig, SampleConfig])
def test_longer_rows_are_refused_unless_asked_for(settings: type) -> None:
    assert settings(length=20).row_length(positions(20)) == 20
    with pytest.raises(SettingError, match=r"length is 21, must be at most 20, .*set past_positions") as raised:
        settings(length=21).row_length(positions(20))
    assert raised.value.name == "length"
    assert settings(length=21, past_positions=True).row_length(positions(20)) == 21
    assert settings(length=21).row_length(positions(None)) == 21


def test_rows_cannot_go_beyond_a_table_of_positions() -> None:
    check_row_length("length", 20, positions(None, num_positions=20), past_positions=True)
    with pytest.raises(SettingError, match=r"length is 21, must be at most 20, .*make shorter rows$"):
        check_row_length("length", 21, positions(None, num_positions=20), past_positions=True)


def test_no_shard_is_sampled_beyond_the_positions(tiny: Callable, tmp_path: Path) -> None:
    model = tiny("*", carried={"max_position_embeddings": 10})
    with pytest.raises(SettingError, match="length is 11, must be at most 10"):
        sample_shard(model, tmp_path, 0, SampleConfig(rows=1, length=11))
    assert not list(tmp_path.iterdir())
    sample_shard(model, tmp_path, 0, SampleConfig(rows=1, length=11, past_positions=True))
