"""`twotower bench decode`: one line per mode, and what its numbers are made of."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import twotower
from twotower.checkpoints import save
from twotower.cli import bench
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.eval.throughput import Timed
from twotower.planning.footprint import pass_bytes, released_tensors

NEW = 12


@pytest.fixture(autouse=True)
def _small_probe(monkeypatch):
    monkeypatch.setattr(bench, "_PROBE_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return twotower.load(checkpoint)


def measured(run, checkpoint, *options):
    sizes = ("--prompts", 2, "--prompt-tokens", 5, "--new-tokens", NEW, "--block-size", 4)
    result = run("bench", "decode", "--model", checkpoint, *sizes, *options)
    assert result.exit_code == 0, result.output
    return {line["mode"]: line for line in map(json.loads, result.stdout.splitlines())}


def test_one_line_for_each_mode(run, checkpoint):
    lines = measured(run, checkpoint)
    assert list(lines) == list(MODES)
    keys = lines["ar"].keys()
    assert {"command", "commit", "machine", "torch", "dtype", "model"} <= keys
    for mode, line in lines.items():
        assert line.keys() == keys
        assert line["repeats"] == 5
        rate, ratio = line["tokens_per_second"], line["ratio_to_ar"]
        assert 0 < rate["q1"] <= rate["median"] <= rate["q3"]
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
        assert line["prefill_seconds"] > 0
        assert line["ms_per_context_call"] > 0
        assert line["floor_seconds"] > 0
        seconds = line["tokens"] / rate["median"]
        assert line["ratio_to_floor"] == pytest.approx(seconds / line["floor_seconds"])
        assert line["bandwidth_gb_s"] > 0
        assert line["dtype"] == "float32"
        assert line["machine"]["threads"] == torch.get_num_threads()
        assert line["tokens"] == NEW
        assert line["degenerate"] == 0
        if mode == "ar":
            assert (line["nfe"], line["tokens_per_nfe"], line["ms_per_nfe"]) == (0, None, None)
        else:
            assert line["tokens_per_nfe"] == pytest.approx(NEW / line["nfe"])
            assert line["ms_per_nfe"] > 0
    assert lines["ar"]["ratio_to_ar"] == {"q1": 1, "median": 1, "q3": 1}
    assert lines["ar"]["context_calls"] == NEW - 1  # the prefill gives the first
    assert lines["simulated_ar"]["nfe"] == lines["mock_ar"]["nfe"] == NEW


def test_ar_runs_beside_the_modes_asked_for(run, checkpoint):
    assert list(measured(run, checkpoint, "--modes", "verified")) == ["ar", "verified"]


def test_the_threshold_and_dtype_reach_the_decoder(run, checkpoint):
    eager = measured(run, checkpoint, "--modes", "diffusion", "--threshold", 0, "--dtype", "bfloat16")["diffusion"]
    careful = measured(run, checkpoint, "--modes", "diffusion", "--threshold", 1)["diffusion"]
    assert eager["nfe"] == NEW / 4
    assert careful["nfe"] > eager["nfe"]
    assert eager["dtype"] == "bfloat16"


def test_verified_runs_with_each_drafter(run, checkpoint):
    sizes = ("--prompts", 2, "--prompt-tokens", 5, "--new-tokens", NEW, "--modes", "verified")
    result = run("bench", "decode", "--model", checkpoint, *sizes, "--drafter", "denoiser", "--drafter", "prompt")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["drafter"] for line in lines] == [None, "denoiser", "prompt"]
    assert list(lines[1]["drafts"]) == ["denoiser"]
    assert lines[1]["drafts"]["denoiser"]["drafted"] > 0
    assert lines[2]["nfe"] == 0
    wrong = run("bench", "decode", "--model", checkpoint, "--modes", "verified", "--drafter", "fast")
    assert wrong.exit_code == 2
    assert "drafter is 'fast', must be one of denoiser, ngram, prompt" in " ".join(wrong.stderr.split())


def test_bad_modes_and_sizes_are_mistakes(run, checkpoint):
    wrong = run("bench", "decode", "--model", checkpoint, "--modes", "ar,fast")
    assert wrong.exit_code == 2
    assert "'ar,fast'" in wrong.stderr
    assert run("bench", "decode", "--model", checkpoint, "--prompts", 0).exit_code == 2
    assert run("bench", "decode", "--model", checkpoint, "--repeats", 4).exit_code == 2


def test_what_is_measured_ends_where_the_text_does(loaded, monkeypatch):
    prompt = [1, 50, 60]
    free = SamplingParams(mode="ar", max_new_tokens=NEW, block_size=4, ignore_eos=True)
    tokens = twotower.generate(loaded, [prompt], free)[0].token_ids
    monkeypatch.setattr(loaded, "config", dataclasses.replace(loaded.config, eos_token_id=tokens[5]))
    monkeypatch.setattr(bench, "open_model", lambda *_, **__: loaded)
    monkeypatch.setattr(bench, "sample_prompts", lambda *_: [prompt])
    result = CliRunner().invoke(bench.app, ["decode", "--modes", "ar", "--prompts", "1", "--new-tokens", str(NEW)])
    assert json.loads(result.stdout)["tokens"] == tokens.index(tokens[5]) + 1


def test_prompts_are_sampled_repeatably_and_start_with_bos(loaded):
    prompts = bench.sample_prompts(loaded, 3, 6)
    assert prompts == bench.sample_prompts(loaded, 3, 6)
    assert [len(prompt) for prompt in prompts] == [6, 6, 6]
    assert {prompt[0] for prompt in prompts} == {loaded.config.bos_token_id}
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert bench.sample_prompts(loaded, 1, 1) == [[loaded.config.bos_token_id]]


@pytest.mark.parametrize("mode", MODES)
def test_the_clock_changes_nothing_and_sees_every_call(loaded, mode):
    prompt = [[1, 50, 60]]
    params = SamplingParams(mode=mode, max_new_tokens=NEW, block_size=4, ignore_eos=True)
    calls = bench.count_calls(loaded, prompt, params)
    stats = twotower.generate(loaded, prompt, params)[0].stats
    assert (calls.tokens, calls.denoiser, calls.context) == (NEW, stats.denoiser_calls, stats.context_calls - 1)
    timed = Timed(loaded)
    assert (
        twotower.generate(timed, prompt, params)[0].token_ids == twotower.generate(loaded, prompt, params)[0].token_ids
    )
    assert timed.seconds["prefill"] > 0
    assert timed.seconds["extend"] > 0
    assert (timed.seconds["denoise"] > 0) == (mode != "ar")


def test_the_floor_is_the_bytes_of_all_passes_over_the_bandwidth(loaded):
    calls = bench.Calls(
        tokens=9, degenerate=0, denoiser=3, context=2, ms_per_denoiser_call=None, ms_per_context_call=None, drafts=()
    )
    tensors = released_tensors(loaded.config, torch.float32)

    def bytes_of(tower, tokens, head):
        return pass_bytes(loaded.config, tensors, tower, tokens, head=head)

    expected = {
        "ar": 3 * bytes_of("denoiser", 4, True) + 2 * bytes_of("context", 1, True),
        "mock_ar": 3 * bytes_of("denoiser", 1, True) + 2 * bytes_of("context", 1, False),
        "diffusion": 3 * bytes_of("denoiser", 4, True) + 2 * bytes_of("context", 4, False),
        "verified": 3 * bytes_of("denoiser", 4, True) + 2 * bytes_of("context", 4, True),
    }
    for mode, total in expected.items():
        params = SamplingParams(mode=mode, block_size=4)
        assert bench.floor_seconds(loaded, params, calls, 1e6) == pytest.approx(total / 1e6)


def test_texts_beyond_the_positions_are_asked_for(run, tiny, tmp_path):
    save(tiny("*", carried={"max_position_embeddings": 16}), tmp_path)
    assert len(measured(run, tmp_path, "--new-tokens", 11, "--modes", "ar")) == 1
    result = run("bench", "decode", "--model", tmp_path, "--prompt-tokens", 5, "--new-tokens", 12)
    assert result.exit_code == 2
    assert "must be at most 11 after a prompt of 5 tokens" in " ".join(result.stderr.split())
    assert len(measured(run, tmp_path, "--new-tokens", 12, "--modes", "ar", "--past-positions")) == 1
