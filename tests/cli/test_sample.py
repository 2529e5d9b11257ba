"""`twotower sample`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import hearing_signals
from twotower.training.corpus.shards import Corpus
from twotower.training.run.lock import LOCK_FILE

SMALL = ("--rows", 3, "--length", 12, "--longest-prefix", 8)


def test_writes_shards_that_train_reads_and_keeps_those_there(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    result = run("sample", checkpoint, out, "--shards", 2, *SMALL)
    assert result.exit_code == 0, result.output
    # no end of text in this checkpoint: all but the prefixes is scored
    corpus = Corpus(out, vocab_size=260)
    scored = sum(int(corpus.row(n).scored.sum()) for n in range(6))
    assert f"6 rows of 12 tokens, {scored} of them scored" in result.stdout
    first = out / "00000.safetensors"
    before = first.stat().st_mtime_ns
    assert run("sample", checkpoint, out, "--shards", 3, *SMALL).exit_code == 0
    assert first.stat().st_mtime_ns == before
    assert sorted(f.name for f in out.iterdir()) == [*(f"0000{i}.safetensors" for i in range(3)), "settings.json"]
    assert len(Corpus(out, vocab_size=260)) == 9


def test_other_settings_are_refused(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    assert run("sample", checkpoint, out, "--shards", 1, *SMALL).exit_code == 0
    for options, message in (
        (("--seed", 5), "begun with seed 0, not seed 5; give the same again"),
        (("--temperatures", "1"), "begun with temperatures [0.0, 0.0, 0.0, 1.0], not temperatures [1.0]"),
        (("--dtype", "bfloat16"), "begun with dtype 'float32', not dtype 'bfloat16'"),
    ):
        result = run("sample", checkpoint, out, "--shards", 2, *SMALL, *options)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())


def with_template(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with a chat template."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    template = "<s>{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_prompts_are_continued(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "not this"}]}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ({"prompt": "ab"}, chat)))
    (tmp_path / "p.txt").write_text("ab\n\nc\u2028d\n")
    model = with_template(checkpoint, tmp_path / "model")
    for name, expected in (("p.jsonl", (([], "ab"), ([1], "u:hi;a:"))), ("p.txt", (([], "ab"), ([], "c\u2028d")))):
        out = tmp_path / name.replace(".", "-")
        result = run("sample", model, out, "--prompts", tmp_path / name, "--length", 12)
        assert result.exit_code == 0, result.output
        corpus = Corpus(out, vocab_size=260)
        assert len(corpus) == 2
        for index, (control, text) in enumerate(expected):
            ids, scored, _ = corpus.row(index)
            prompt = [*control, *(4 + byte for byte in text.encode())]
            assert ids[: len(prompt)].tolist() == prompt
            assert scored.tolist() == [place >= len(prompt) for place in range(12)]
    (tmp_path / "p.txt").write_text("ef\n")
    result = run("sample", model, out, "--prompts", tmp_path / "p.txt", "--length", 12)
    assert "begun with prompts 'p.txt, sha256" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"text": "a"}, (), "FILE line 1 has no text as prompt and no messages; its fields are ['text']"),
        ({"prompt": "a" * 12}, (), "prompt 1 of FILE has 12 tokens, must have 1 to 11, below length=12"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, (), "FILE line 1 must have messages to answer"),
        ({"messages": "hi"}, (), "FILE line 1 has no list of messages in 'messages'"),
        ({"messages": ["hi"]}, (), "FILE line 1: the message 'hi' is no object with role and content"),
        ({"prompt": "a"}, ("--shards", 2), "shards is 2, must be 1 to 1: 1 prompts in shards of 512 rows"),
        ({"prompt": "a"}, ("--longest-prefix", 2), "--longest-prefix is 2, must be left out with --prompts"),
    ],
)
def test_bad_prompts_are_told(
    run: Any, checkpoint: Path, tmp_path: Path, record: dict, options: tuple, message: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(record))
    model = with_template(checkpoint, tmp_path / "model")
    result = run("sample", model, tmp_path / "out", "--prompts", file, "--length", 12, *options)
    assert result.exit_code == 2
    assert message.replace("FILE", str(file)) in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_messages_need_a_template(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    result = run("sample", checkpoint, tmp_path / "out", "--prompts", tmp_path / "p.jsonl")
    assert "no chat template for them; add a chat_template.jinja" in " ".join(result.stderr.split())


def test_temperatures_decide_what_is_scored(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    for text, whole in (("1", True), ("0,0.5", False)):
        out = tmp_path / text
        assert run("sample", checkpoint, out, "--shards", 2, "--temperatures", text, *SMALL).exit_code == 0
        corpus = Corpus(out, vocab_size=260)
        assert all(bool(corpus.row(i).scored[1:].all()) is whole for i in range(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperatures", "hot"), "--temperatures is 'hot', must be numbers"),
        (("--temperatures", "-1"), "must be numbers in [0, 100]"),
        (("--length", 1), "--length is 1, must be an integer of at least 2"),
    ],
)
def test_bad_options_are_told(run: Any, checkpoint: Path, tmp_path: Path, options: tuple, message: str) -> None:
    result = run("sample", checkpoint, tmp_path, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


# `python -m twotower`, which waits for a signal before a file gets the name that is the first argument, so that the
# signal finds it there however busy the machine is.
HELD = """
import os, signal, sys

