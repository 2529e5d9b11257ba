"""`twotower generate`: where prompts come from, what is printed, and the live view."""

import io
import json

import pytest
from rich.console import Console

import twotower
from twotower.checkpoints import save
from twotower.cli.batch import FileRequest, record
from twotower.cli.live import StoryView, show, steps
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams

LENGTH = 20


def lines(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return twotower.load(checkpoint)


@pytest.mark.parametrize("mode", MODES)
def test_json_is_what_the_library_gives(run, checkpoint, loaded, mode):
    [printed] = lines(
        run(
            "generate",
            "ab",
            "--model",
            checkpoint,
            "--mode",
            mode,
            "--max-new-tokens",
            LENGTH,
            "--json",
            "--ignore-eos",
        )
    )
    params = SamplingParams(mode=mode, max_new_tokens=LENGTH, ignore_eos=True)
    expected = record(FileRequest("ab", params), twotower.generate(loaded, ["ab"], params)[0])
    clocks = {"seconds_to_first_token", "seconds_total", "tokens_per_second"}
    assert printed.keys() == expected.keys()
    assert {k: v for k, v in printed.items() if k not in clocks} == {
        k: v for k, v in expected.items() if k not in clocks
    }
    assert printed["num_tokens"] == LENGTH == len(printed["token_ids"]) == len(printed["commit_steps"])
    assert printed["tokens_per_second"] == pytest.approx(LENGTH / printed["seconds_total"])
    assert printed["mode"] == mode
    assert printed["prompt"] == "ab"
    assert printed["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--block-size", 4, "block_size"),
        ("--steps-per-block", 2, "steps_per_block"),
        ("--confidence-threshold", 0.05, "confidence_threshold"),
        ("--commit-rule", "leftmost", "commit_rule"),
        ("--max-new-tokens", 3, "max_new_tokens"),
    ],
)
def test_each_setting_reaches_the_decoder(run, checkpoint, loaded, option, value, field):
    base = {"max_new_tokens": LENGTH, "ignore_eos": True}
    flags = ["--max-new-tokens", LENGTH, "--ignore-eos", "--json"]
    [printed] = lines(run("generate", "ab", "--model", checkpoint, *flags, option, value))
    expected = twotower.generate(loaded, ["ab"], SamplingParams(**(base | {field: value})))[0]
    assert printed["token_ids"] == expected.token_ids
    assert printed["commit_steps"] == expected.commit_steps
    plain = twotower.generate(loaded, ["ab"], SamplingParams(**base))[0]
    assert (plain.token_ids, plain.commit_steps) != (expected.token_ids, expected.commit_steps)


def test_a_fixed_draft_reaches_the_decoder(run):
    """The shipped model is unsure of this text: drafts that adapt become short, and now and then more would be kept."""
    flags = ["--mode", "verified", "--drafter", "denoiser", "--max-new-tokens", 30, "--json"]
    [adaptive] = lines(run("generate", "The little dog", *flags))
    [fixed] = lines(run("generate", "The little dog", *flags, "--fixed-draft"))
    assert fixed["token_ids"] == adaptive["token_ids"]
    assert fixed["denoiser_calls"] < adaptive["denoiser_calls"]


def test_sampling_settings_reach_the_decoder(run, checkpoint, loaded):
    options = {"temperature": 2.0, "top_k": 5, "top_p": 0.7, "seed": 3}
    others = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 4}
    base = {"mode": "ar", "max_new_tokens": LENGTH, "ignore_eos": True}
    flags = ["--mode", "ar", "--max-new-tokens", LENGTH, "--ignore-eos", "--json"]
    flags += [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    [printed] = lines(run("generate", "ab", "--model", checkpoint, *flags))
    variants = [options, *(options | {name: other} for name, other in others.items())]
    same, *different = twotower.generate(loaded, ["ab"] * 5, [SamplingParams(**base, **v) for v in variants])
    assert printed["token_ids"] == same.token_ids
    assert all(printed["token_ids"] != d.token_ids for d in different)


def test_stop_ends_the_text(run, checkpoint):
    options = ["--model", checkpoint, "--json", "--mode", "ar", "--max-new-tokens", LENGTH, "--ignore-eos"]
    [whole] = lines(run("generate", "ab", *options))
    stop = whole["text"][4:6]
    [cut] = lines(run("generate", "ab", *options, "--stop", "never in it", "--stop", stop))
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"


def test_a_file_gives_one_object_per_line_with_its_own_settings(run, checkpoint, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "ab"}, {"prompt": [1, 100, 101], "mode": "ar", "max_new_tokens": 5, "stop": ["never"]}]
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    first, second = lines(run("generate", "--file", file, "--model", checkpoint, "--json", "--max-new-tokens", 3))
    assert (first["prompt"], first["mode"], first["num_tokens"]) == ("ab", "diffusion", 3)
    assert (second["prompt"], second["mode"], second["num_tokens"]) == ([1, 100, 101], "ar", 5)


