"""`twotower sweep`: its files, and mistakes."""

import csv
import dataclasses
import json

import pytest

from twotower.cli import sweep as module
from twotower.decoding.output import GenerationStats
from twotower.eval import sweep as eval_sweep
from twotower.eval.answering import ScoredAnswer
from twotower.eval.evaluate import TaskResult
from twotower.eval.throughput import Quartiles, Speed

LINE = {"scorer": "likelihood", "max_new_tokens": 4}
STATS = GenerationStats(denoiser_calls=1, context_calls=2, seconds_to_first_token=0.0, seconds_total=1.0, num_tokens=2)


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(LINE | {"prompt": prompt}) + "\n" for prompt in ("ab", "xyz")))
    return path


@pytest.mark.slow
def test_csv_json_and_pictures(run, checkpoint, task, tmp_path):
    out = tmp_path / "out"
    options = ("--thresholds", "0.2,0.9", "--block-sizes", "4", "--temperatures", "1", "--speed-prompts", 2)
    result = run("sweep", checkpoint, "--out", out, "--task", task, *options)
    assert result.exit_code == 0, result.output
    names = {"sweep.csv", "sweep.json", "pareto.png", "tokens_per_nfe.png", "commits.png", "phases.png"}
    assert {file.name for file in out.iterdir()} == names
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [(row["mode"], row["confidence_threshold"]) for row in rows] == [
        ("ar", ""),
        ("diffusion", "0.2"),
        ("diffusion", "0.9"),
    ]
    found = json.loads((out / "sweep.json").read_text())
    assert {"command", "commit", "machine", "torch", "dtype", "model", "points"} == found.keys()
    assert [str(point["score"]) for point in found["points"]] == [row["score"] for row in rows]
    assert sum(map(sum, found["points"][1]["commits"])) > 0
    assert "diffusion γ 0.9 S 4 T 16" in " ".join(result.stdout.split())


@pytest.mark.slow
def test_distances_and_batches_are_conditions(run, checkpoint, task, tmp_path):
    out = tmp_path / "out"
    options = ("--modes", "verified", "--distances", "0,30", "--batch-sizes", "1,2", "--temperatures", 1)
    result = run("sweep", checkpoint, "--out", out, "--task", task, *options)
    assert result.exit_code == 0, result.output
    rows = csv.DictReader((out / "sweep.csv").open())
    assert [(row["distance"], row["batch_size"]) for row in rows if row["mode"] == "verified"] == [
        ("0", "1"),
        ("0", "2"),
        ("30", "1"),
        ("30", "2"),
    ]


def test_the_table_says_what_is_uncertain_what_does_not_count_and_what_is_not_timed(
    run, checkpoint, task, tmp_path, monkeypatch
):
    right, wrong = ([ScoredAnswer(text, score, not text, STATS, [])] * 40 for text, score in (("a", 1.0), ("b", 0.0)))
    loops = [ScoredAnswer("", 0.0, True, STATS, [])] * 40
    answers = {
        "ar": right,
        "diffusion γ 0.2 S 8 T 16": wrong,
        "diffusion γ 0.9 S 8 T 16": right,
        "verified S 8": loops,
    }

    def evaluated(model, asked, settings, timing, advance):
        examples = asked.examples[:1] * 40
        own = Speed(*[Quartiles(1, 2, 3)] * 3)
        timed = {name: own for name, replies in answers.items() if replies is not loops}
        return TaskResult(dataclasses.replace(asked, examples=examples), settings, answers, {1: timed}, {1: [0]})

    monkeypatch.setattr(eval_sweep, "evaluate", evaluated)
    monkeypatch.setenv("COLUMNS", "200")
    options = ("--modes", "diffusion,verified", "--thresholds", "0.2,0.9", "--out", tmp_path / "out", "--task", task)
    result = run("sweep", checkpoint, *options)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.replace("│", " ").split())
    assert "0.2 S 8 T 16 0.000 0.0% (0.0% to 7.1%) 2 2.00*" in said
    assert "0.9 S 8 T 16 1.000 100.0% (92.9% to 100.0%) 2 2.00 " in said
    assert "verified S 8 0.000 0.0% (0.0% to 7.1%) not timed" in said
    assert "* does not count: less than 50% of ar's score is kept" in said
    assert "not timed: ar scores 0, most answers" in said
    rows = csv.DictReader((tmp_path / "out" / "sweep.csv").open())
    assert [row["gain_counts"] for row in rows] == ["True", "False", "True", "False"]


@pytest.mark.parametrize(
    "options", [("--thresholds", "high"), ("--modes", "fast"), ("--modes", "auto"), ("--task", "chess")]
)
def test_mistakes_are_one_line(run, checkpoint, tmp_path, options):
    result = run("sweep", checkpoint, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_results_are_not_written_over(run, checkpoint, task, tmp_path):
    result = run("sweep", checkpoint, "--out", tmp_path, "--task", task)
    assert result.exit_code == 2
    assert "not empty" in result.stderr


def test_where_nothing_can_be_written_nothing_is_measured(run, checkpoint, task, monkeypatch):
    monkeypatch.setattr(module, "open_model", None)
    result = run("sweep", checkpoint, "--out", task, "--task", task)
    assert (result.exit_code, "is a file" in result.stderr) == (2, True)
    assert run("sweep", checkpoint, "--out", task / "below", "--task", task).exit_code == 2
    monkeypatch.setattr(module.os, "access", lambda path, how: False)
    result = run("sweep", checkpoint, "--out", task.parent / "new", "--task", task)
    assert (result.exit_code, "may not be written" in result.stderr) == (2, True)
