"""vLLM's second model runner gives our tokens, in `ar` and in `diffusion`, whose blocks go on beside other rows."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def load(ids, modes, most, **more):
    """A load of the program's, of one request for each prompt."""
    params = {"max_tokens": most} | more.pop("params", {})
    return [{"ids": one, "mode": mode, "params": params, **more} for one, mode in zip(ids, modes, strict=True)]


@pytest.mark.parametrize("name", ["llama", "M*-"])
def test_ar_alone_gives_our_tokens(name, serve, expected, prompts) -> None:
    ids = prompts(4)
    [gave] = serve(name, {"max_num_batched_tokens": 48}, load(ids, ["ar"] * 4, 20))
    assert gave["tokens"] == expected(name, ids, 20)


@pytest.mark.parametrize("name", ["stories", "hybrid", "llama", "M*-", "MEM*E"])
def test_tokens_passes_and_commit_steps_are_ours_alone_and_mixed_with_ar(
    name, serve, expected, prompts, checkpoint
) -> None:
    ids, modes = prompts(6), ["diffusion", "ar"] * 3
    mixed, alone = serve(name, WITH_DENOISER, load(ids, modes, 41), load(ids[:1], ["diffusion"], 41))
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
    settings = {"max_num_batched_tokens": 48, "block_size": 32, **WITH_DENOISER}
    first, second = serve(name, settings, load(ids, modes, 40), load(ids, modes, 40))
    ours = expected(name, ids[:2], 40, "diffusion") + expected(name, ids[2:], 40)
    assert first["tokens"] == ours
    assert second["tokens"] == ours
    assert (second["hits"] > first["hits"]) == (name == "llama")


@pytest.mark.parametrize(("name", "blocks"), [("llama", 6), ("M*-", 14)])
def test_requests_that_lose_their_place_and_come_back_give_our_tokens(name, blocks, serve, expected, prompts) -> None:
    ids, modes = prompts(6, most=100, seed=5), ["diffusion", "ar"] * 3
    [gave] = serve(name, {"num_gpu_blocks_override": blocks, **WITH_DENOISER}, load(ids, modes, 120))
    assert gave["tokens"][0::2] == expected(name, ids[0::2], 120, "diffusion")
    assert gave["tokens"][1::2] == expected(name, ids[1::2], 120)
    assert gave["preemptions"] > 0


def test_aborts_and_settings_of_single_requests(serve, expected, prompts, checkpoint) -> None:
    """One that ends within its block leaves the others their tokens; settings of blocks and sampling reach ours."""
    ids, modes = prompts(4, seed=6), ["diffusion", "diffusion", "ar", "diffusion"]
    extra = {"block_size": 8, "steps_per_block": 4, "commit_rule": "margin", "confidence_threshold": 0.99}
    # Triton doesn't interpret vLLM's filters by top_k and top_p
    sampled = {"temperature": 0.7, "seed": 3, "presence_penalty": 0.5, "ignore_eos": True}
    aborted = load(ids, modes, 30)
    aborted[1]["patience"] = 4
    other = load(ids[1:3], modes[1:3], 30, params=sampled, extra=extra)
    first, again, last = serve("M*-", WITH_DENOISER, aborted, load(ids, modes, 30), other)
    ours = expected("M*-", ids, 30, "diffusion")
    ours[2] = expected("M*-", ids[2:3], 30)[0]
    assert not any(row[1] for row in first["given"])  # its block had begun
    assert first["tokens"] == [ours[0], None, ours[2], ours[3]]
    assert again["tokens"] == ours
    params = twotower.SamplingParams(**sampled, max_new_tokens=30, **extra)
    [one] = twotower.generate(twotower.load(checkpoint("M*-"), dtype="float32"), ids[1:2], params)
    assert last["tokens"][0] == list(one.token_ids)
    assert [len(steps) for _, steps in last["blocks"][0]] == [8, 8, 8, 6]


