"""`twotower eval`: tables, the JSON file, and mistakes."""

import json

import pytest
import torch

from twotower.cli import eval as module

LINE = {"prompt": "ab", "scorer": "likelihood", "max_new_tokens": 12}


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(LINE | {"prompt": prompt}) + "\n" for prompt in ("ab", "xyz", "12")))
    return path


@pytest.mark.slow
def test_the_json_file_has_everything(run, checkpoint, task, tmp_path):
    out = tmp_path / "out.json"
    options = ("--threshold", 0.3, "--block-size", 4, "--temperature", 1, "--speed-prompts", 2, "--batch-sizes", "1,2")
    result = run("eval", checkpoint, "--tasks", task, "--json", out, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert {"command", "commit", "machine", "torch", "dtype", "model"} <= found.keys()
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert list(found["settings"]) == ["ar", "diffusion", "verified"]
    assert found["settings"]["diffusion"]["confidence_threshold"] == 0.3
    assert found["settings"]["diffusion"]["block_size"] == 4
    assert found["overall"]["ar"]["retention"]["value"] == 1.0
    assert found["overall"]["diffusion"]["gain"].keys() == {"1", "2"}
    mine = found["tasks"]["mine"]
    assert {size: len(examples) for size, examples in mine["timed_examples"].items()} == {"1": 2, "2": 2}
    for setting in mine["settings"].values():
        assert 0 < setting["score"] < 1
        assert setting["speed"]["1"]["tokens_per_second"]["median"] > 0
        assert len(setting["answers"]) == 3
    for word in ("mine", "diffusion", "verified", "Quality", "Speed"):
        assert word in result.stdout


def test_modes_limits_and_no_speed(run, checkpoint, task, tmp_path):
    out = tmp_path / "out.json"
    options = ("--tasks", task, "--modes", "mock_ar", "--limit", 1, "--no-speed", "--json", out)
    result = run("eval", checkpoint, *options)
    assert result.exit_code == 0, result.output
    assert "Speed" not in result.stdout
    mine = json.loads(out.read_text())["tasks"]["mine"]
    assert mine["examples"] == 1
    assert list(mine["settings"]) == ["ar", "mock_ar"]
    assert mine["settings"]["ar"]["speed"] == {}


def test_several_thresholds_are_settings_of_diffusion(run, checkpoint, task, tmp_path):
    out = tmp_path / "out.json"
    result = run("eval", checkpoint, "--tasks", task, "--no-speed", "--json", out, "--threshold", "0.9,0.9000001,0.9")
    assert result.exit_code == 0, result.output
    settings = json.loads(out.read_text())["settings"]
    assert list(settings) == ["ar", "diffusion γ 0.9", "diffusion γ 0.9000001", "verified"]
    assert [s["confidence_threshold"] for n, s in settings.items() if "γ" in n] == [0.9, 0.9000001]


def test_bounds_take_the_place_of_the_default_threshold(run, checkpoint, task, tmp_path):
    out = tmp_path / "out.json"
    options = ("--no-speed", "--json", out, "--modes", "diffusion", "--entropy-bound", "0.1,2")
    result = run("eval", checkpoint, "--tasks", task, *options)
    assert result.exit_code == 0, result.output
    settings = json.loads(out.read_text())["settings"]
    assert list(settings) == ["ar", "diffusion H 0.1", "diffusion H 2.0"]
    assert [s["entropy_bound"] for s in settings.values()] == [None, 0.1, 2.0]
    refused = run("eval", checkpoint, "--tasks", task, "--no-speed", "--target-retention", 0.9)
    assert refused.exit_code == 2
    assert "twotower calibrate" in refused.stderr


def test_several_drafters_are_settings_of_verified(run, checkpoint, task, tmp_path):
    out = tmp_path / "out.json"
    more = ("--drafter", "denoiser", "--drafter", "prompt,denoiser")
    result = run("eval", checkpoint, "--tasks", task, "--no-speed", "--json", out, "--modes", "verified", *more)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert list(found["settings"]) == ["ar", "verified denoiser", "verified prompt,denoiser"]
    [measured] = [one["settings"] for one in found["tasks"].values()]
    assert measured["ar"]["drafts"] == {}
    assert list(measured["verified denoiser"]["drafts"]) == ["denoiser"]
    assert set(measured["verified prompt,denoiser"]["drafts"]) <= {"prompt", "denoiser"}


def test_a_drafter_that_the_checkpoint_lacks_is_refused_before_anything_is_answered(run, checkpoint, task):
    result = run("eval", checkpoint, "--tasks", task, "--no-speed", "--drafter", "ngram")
    assert result.exit_code == 2
    assert "--drafter is 'ngram', must be made of denoiser, prompt" in result.stderr
    assert "answers of" not in result.stderr


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        (
            "eval",
            ("diffusion", "--drafter", "prompt"),
            "drafter is ['prompt'], must be left out where verified isn't",
        ),
        ("eval", ("verified", "--threshold", 0.5), "--threshold is '0.5', must be left out where diffusion isn't run"),
        ("eval", ("ar", "--target-retention", 0.9), "add diffusion to --modes, or drop it"),
        (
            "bench decode",
            ("ar", "--drafter", "prompt"),
            "drafter is ['prompt'], must be left out where verified isn't",
        ),
    ],
)
def test_options_that_no_mode_would_read_are_refused(run, checkpoint, command, options, words):
    model = ("--model", checkpoint) if command == "bench decode" else (checkpoint,)
    result = run(*command.split(), *model, "--modes", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_what_does_not_fit_is_left_out_and_said(run, checkpoint, task, tmp_path):
    out = tmp_path / "out.json"
    result = run("eval", checkpoint, "--tasks", task, "--no-speed", "--json", out, "--longest", 14)
    assert result.exit_code == 0, result.output
    assert "mine: 1 of 3 questions need more than 14 tokens and are left out" in result.stderr
    found = json.loads(out.read_text())
    assert found["questions_left_out"] == {"mine": 1}
    assert found["tasks"]["mine"]["examples"] == 2
    assert run("eval", checkpoint, "--tasks", task, "--longest", 5).exit_code == 2


def test_groups_have_a_table(run, checkpoint, tmp_path):
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(LINE | {"prompt": g, "group": g}) + "\n" for g in ("first", "second")))
    assert "second" in run("eval", checkpoint, "--tasks", path, "--no-speed").stdout


