"""`twotower sample`."""

from pathlib import Path
from typing import Any

import pytest

from twotower.training.data import Corpus

SMALL = ("--rows", 3, "--length", 12, "--longest-prefix", 8)


def test_writes_shards_that_train_reads_and_keeps_those_there(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    result = run("sample", checkpoint, out, "--shards", 2, *SMALL)
    assert result.exit_code == 0, result.output
    assert "2 shards of 3 rows" in result.stdout
    first = out / "00000.safetensors"
    before = first.stat().st_mtime_ns
    assert run("sample", checkpoint, out, "--shards", 3, *SMALL).exit_code == 0
    assert first.stat().st_mtime_ns == before
    assert sorted(f.name for f in out.iterdir()) == [f"0000{i}.safetensors" for i in range(3)]
    assert len(Corpus(out, vocab_size=260)) == 9


def test_temperatures_decide_what_is_scored(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    for text, whole in (("1", True), ("0,0.5", False)):
        out = tmp_path / text
        assert run("sample", checkpoint, out, "--shards", 2, "--temperatures", text, *SMALL).exit_code == 0
        corpus = Corpus(out, vocab_size=260)
        assert all(bool(corpus.row(i).scored[1:].all()) is whole for i in range(6))


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
