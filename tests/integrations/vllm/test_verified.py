"""`verified` inside vLLM: drafts from n-grams and from the text, checked by vLLM, give the tokens of `ar`."""

import importlib.util

import pytest

from twotower.errors import SettingError
from twotower.integrations.vllm.settings import DRAFTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
SPECULATIVE = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 8}


@pytest.mark.parametrize(("name", "drafter"), [("stories", "ngram"), ("stories", "prompt,ngram"), ("llama", "prompt")])
def test_verified_alone_and_mixed_with_ar_gives_the_tokens_of_ar(
    name, drafter, engine, expected, prompts, ask, count
) -> None:
    running = engine(name, speculative_config=SPECULATIVE, additional_config={"twotower": {"drafter": drafter}})
    ids = prompts(6, most=20)
    ours = expected(name, ids, 60)
    assert ask(running, ids, 60) == ours
    drafted = count(running, "spec_decode_num_draft_tokens")
    assert count(running, "spec_decode_num_accepted_tokens") > 0
    assert ask(running, ids[:1], 60) == ours[:1]
    assert count(running, "spec_decode_num_draft_tokens") > drafted
    assert ask(running, ids, 60, ["ar", "verified"] * 3) == ours


def test_requests_in_ar_get_no_drafts(engine, prompts, ask, count) -> None:
    running = engine("stories", speculative_config=SPECULATIVE, additional_config={"twotower": {"mode": "ar"}})
    ids = prompts(2)
    ask(running, ids, 30)
    ask(running, ids, 30, ["ar", "ar"])
    assert count(running, "spec_decode_num_draft_tokens") == 0
    ask(running, ids, 30, ["verified", "ar"])
    assert count(running, "spec_decode_num_draft_tokens") > 0


def test_verified_gives_the_tokens_of_ar_through_known_beginnings_and_lost_places(
    engine, expected, prompts, ask, count
) -> None:
    running = engine("stories", speculative_config=SPECULATIVE, num_gpu_blocks_override=6)
    ids = prompts(6, most=100, seed=5)
    ours = expected("stories", ids, 120)
    assert ask(running, ids, 120) == ours
    assert ask(running, ids, 120) == ours
    assert count(running, "num_preemptions") > 0


def test_an_unknown_mode_is_refused_before_anything_runs(engine, prompts, ask) -> None:
    from vllm.exceptions import VLLMValidationError

    running = engine("stories")
    with pytest.raises(VLLMValidationError, match="mode is 'diffusion', must be ar"):
        ask(running, prompts(1), 4, ["diffusion"])
    with pytest.raises(VLLMValidationError, match="mode is 'verified', must be ar on this server"):
        ask(running, prompts(1), 4, ["verified"])


@pytest.mark.parametrize(
    ("name", "drafter", "words"),
    [
        ("stories", "denoiser", "must be of ngram and prompt in vLLM"),
        ("llama", "ngram", "must be another for a checkpoint without ngrams.npz"),
        ("hybrid", "prompt", "can't verify drafts for models with recurrent states"),
    ],
)
def test_a_drafter_that_cant_draft_here_is_refused_at_the_start(name, drafter, words, engine) -> None:
    with pytest.raises((RuntimeError, SettingError), match=words):
        engine(name, speculative_config=SPECULATIVE, additional_config={"twotower": {"drafter": drafter}})
