"""Sampled texts of `verified` inside vLLM are distributed as those of `ar`; greedy ones beside them are unchanged."""

import importlib.util
from collections import Counter

import pytest
import torch

import twotower
from twotower.decoding.sampling import distribution, temper

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
DRAFTER = "twotower.integrations.vllm.drafter.TwoTowerDrafter"
DRAFTS = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 8}
NUM = 600


@pytest.fixture
def exact():
    """exact(model, ids, params): the probability under `ar` of each continuation that is not very rare."""

    def of(model, ids, params):
        found = {(): 1.0}
        for _ in range(params.max_new_tokens):
            known = list(found)
            logits = model.context_logits([ids + list(one) for one in known])[:, -1:]
            settings = temper((params,) * len(known), model.config.vocab_size, torch.device("cpu"))
            shares = distribution(logits, settings)[:, 0]
            found = {
                (*one, token): found[one] * share
                for one, row in zip(known, shares.tolist(), strict=True)
                for token, share in enumerate(row)
                if found[one] * share > 1 / NUM
            }
        return found

    return of


@pytest.fixture
def running(engine):
    """A server in which the denoiser drafts, with a row for each text."""
    settings = {"twotower": {"denoiser": True, "drafter": "denoiser"}}
    return engine("stories", speculative_config=DRAFTS, additional_config=settings, max_num_seqs=64)


def test_texts_of_verified_are_distributed_as_those_of_ar(running, exact, chi_square, expected, count) -> None:
    from vllm import SamplingParams

    model = twotower.load("stories", dtype="float32")
    ids = list(model.tokenizer.encode("One day, the").ids)
    common = {"max_tokens": 3, "ignore_eos": True, "detokenize": False, "extra_args": {"mode": "verified"}}
    for shape in ({"temperature": 0.7}, {"temperature": 1.5, "top_k": 4}, {"temperature": 1.0, "top_p": 0.8}):
        sampled = [SamplingParams(**common, **shape, seed=seed) for seed in range(NUM)]
        greedy = SamplingParams(**common, temperature=0)
        outputs = running.generate([{"prompt_token_ids": ids}] * (NUM + 4), [*sampled, *[greedy] * 4], use_tqdm=False)
        texts = [tuple(output.outputs[0].token_ids) for output in outputs]
        ours = twotower.SamplingParams(max_new_tokens=3, ignore_eos=True, **shape)
        found = chi_square(Counter(texts[:NUM]), exact(model, ids, ours), NUM)
        assert found.p_value > 1e-3, shape
        assert found.degrees >= 5
        assert [list(text) for text in texts[NUM:]] == expected("stories", [ids] * 4, 3)
    assert count(running, "spec_decode_num_accepted_tokens") > NUM


def test_a_step_without_drafts_takes_top_k(running) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, top_k=5, seed=0, max_tokens=20, ignore_eos=True, extra_args={"mode": "ar"})
    [output] = running.generate("Once upon a time", params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 20
