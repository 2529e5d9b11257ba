"""`twotower train` from a single tower and text: what it makes, reuses and refuses."""

import json
import shutil
import threading

import pytest
import torch
import transformers

import twotower
from twotower.cli import prepare as module
from twotower.cli.prepare import prepare
from twotower.training.corpus.shards import is_corpus

STEPS = ("--steps", 1, "--batch-size", 2, "--warmup-steps", 0, "--row-length", 12)


@pytest.fixture(scope="module")
def single_tower(byte_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("single_tower")
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text(byte_tokenizer.to_str().replace("<mask>", "<spare>"))
    return path


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"This is the text of number {number}.")
    return folder


def test_one_command_from_a_single_tower_and_a_folder_of_text_to_a_checkpoint(run, single_tower, text, tmp_path):
    out = tmp_path / "out"
    result = run("train", single_tower, text, out, *STEPS, "--held-out", text / "0.txt", "--evaluate-every", 1)
    assert result.exit_code == 0, result.output
    trained, start = (twotower.load(out / name, pack=False).released_tensors() for name in ("checkpoint", "initial"))
    assert trained.keys() == start.keys()
    different = {name for name in trained if not torch.equal(trained[name], start[name].to(trained[name].dtype))}
    assert different
    assert not any(name.startswith("context_") for name in different)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["held_out"]


def test_a_second_call_takes_what_the_first_made_and_a_different_one_is_refused(run, single_tower, text, tmp_path):
    out = tmp_path / "out"
    assert run("train", single_tower, text, out, *STEPS).exit_code == 0
    made = {file: file.stat().st_mtime_ns for name in ("initial", "corpus") for file in (out / name).iterdir()}
    result = run("train", single_tower, text, out, *STEPS[2:], "--steps", 2)
    assert result.exit_code == 0, result.output
    assert {file: file.stat().st_mtime_ns for file in made} == made
    result = run("train", single_tower, text / "1.txt", out, *STEPS)
    assert result.exit_code != 0
    assert "1.txt" in result.stderr
    assert "another OUT" in result.stderr


def test_a_denoiser_of_some_layers_is_trained_from_one_tower_and_from_two(run, single_tower, text, tmp_path, tiny):
    some = ("--denoiser-layers", "last:1", *STEPS)
    towers = tmp_path / "towers"
    twotower.save(tiny("*-*-", vocab_size=260), towers)
    corpus = tmp_path / f"of-{single_tower.name}" / "corpus"
    for model, source, layers in ((single_tower, text, None), (towers, corpus, (2, 3))):
        out = tmp_path / f"of-{model.name}"
        result = run("train", model, source, out, *some)
        assert result.exit_code == 0, result.output
        assert twotower.load(out / "checkpoint").config.denoiser_layers == layers
        initial = json.loads((out / "prepared.json").read_text())["initial"]
        assert initial == {"model": str(model), "denoiser_layers": "last:1"}
        assert run("train", model, source, out, *some, "--export-only").exit_code == 0
    left = run("train", towers, corpus, tmp_path / "of-towers", *STEPS)
    assert left.exit_code == 2, left.output
    dry = [run("train", towers, text, tmp_path / "none", *given, "--dry-run").stdout for given in (STEPS, some)]
    assert dry[0] != dry[1]
    wrong = run("train", towers, text, tmp_path / "none", "--denoiser-layers", "last:3", *STEPS)
    assert (wrong.exit_code, "K in [1, 2]" in wrong.stderr) == (2, True)
    assert not (tmp_path / "none").exists()


def test_a_dry_run_makes_nothing(run, single_tower, text, tmp_path):
    result = run("train", single_tower, text, tmp_path / "out", *STEPS, "--dry-run")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_used_where_it_lies(checkpoint, text, tmp_path, single_tower):
    made = prepare(str(single_tower), {"corpus": str(text)}, tmp_path / "first", 12)
    again = prepare(str(checkpoint), {"corpus": str(made.corpora["corpus"])}, tmp_path / "second", 12)
    assert (again.model, again.corpora) == (str(checkpoint), made.corpora)
    assert not (tmp_path / "second").exists()


