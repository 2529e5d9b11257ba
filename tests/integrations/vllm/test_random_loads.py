"""Requests of any length and mode that come and go at any time get our tokens, and none ends the engine."""

import importlib.util
import random
from typing import NamedTuple

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
LONGEST = 256
DRAFTER = "twotower.integrations.vllm.drafter.TwoTowerDrafter"
SERVER = {
    "speculative_config": {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 8},
    "additional_config": {"twotower": {"denoiser": True, "drafter": "prompt,denoiser"}},
    "max_model_len": LONGEST,
    "max_num_seqs": 6,
}


class Asked(NamedTuple):
    """A request, and after how many steps it is given up, if it is."""

    ids: list[int]
    most: int
    mode: str
    patience: int | None


@pytest.fixture
def load():
    """load(rng): requests with prompts and texts at the edges of blocks, of drafts and of the longest text."""

    def make(rng):
        shared = [rng.randrange(4, 96) for _ in range(100)]  # what a prefix cache finds again

        def one():
            length = rng.choice([1, 2, 3, 15, 16, 17, 31, 32, 33, rng.randint(1, 200), 240, 254, 255])
            ids = shared[: rng.randint(0, min(length, 100))]
            ids += [rng.randrange(4, 96) for _ in range(length - len(ids))]
            most = min(rng.choice([1, 2, 15, 16, 17, 18, rng.randint(1, 100)]), LONGEST - length)
            mode = rng.choice(["ar", "verified", "diffusion"])
            return Asked(ids, most, mode, rng.randint(1, 5) if rng.random() < 0.15 else None)

        return [one() for _ in range(rng.randint(3, 10))]

    return make


@pytest.fixture
def serve():
    """serve(engine, load, rng): the tokens of each request that wasn't given up."""
    from vllm import SamplingParams

    def run(engine, requests, rng):
        waiting, found, steps = list(enumerate(requests)), {}, dict[int, int]()
        while waiting or engine.has_unfinished_requests():
            while waiting and rng.random() < 0.5:
                number, asked = waiting.pop(0)
                params = SamplingParams(
                    temperature=0,
                    max_tokens=asked.most,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={"mode": asked.mode},
                )
                engine.add_request(str(number), {"prompt_token_ids": asked.ids}, params)
                steps[number] = 0
            for output in engine.step():
                if output.finished:
                    found[int(output.request_id)] = list(output.outputs[0].token_ids)
            for number in steps:
                steps[number] += 1
                if steps[number] == requests[number].patience and number not in found:
                    engine.abort_request([str(number)])
        return {number: tokens for number, tokens in found.items() if len(tokens) == requests[number].most}

    return run


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("stories", {}),
        ("llama", {"max_num_batched_tokens": 48}),
        ("hybrid", {}),
        ("M*-", {"max_num_batched_tokens": 48}),
    ],
)
def test_every_request_of_a_random_load_gets_our_tokens(name, settings, engine, expected, load, serve) -> None:
    running = engine(name, **SERVER | settings).llm_engine
    for seed in range(8):
        rng = random.Random(seed)
        requests = load(rng)
        found = serve(running, requests, rng)
        stayed = [number for number, asked in enumerate(requests) if asked.patience is None]
        assert set(stayed) <= found.keys()
        for number, tokens in found.items():
            ids, most, mode, _ = requests[number]
            ours = expected(name, [ids], most, "ar" if mode == "verified" else mode)
            assert [tokens] == ours, (seed, number, mode, len(ids), most)
