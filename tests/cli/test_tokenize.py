"""`twotower tokenize`."""

import json
from pathlib import Path
from typing import Any

import pytest

from twotower.training.corpus.shards import Corpus


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source" / "a.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"text": f"story {i}", "question": "why?"}) + "\n" for i in range(20)))
    return file


def test_writes_a_corpus_that_train_reads(run: Any, checkpoint: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    result = run("tokenize", checkpoint, source.parent, out, "--length", 16, "--rows", 4)
    assert result.exit_code == 0, result.output
    corpus = Corpus(out, vocab_size=260)
    assert len(list(out.iterdir())) > 1
    assert f"{len(corpus)} rows of 16 tokens" in result.stdout
    assert corpus.length == 16
    assert corpus.row(0).ids[0] == 1


def test_prompts_are_not_scored(run: Any, checkpoint: Path, source: Path, tmp_path: Path) -> None:
    arguments = ("tokenize", checkpoint, source, tmp_path / "out", "--length", 16, "--prompt-field", "question")
    assert run(*arguments).exit_code == 0
    # BOS and the 4 bytes of "why?" are not, the 7 bytes of "story 0" are; this checkpoint has no end token
    assert Corpus(tmp_path / "out", vocab_size=260).row(0).scored.tolist() == [False] * 5 + [True] * 7 + [False] * 4


def test_padding_and_what_is_cut_are_told(run: Any, checkpoint: Path, source: Path, tmp_path: Path) -> None:
    options = ("--length", 10, "--prompt-field", "question")
    result = run("tokenize", checkpoint, source, tmp_path / "out", *options)
    assert "20 rows of 10 tokens" in result.stdout
    assert "0.0% padding" in result.stdout
    # BOS, "why?" and 7 or 8 bytes of "story …" in 10
    assert "20 documents longer than a row lost 50 tokens" in result.stdout
    result = run("tokenize", checkpoint, source, tmp_path / "longer", "--length", 16, *options[2:])
    assert "21.9% padding" in result.stdout
    assert "lost" not in result.stdout


def test_names_of_control_tokens_are_text_unless_they_are_asked_for(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a</s>"}) + "\n")
    assert "spells </s>" in run("tokenize", checkpoint, tmp_path / "a.jsonl", tmp_path / "text").stderr
    assert "--control-tokens" in run("tokenize", "--help").stdout
    result = run("tokenize", checkpoint, tmp_path / "a.jsonl", tmp_path / "tokens", "--control-tokens")
    assert result.stderr == ""
    assert Corpus(tmp_path / "text", vocab_size=260).row(0).scored.sum() == 5
    assert Corpus(tmp_path / "tokens", vocab_size=260).row(0).ids[:3].tolist() == [1, 4 + ord("a"), 2]


def test_mistakes_are_told_and_leave_nothing(run: Any, checkpoint: Path, source: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--text-field", "body"), "no text in the field 'body'"),
        (("--length", 1), "--length is 1, must be an integer of at least 2"),
    ):
        result = run("tokenize", checkpoint, source, tmp_path / "out", *options)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
        assert not (tmp_path / "out").exists()
    result = run("tokenize", checkpoint, source, source.parent)
    assert result.exit_code == 2
    assert "is not empty" in " ".join(result.stderr.split())
    (tmp_path / "a.txt").touch()
    result = run("tokenize", checkpoint, tmp_path / "a.txt", tmp_path / "out")
    assert "a.txt has no text to make tokens of" in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", [("tokenize", "a.txt"), ("sample",), ("init",)])
def test_out_cannot_be_a_file_or_under_one(
    run: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple
) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    for out in ("a.txt", "a.txt/b"):
        result = run(command[0], checkpoint, *command[1:], out)
        assert result.exit_code == 2
        assert f"a.txt is a file, and {out} must be a directory" in " ".join(result.stderr.split())


def test_an_empty_folder_is_filled_and_others_are_left(
    run: Any, checkpoint: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    monkeypatch.chdir(tmp_path / "out")
    result = run("tokenize", checkpoint, source, ".", "--length", 16)
    assert result.exit_code == 0, result.output
    assert len(Corpus(tmp_path / "out", vocab_size=260)) > 0
    assert Path.cwd().exists()
    assert (tmp_path / "out.partial" / "mine").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "out.partial", "source"]
