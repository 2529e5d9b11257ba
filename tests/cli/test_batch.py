"""`twotower generate --out`: every line once, in order, whatever interrupts it."""

import json

import pytest

import twotower
from twotower.decoding.params import SamplingParams

PROMPTS = ["ab", "once", "Zoë", "ab", "a longer prompt than the others", "x"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lengths = [30, 1, 7, 12, 3, 0]
    lines = [{"prompt": p, "max_new_tokens": n} for p, n in zip(PROMPTS, lengths, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def batch(run, checkpoint, prompts, tmp_path):
    """Runs it, with more arguments, and returns what it says and the objects in its file."""
    out = tmp_path / "results.jsonl"

    def call(*arguments):
        result = run("generate", "--file", prompts, "--out", out, "--model", checkpoint, "--ignore-eos", *arguments)
        found = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return result, found

    call.out = out
    return call


def test_results_are_those_of_generate_in_order(batch, checkpoint):
    result, found = batch("--mode", "ar", "--max-num-requests", 2, "--state-mib", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "holds the results of 6 prompts" in result.stderr
    params = [SamplingParams(mode="ar", max_new_tokens=n, ignore_eos=True) for n in (30, 1, 7, 12, 3, 0)]
    expected = twotower.generate(twotower.load(checkpoint), PROMPTS, params)
    assert [line["prompt"] for line in found] == PROMPTS
    assert [line["token_ids"] for line in found] == [g.token_ids for g in expected]
    assert [line["text"] for line in found] == [g.text for g in expected]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "torn"),
    [(0, b'{"prompt": "on'), (2, b""), (2, b'{"prompt": "on\xc3'), (6, b""), (6, b'{"p')],
)
def test_it_goes_on_where_it_was_stopped(batch, kept, torn):
    _, whole = batch("--mode", "verified")
    lines = batch.out.read_bytes().splitlines(keepends=True)
    batch.out.write_bytes(b"".join(lines[:kept]) + torn)
    result, found = batch("--mode", "verified")
    assert result.exit_code == 0, result.output
    assert [line["token_ids"] for line in found] == [line["token_ids"] for line in whole]
    assert batch.out.read_bytes().splitlines(keepends=True)[:kept] == lines[:kept]


@pytest.mark.slow
def test_auto_writes_the_text_of_ar(batch):
    _, ar = batch("--mode", "ar")
    batch.out.unlink()
    result, auto = batch("--mode", "auto")
    assert result.exit_code == 0, result.output
    assert [line["token_ids"] for line in auto] == [line["token_ids"] for line in ar]
    assert batch("--mode", "auto", "--allow-loss")[0].exit_code == 0


@pytest.mark.parametrize("line", [b'{"prompt": "another"}\n', b"text\n", b"[]\n"])
def test_a_file_of_something_else_is_left_alone(run, checkpoint, prompts, tmp_path, line):
    out = tmp_path / "other.jsonl"
    out.write_bytes(line)
    result = run("generate", "--file", prompts, "--out", out, "--model", checkpoint)
    assert result.exit_code == 2
    assert "line 1" in result.stderr
    assert "name another file, or delete it" in result.stderr
    assert out.read_bytes() == line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "x.jsonl"), "--out needs --file"),
        (("--mode", "auto"), "only twotower.Engine can choose a mode"),
    ],
)
def test_what_does_not_go_together_is_said(run, checkpoint, arguments, message):
    result = run("generate", "ab", "--model", checkpoint, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_out_excludes_json_and_live(batch):
    result, found = batch("--json")
    assert result.exit_code == 2
    assert "drop --json and --live" in result.stderr
    assert found == []
