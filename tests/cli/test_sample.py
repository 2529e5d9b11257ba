"""`twotower sample`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

SMALL = ("--rows", 3, "--length", 12, "--longest-prefix", 8)


def test_writes_shards_that_train_reads_and_keeps_those_there(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    result = run("sample", checkpoint, out, "--shards", 2, *SMALL)
    assert result.exit_code == 0, result.output
    assert "2 shards of 3 rows" in result.stdout
    first = out / "00000.npz"
    before = first.stat().st_mtime_ns
    assert run("sample", checkpoint, out, "--shards", 3, *SMALL).exit_code == 0
    assert first.stat().st_mtime_ns == before
    assert sorted(f.name for f in out.iterdir()) == ["00000.npz", "00001.npz", "00002.npz"]
    with np.load(first) as shard:
        assert shard["ids"].shape == (3, 12)


def test_temperatures_decide_what_is_scored(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    for text, whole in (("1", True), ("0,0.5", False)):
        out = tmp_path / text
        assert run("sample", checkpoint, out, "--shards", 2, "--temperatures", text, *SMALL).exit_code == 0
        for file in out.iterdir():
            with np.load(file) as shard:
                assert bool((shard["prefix"] == 1).all()) is whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperatures", "hot"), "temperatures are 'hot', must be numbers"),
        (("--temperatures", "-1"), "must be one or more numbers in [0, 100]"),
        (("--length", 1), "length is 1, must be at least 2"),
    ],
)
def test_bad_options_are_told(run: Any, checkpoint: Path, tmp_path: Path, options: tuple, message: str) -> None:
    result = run("sample", checkpoint, tmp_path, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