def test_log_probabilities_are_ours_in_rows_of_both_modes(serve, prompts, checkpoint) -> None:
    """Those of a prompt come with its first block, which others wait for."""
    ids, modes = prompts(4), ["diffusion", "ar", "diffusion", "diffusion"]
    asked = load(ids, modes, 20)
    for one, num in zip(asked, (2, 3, None, 4), strict=True):
        one["params"] = one["params"] | {"logprobs": num}
    asked[3]["params"]["prompt_logprobs"] = 1
    plain = load(ids[3:], ["ar"], 20, params={"prompt_logprobs": 1})
    gave, other = serve("M*-", WITH_DENOISER, asked, plain)
    model = twotower.load(checkpoint("M*-"), dtype="float32")
    for number, (mode, num) in enumerate(zip(modes, (2, 3, 0, 4), strict=True)):
        params = twotower.SamplingParams(mode=mode, max_new_tokens=20, temperature=0, ignore_eos=True, logprobs=num)
        ours = [token for one in twotower.stream(model, ids[number], params) for token in one.tokens]
        assert gave["tokens"][number] == [token.id for token in ours]
        for place, token in zip(gave["logprobs"][number] or [], ours if num else [], strict=True):
            numbers = {token.id: token.logprob, **dict(token.top)}
            assert place[0][:2] == [token.id, token.rank]
            # float32, and other kernels for the context tower
            assert {i: number for i, _, number in place} == pytest.approx(numbers, abs=2e-4)
    assert gave["logprobs"][2] is None
    assert gave["given"][0][1:] == [1, 0, 16]
    [mine], wanted = gave["prompt_logprobs"][3:], other["prompt_logprobs"][0]
    assert mine[0] is wanted[0] is None
    assert len(mine) == len(wanted) == len(ids[3])
    for place, same in zip(mine[1:], wanted[1:], strict=True):
        assert [one[:2] for one in place] == [one[:2] for one in same]
        assert [one[2] for one in place] == pytest.approx([one[2] for one in same], abs=2e-4)


def test_two_processes_give_our_tokens(serve, expected, prompts) -> None:
    ids, modes = prompts(3), ["diffusion", "ar", "diffusion"]
    [gave] = serve("hybrid", {"tensor_parallel_size": 2, **WITH_DENOISER}, load(ids, modes, 30))
    assert gave["tokens"][0::2] == expected("hybrid", ids[0::2], 30, "diffusion")
    assert gave["tokens"][1::2] == expected("hybrid", ids[1::2], 30)


@pytest.mark.parametrize("name", ["llama", "M*-"])
def test_every_request_of_a_random_load_gets_our_tokens(name, serve, expected) -> None:
    """Prompts and texts at the edges of blocks and of the longest text, which come at any time; some are given up."""
    rng = random.Random(1)
    loads: list[list[dict[str, Any]]] = [[] for _ in range(6)]
    shared = [rng.randrange(4, 96) for _ in range(100)]  # what a prefix cache finds again
    for asked in loads:
        start = 0
        for _ in range(rng.randint(3, 8)):
            length = rng.choice([1, 2, 3, 15, 16, 17, 31, 32, 33, rng.randint(1, 200), 240, 254, 255])
            ids = shared[: rng.randint(0, min(length, 100))]
            ids += [rng.randrange(4, 96) for _ in range(length - len(ids))]
            most = min(rng.choice([1, 2, 15, 16, 17, 18, rng.randint(1, 60)]), 256 - length)
            start += rng.choice([0, 0, 1, 2, 5])
            [one] = load([ids], [rng.choice(["ar", "diffusion", "diffusion"])], most, start=start)
            asked.append(one | ({"patience": rng.randint(1, 5)} if rng.random() < 0.15 else {}))
    settings = {"max_num_batched_tokens": 48, "max_num_seqs": 6, "block_size": 32, "num_gpu_blocks_override": 22}
    for asked, gave in zip(loads, serve(name, settings | WITH_DENOISER, *loads), strict=True):
        for one, tokens in zip(asked, gave["tokens"], strict=True):
            if tokens is not None or "patience" not in one:
                assert [tokens] == expected(name, [one["ids"]], one["params"]["max_tokens"], one["mode"])
