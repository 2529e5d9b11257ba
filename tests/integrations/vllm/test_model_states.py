"""vLLM's second model runner gives our tokens, in `ar` and in `diffusion`, whose blocks go on beside other rows."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import twotower

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None or importlib.util.find_spec("triton") is None,
        reason="needs vLLM and Triton: make test-vllm",
    ),
]
WITH_DENOISER = {"additional_config": {"twotower": {"denoiser": True}}}
PROGRAM = Path(__file__).with_name("second_runner.py")


@pytest.fixture
def serve(checkpoint):
    """serve(name, settings, *loads): what the program gave for each, in one engine."""

    def run(name, settings, *loads):
        asked = {"folder": str(checkpoint(name)), "settings": settings, "loads": loads}
        command, environment = [sys.executable, PROGRAM, json.dumps(asked)], dict(os.environ)
        if "tensor_parallel_size" in settings:
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = [line for line in ran.stdout.splitlines() if line.startswith("GAVE ")]
        assert len(lines) == len(loads), ran.stdout
        return [json.loads(line.removeprefix("GAVE ")) for line in lines]

    return run


@pytest.mark.parametrize("name", ["llama", "M*-"])
def test_ar_alone_gives_our_tokens(name, serve, expected, prompts) -> None:
    ids = prompts(4)
    [gave] = serve(name, {"max_num_batched_tokens": 48}, {"prompts": ids, "modes": ["ar"] * 4, "most": 20})
    assert gave["tokens"] == expected(name, ids, 20)


@pytest.mark.parametrize("name", ["stories", "hybrid", "llama", "M*-", "MEM*E"])
def test_tokens_passes_and_commit_steps_are_ours_alone_and_mixed_with_ar(
    name, serve, expected, prompts, checkpoint
) -> None:
    ids, modes = prompts(6), ["diffusion", "ar"] * 3
    mixed, alone = serve(
        name,
        WITH_DENOISER,
        {"prompts": ids, "modes": modes, "most": 41},
        {"prompts": ids[:1], "modes": ["diffusion"], "most": 41},
    )
    params = twotower.SamplingParams(max_new_tokens=41, temperature=0, ignore_eos=True)
    ours = twotower.generate(twotower.load(checkpoint(name), dtype="float32"), ids, params)
    assert mixed["tokens"][0::2] == [list(one.token_ids) for one in ours[0::2]]
    assert mixed["tokens"][1::2] == expected(name, ids[1::2], 41)
    assert alone["tokens"] == [list(ours[0].token_ids)]
    for blocks, one in [*zip(mixed["blocks"][0::2], ours[0::2], strict=True), (alone["blocks"][0], ours[0])]:
        assert [n for _, steps in blocks for n in steps] == one.commit_steps
        assert sum(calls for calls, _ in blocks) == one.stats.denoiser_calls
    # Beside blocks that take many steps, rows in `ar` get a token in each; without such rows, a step gives a block.
    started = mixed["given"][1:40]
    assert all(row[1::2] == [1, 1, 1] for row in started)
    assert [0, 0, 0] in [row[0::2] for row in started]
    assert [row[0] for row in alone["given"]] == [16, 16, 9]


@pytest.mark.parametrize("name", ["llama", "M*-"])
def test_prompts_in_chunks_and_known_beginnings_give_our_tokens(name, serve, expected, prompts) -> None:
    beginning = [token for part in prompts(40, seed=3) for token in part][:150]
    ids, modes = [beginning + tail for tail in prompts(4, most=20, seed=4)], ["diffusion", "diffusion", "ar", "ar"]
    load = {"prompts": ids, "modes": modes, "most": 40}
    settings = {"max_num_batched_tokens": 48, "block_size": 32, **WITH_DENOISER}
    first, second = serve(name, settings, load, load)
    ours = expected(name, ids[:2], 40, "diffusion") + expected(name, ids[2:], 40)
    assert first["tokens"] == ours
    assert second["tokens"] == ours
    assert (second["hits"] > first["hits"]) == (name == "llama")


@pytest.mark.parametrize(("name", "blocks"), [("llama", 6), ("M*-", 14)])
def test_requests_that_lose_their_place_and_come_back_give_our_tokens(name, blocks, serve, expected, prompts) -> None:
    ids, modes = prompts(6, most=100, seed=5), ["diffusion", "ar"] * 3
    settings = {"num_gpu_blocks_override": blocks, **WITH_DENOISER}
    [gave] = serve(name, settings, {"prompts": ids, "modes": modes, "most": 120})
    assert gave["tokens"][0::2] == expected(name, ids[0::2], 120, "diffusion")
    assert gave["tokens"][1::2] == expected(name, ids[1::2], 120)
    assert gave["preemptions"] > 0


def test_aborts_and_settings_of_single_requests(serve, expected, prompts, checkpoint) -> None:
    """One that ends within its block leaves the others their tokens; settings of blocks and sampling reach ours."""
    ids, modes = prompts(4, seed=6), ["diffusion", "diffusion", "ar", "diffusion"]
    extra = {"block_size": 8, "steps_per_block": 4, "commit_rule": "margin", "confidence_threshold": 0.99}
    sampled = {"temperature": 0.7, "seed": 3, "presence_penalty": 0.5, "ignore_eos": True}
    load = {"prompts": ids, "modes": modes, "most": 30}
    aborted, again, other = serve(
        "M*-",
        WITH_DENOISER,
        load | {"abort": [4, 1]},
        load,
        load | {"params": sampled, "extra": extra, "prompts": ids[1:3], "modes": modes[1:3]},
    )
    ours = expected("M*-", ids, 30, "diffusion")
    ours[2] = expected("M*-", ids[2:3], 30)[0]
    assert not any(row[1] for row in aborted["given"])  # its block had begun
    assert aborted["tokens"] == [ours[0], None, ours[2], ours[3]]
    assert again["tokens"] == ours
    params = twotower.SamplingParams(**sampled, max_new_tokens=30, **extra)
    [one] = twotower.generate(twotower.load(checkpoint("M*-"), dtype="float32"), ids[1:2], params)
    assert other["tokens"][0] == list(one.token_ids)
    assert [len(steps) for _, steps in other["blocks"][0]] == [8, 8, 8, 6]


def test_two_processes_give_our_tokens(serve, expected, prompts) -> None:
    ids, modes = prompts(3), ["diffusion", "ar", "diffusion"]
    settings = {"tensor_parallel_size": 2, **WITH_DENOISER}
    [gave] = serve("hybrid", settings, {"prompts": ids, "modes": modes, "most": 30})
    assert gave["tokens"][0::2] == expected("hybrid", ids[0::2], 30, "diffusion")
    assert gave["tokens"][1::2] == expected("hybrid", ids[1::2], 30)
