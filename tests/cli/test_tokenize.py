"""`twotower tokenize`."""

import json
import shutil
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


def test_conversations_are_learnt_answer_by_answer(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "<s>{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
        "{{ 'a' if add_generation_prompt }}"
    )
    turns = [("human", "p"), ("gpt", "q"), ("human", "r"), ("gpt", "t")]
    records = [
        {"messages": [{"role": {"human": "user", "gpt": "assistant"}[r], "content": c} for r, c in turns]},
        {"conversations": [{"from": r, "value": c} for r, c in turns]},
    ]
    for number, record in enumerate(records):
        (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
        out = tmp_path / f"out{number}"
        result = run("tokenize", model, tmp_path / "a.jsonl", out, "--length", 32)
        assert result.exit_code == 0, result.stderr
        row = Corpus(out, vocab_size=260).row(0)
        assert bytes((row.ids[row.ids > 3] - 4).tolist()).decode() == "upaq" + "upaqurat"
        learnt = [row.ids[(row.document == n) & row.scored].tolist() for n in (0, 1)]
        assert [ids[0] for ids in learnt] == [4 + ord("q"), 4 + ord("t")]
        assert [len(ids) for ids in learnt] == [2, 2]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}], "line 1 has no message of the role 'assistant' behind another"),
        ([], "line 1 has no list of messages in 'messages'"),
        (None, "line 1 has no list of messages in 'messages'"),
        (
            [{"role": "user"}, {"content": "a"}],
            "line 1: the message {'content': 'a'} is no object with role and content",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud83d"}],
            "line 1 holds '\\ud83d' alone, which is half of a character",
        ),
    ],
)
def test_bad_conversations_are_named(
    run: Any, checkpoint: Path, tmp_path: Path, messages: object, message: str
) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    result = run("tokenize", model, tmp_path / "a.jsonl", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_what_a_killed_call_left_is_told(run: Any, checkpoint: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial-x").mkdir()
    result = run("tokenize", checkpoint, source, tmp_path / "out", "--length", 16)
    assert result.exit_code == 0
    assert "out.partial-x is left of a call that was killed" in " ".join(result.stderr.split())
