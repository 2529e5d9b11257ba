"""`twotower calibrate`."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from twotower.checkpoints.hf.calibration_file import CALIBRATION_FILE, write_calibration
from twotower.checkpoints.load import load
from twotower.model.calibration import CalibratedRule

SMALL = ("--max-new-tokens", 3, "--confidence", 0.6)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt {i}\n" for i in range(60)))
    return file


@pytest.mark.slow
def test_requests_can_then_say_a_target(run: Any, copy: Path, prompts: Path) -> None:
    result = run("calibrate", copy, prompts, *SMALL)
    assert result.exit_code == 0, result.output
    assert f"wrote {copy / CALIBRATION_FILE}" in result.stdout.replace("\n", "")
    found = load(copy).calibration
    assert found is not None
    assert (found.num_prompts, found.prompts, found.confidence) == (60, "prompts.txt", 0.6)
    asked = ("generate", "ab", "--model", copy, "--max-new-tokens", 4)
    refused = run(*asked, "--target-retention", 0.9999)
    assert refused.exit_code == 2
    if found.rules:
        assert f"--target-retention is 0.9999, must be at most {found.most_told}" in refused.stderr
        kept = run(*asked, "--target-retention", found.most - 1e-6)
        assert kept.exit_code == 0, kept.output
    again = run("calibrate", copy, prompts, *SMALL)
    assert again.exit_code == 0
    assert load(copy).calibration == found


@pytest.mark.slow
def test_rules_that_are_there_stay_where_none_is_found(
    run: Any, copy: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("calibrate", copy, prompts, *SMALL).exit_code == 0
    file = copy / CALIBRATION_FILE
    none = dataclasses.replace(load(copy).calibration, rules=())
    rule = CalibratedRule(
        risk=0.1,
        thresholds=((0.5,) * none.block_size,) * none.block_size,
        shown=0.9,
        tokens_per_nfe=2.0,
        held_out=(0.9, 0.8, 1.0),
    )
    write_calibration(copy, dataclasses.replace(none, rules=(rule,)))
    before = file.read_bytes()
    monkeypatch.setattr("twotower.cli.calibrate.calibrate", lambda *given, **more: none)
    result = run("calibrate", copy, prompts, *SMALL)
    assert result.exit_code == 0, result.output
    assert "stays as it was, with 1 rules; delete it to have none" in result.stdout.replace("\n", " ")
    assert file.read_bytes() == before
    file.unlink()
    assert run("calibrate", copy, prompts, *SMALL).exit_code == 0
    assert load(copy).calibration == none


@pytest.mark.slow
def test_tasks_and_prompts_may_be_mixed_and_limited(run: Any, copy: Path, prompts: Path, tmp_path: Path) -> None:
    task = tmp_path / "mine.jsonl"
    line = {"prompt": "a", "scorer": "likelihood", "max_new_tokens": 2}
    task.write_text("".join(json.dumps(line | {"prompt": f"q {i}"}) + "\n" for i in range(40)))
    result = run("calibrate", copy, f"{prompts},{task}", "--limit", 30, *SMALL)
    assert result.exit_code == 0, result.output
    found = load(copy).calibration
    assert found is not None
    assert (found.num_prompts, found.prompts) == (60, "prompts.txt, mine.jsonl")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("nothing.txt", (), "there is no file nothing.txt; give one, or the name of a task: "),
        ("FEW", (), "prompts given: 2; a calibration needs at least 48"),
        ("FEW,FEW", (), "2 of the 4 prompts are repetitions of others"),
        ("FEW", ("--confidence", 1), "--confidence is 1.0, must be a number in (0.5, 1)"),
    ],
)
def test_mistakes_are_named(
    run: Any, copy: Path, tmp_path: Path, prompts: str, options: tuple[Any, ...], message: str
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("a\nb\n")
    result = run("calibrate", copy, prompts.replace("FEW", str(few)), *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (copy / CALIBRATION_FILE).exists()