def test_lines_of_a_file_end_where_those_of_json_do(run, checkpoint, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts = ["a\u2028b", "c\x85d"]
    file.write_text("\ufeff" + "\r\n".join(json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts))
    result = run("generate", "--file", file, "--out", out, "--model", checkpoint, "--max-new-tokens", 1)
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line)["prompt"] for line in out.read_bytes().splitlines()] == prompts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "not JSON"),
        ('{"prompt": "\xe9"}', "not JSON: 'utf-8' codec can't decode byte 0xe9"),
        ('{"mode": "ar"}', "prompt"),
        ('{"prompt": 3}', "neither a text nor a list"),
        ('{"prompt": [true]}', "neither a text nor a list"),
        ('{"prompt": "a", "temprature": 1}', "temprature"),
        ('{"prompt": "a", "block_size": 0}', "block_size is 0"),
        ('{"prompt": "a", "mode": "fast"}', "mode is 'fast'"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_generated(run, checkpoint, tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n", encoding="latin-1")
    result = run("generate", "--file", file, "--model", checkpoint, "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "line 2" in result.stderr
    assert message in result.stderr


def test_stdin_without_its_last_newline_is_the_prompt(run, checkpoint):
    [printed] = lines(run("generate", "--model", checkpoint, "--json", "--max-new-tokens", 1, input="a\nb\n"))
    assert printed["prompt"] == "a\nb"


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_plain_output_is_the_text(run, checkpoint, mode):
    options = ["--model", checkpoint, "--mode", mode, "--max-new-tokens", LENGTH]
    [printed] = lines(run("generate", "ab", *options, "--json"))
    result = run("generate", "ab", *options)
    assert result.exit_code == 0
    assert result.stdout == printed["text"] + "\n"


def test_without_a_tokenizer_ids_go_in_and_out(run, model, tmp_path):
    save(model, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": [1, 7]}')
    options = ["--model", tmp_path / "bare", "--file", file, "--max-new-tokens", 4]
    [printed] = lines(run("generate", *options, "--json"))
    assert printed["text"] is None
    assert run("generate", *options).stdout.split() == [str(i) for i in printed["token_ids"]]
    assert "no tokenizer.json" in run("generate", "a", "--model", tmp_path / "bare").stderr
    assert "no tokenizer.json" in run("generate", *options, "--live").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--top-p", 3], "--top-p is 3.0"),
        (["a", "--max-new-tokens", -1], "--max-new-tokens is -1"),
        (["a", "--mode", "fast"], "fast"),
        (["a", "--json", "--live"], "--json and --live"),
        (["a", "--device", "tpu0"], "device is 'tpu0'"),
        (["a", "--device", "cuda:99"], "device is 'cuda:99'"),
        (["a", "--file", __file__], "both a prompt and --file"),
    ],
)
def test_a_bad_setting_exits_2_and_says_which(run, checkpoint, arguments, message):
    result = run("generate", "--model", checkpoint, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr


def test_dtype_is_the_models(run, checkpoint):
    exact, rounded = (
        lines(run("generate", "ab", "--model", checkpoint, "--json", "--max-new-tokens", 4, "--dtype", dtype))[0]
        for dtype in ("float32", "bfloat16")
    )
    assert exact["confidences"] != rounded["confidences"]


def test_a_block_larger_than_trained_warns_in_one_line(run, checkpoint):
    result = run("generate", "ab", "--model", checkpoint, "--block-size", 9, "--temperature", 1, "--max-new-tokens", 1)
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: block_size 9 is larger than the 8")
    assert result.stderr.count("\n") == 1


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=40, height=8, legacy_windows=False)


@pytest.mark.parametrize("mode", MODES)
def test_the_live_view_ends_with_the_whole_text_and_its_speed(loaded, mode):
    console = terminal()
    params = SamplingParams(mode=mode, max_new_tokens=LENGTH, block_size=8, ignore_eos=True)
    show(loaded, "ab", params, console)
    drawn = console.file.getvalue()
    assert ("▒" in drawn) == (mode in ("diffusion", "simulated_ar"))
    assert f"{mode}: {LENGTH} tokens" in drawn
    assert ("NFE" in drawn) == (mode != "ar")


def test_the_view_shows_the_block_that_the_stream_is_at(loaded):
    params = SamplingParams(max_new_tokens=LENGTH, block_size=8, ignore_eos=True)
    view = StoryView("ab", loaded.tokenizer, loaded.config.mask_token_id, terminal())
    recorded = [step.piece for step in steps(loaded, "ab", params)]
    for piece in recorded:
        view.take(piece)
        shown = view.text().plain
        if piece.result is None:
            assert shown.count(" ▒▒▒") == piece.block.ids.count(loaded.config.mask_token_id)
            assert f"step {piece.block.step} of this block" in view.status()
    assert shown == "ab" + recorded[-1].result.text
    assert any(piece.block.t > 0 for piece in recorded)


def test_the_view_replaces_a_block_that_a_stop_string_cut(loaded):
    whole = twotower.generate(loaded, ["ab"], SamplingParams(max_new_tokens=LENGTH, ignore_eos=True))[0].text
    params = SamplingParams(max_new_tokens=LENGTH, ignore_eos=True, stop=(whole[5:7],))
    view = StoryView("ab", loaded.tokenizer, loaded.config.mask_token_id, terminal())
    for step in steps(loaded, "ab", params):
        view.take(step.piece)
    assert view.text().plain == "ab" + whole[: whole.index(whole[5:7])]