def test_other_ranks_wait_for_the_first(single_tower, text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    arguments = (str(single_tower), {"corpus": str(text)}, tmp_path / "out", 12)
    monkeypatch.setenv("RANK", "1")
    looked, read = threading.Event(), module._read
    monkeypatch.setattr(module, "_read", lambda out: looked.set() or read(out))
    found = []
    other = threading.Thread(target=lambda: found.append(prepare(*arguments)), daemon=True)
    other.start()
    assert looked.wait(60)
    other.join(0.05)
    assert other.is_alive()
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")
    made = prepare(*arguments)
    other.join(10)
    assert found == [made]


def test_the_state_is_exported_without_the_text_and_only_where_there_is_one(run, single_tower, text, tmp_path):
    result = run("train", single_tower, text, tmp_path / "none", *STEPS, "--export-only")
    assert "no saved state" in result.stderr
    assert not (tmp_path / "none").exists()
    out = tmp_path / "out"
    assert run("train", single_tower, text, out, *STEPS).exit_code == 0
    shutil.rmtree(out / "corpus")
    shutil.rmtree(out / "checkpoint")
    result = run("train", single_tower, text, out, "--export-only")
    assert result.exit_code == 0, result.output
    assert (out / "checkpoint" / "config.json").exists()


def test_a_single_tower_elsewhere_says_how_to_make_two_of_it(run, single_tower, text, tmp_path):
    for command in (("generate", "a", "--model", single_tower), ("sample", single_tower, tmp_path / "out")):
        assert "twotower init" in " ".join(run(*command).stderr.split())


@pytest.mark.parametrize("while_writing", ["initial", "corpus", "held_out"])
def test_what_was_being_made_at_a_kill_is_made_again(single_tower, text, tmp_path, monkeypatch, while_writing):
    arguments = (str(single_tower), {"corpus": str(text), "held_out": str(text / "0.txt")}, tmp_path / "out", 12)

    def killed(write):
        def wrapped(*given, **named):
            write(*given, **named)
            if tmp_path / "out" / while_writing in map(type(tmp_path), map(str, given)):
                raise SystemExit

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("init", "tokenize"):
            patch.setattr(module, name, killed(getattr(module, name)))
        with pytest.raises(SystemExit):
            prepare(*arguments)
    (tmp_path / "out" / f"{while_writing}.partial-x").mkdir()
    prepare(*arguments)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "corpus",
        "held_out",
        "initial",
        "prepared.json",
    ]
    assert [file.name for file in (tmp_path / "out" / "corpus").iterdir()] == ["00000.safetensors"]


def test_held_out_text_may_come_later_and_a_text_that_could_not_be_read_be_another(single_tower, text, tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"body": "a"}')
    arguments = (str(single_tower), {"corpus": str(wrong)}, tmp_path / "out", 12)
    with pytest.raises(ValueError, match="no text in the field"):
        prepare(*arguments)
    sources = {"corpus": str(text)}
    prepare(str(single_tower), sources, tmp_path / "out", 12)
    found = prepare(str(single_tower) + "/", sources | {"held_out": str(text / "0.txt")}, tmp_path / "out", 12)
    assert all(is_corpus(folder) for folder in found.corpora.values())


@pytest.mark.parametrize("options", [("--evaluate-every", 1), ("--shard",), ("--device", "cuda:9")])
def test_settings_that_do_not_go_together_are_refused_first(run, single_tower, text, tmp_path, options):
    result = run("train", single_tower, text, tmp_path / "out", *STEPS, *options)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
    result = run("train", single_tower, text, single_tower / "config.json", *STEPS)
    assert "is a file" in result.stderr


@pytest.mark.parametrize("place", ["text", "text/run"])
def test_a_run_s_own_files_are_not_read_as_text(single_tower, text, tmp_path, place):
    with pytest.raises(ValueError, match="give an OUT outside it"):
        prepare(str(single_tower), {"corpus": str(text)}, tmp_path / place, 12)
    assert not any(file.is_dir() for file in text.iterdir())


def test_what_it_did_not_make_is_not_replaced(single_tower, text, tmp_path):
    (tmp_path / "initial").mkdir()
    with pytest.raises(FileExistsError, match="another OUT"):
        prepare(str(single_tower), {"corpus": str(text)}, tmp_path, 12)
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".json"] == []