def test_programs_are_announced(run, checkpoint, tmp_path):
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps({"prompt": "x = ", "scorer": "program", "answer": "", "max_new_tokens": 4}))
    result = run("eval", checkpoint, "--tasks", path, "--no-speed")
    assert result.exit_code == 0, result.output
    assert "not kept from them: reading of files" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--threshold", "0.5,high"),
        ("--tasks", "chess"),
        ("--modes", "fast"),
        ("--modes", "verified,auto"),
        ("--tasks", "lists,json,lists"),
        ("--json", "no such directory/out.json"),
        ("--json", "."),
        ("--repeats", 4),
        ("--batch-sizes", "1,x"),
        ("--batch-sizes", "64"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_answered(run, checkpoint, options, monkeypatch):
    monkeypatch.setattr(module, "open_model", None)
    result = run("eval", checkpoint, *options)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_mistakes_name_what_is_wrong(run, checkpoint, task, tmp_path, monkeypatch):
    assert "must be of ar, mock_ar, simulated_ar, diffusion, verified" in run("eval", "--modes", "auto").stderr
    other = tmp_path / "other" / "mine.jsonl"
    other.parent.mkdir()
    other.write_text(task.read_text())
    assert f"tasks {task} and {other} are both named mine" in run("eval", "--tasks", f"{task},{other}").stderr
    monkeypatch.setattr(module.os, "access", lambda path, how: False)
    refused = run("eval", checkpoint, "--tasks", task, "--json", tmp_path / "out.json")
    assert (refused.exit_code, "may not be written" in refused.stderr) == (2, True)