def hold(event, arguments):
    if event == "os.rename" and os.path.basename(arguments[1]) == name:
        signal.pause()

name = sys.argv.pop(1)
sys.addaudithook(hold)
from twotower.cli.main import app
app()
"""


def assert_goes_on(folder: Path, checkpoint: Path, number: signal.Signals, shards: int) -> None:
    """Sends a call a signal when it has so many shards; the same call again must give what one call gives."""
    straight, out = folder / "straight", folder / "stopped"
    options = [str(part) for part in ("--shards", 6, "--rows", 64, "--length", 48, "--longest-prefix", 8)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # so that sums have the same order

    def command(out: Path) -> list[str]:
        return ["sample", str(checkpoint), str(out), *options]

    def call(out: Path) -> None:
        subprocess.run(
            [sys.executable, "-m", "twotower", *command(out)], env=one_thread, check=True, capture_output=True
        )

    call(straight)
    held = [sys.executable, "-c", HELD, f"{shards:05}.safetensors", *command(out)]
    with subprocess.Popen(
        held, env=one_thread, stderr=subprocess.PIPE, text=True, preexec_fn=hearing_signals
    ) as process:
        while process.poll() is None and not list(out.glob(f"{shards:05}.partial*")):
            time.sleep(0.001)
        process.send_signal(number)
        errors = process.communicate()[1]
    assert "Traceback" not in errors
    assert process.returncode in (-number, 128 + number), errors
    before = {file.name: file.read_bytes() for file in out.glob("0000?.safetensors")}
    assert len(before) == shards
    call(out)
    content = {file.name: file.read_bytes() for file in out.iterdir()}
    assert content == {file.name: file.read_bytes() for file in straight.iterdir()}
    assert before.items() <= content.items()
    assert len(Corpus(out, vocab_size=260)) == 6 * 64


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_call_that_is_stopped_at_its_third_shard_goes_on(
    checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    assert_goes_on(tmp_path, checkpoint, number, shards=2)


@pytest.mark.slow
def test_a_call_that_is_killed_as_it_begins_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    assert_goes_on(tmp_path, checkpoint, signal.SIGKILL, shards=0)


def test_what_a_kill_left_half_written_is_written_again(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "corpus"
    run("sample", checkpoint, whole, "--shards", 3, *SMALL)
    run("sample", checkpoint, out, "--shards", 1, *SMALL)
    (out / "00001.partial.safetensors").write_bytes((whole / "00001.safetensors").read_bytes()[:100])
    (out / "settings.partial").write_text("{")
    (out / LOCK_FILE).write_text("{}")
    assert run("sample", checkpoint, out, "--shards", 3, *SMALL).exit_code == 0
    assert len(Corpus(out, vocab_size=260)) == 9
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
