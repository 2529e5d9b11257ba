"""`verified` inside vLLM: drafts from n-grams and from the text, checked by vLLM, give the tokens of `ar`."""

import importlib.util

import pytest

import twotower
from twotower.errors import SettingError
from twotower.integrations.vllm.settings import DRAFTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
SPECULATIVE = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 8}


@pytest.mark.parametrize(
    ("name", "drafter"),
    [
        ("stories", "ngram"),
        ("stories", "prompt,ngram"),
        ("llama", "prompt"),
        ("hybrid", "prompt"),
        ("M*-M*E", "prompt"),
    ],
)
def test_verified_alone_and_mixed_with_ar_gives_the_tokens_of_ar(
    name, drafter, engine, expected, prompts, ask, count
) -> None:
    running = engine(name, speculative_config=SPECULATIVE, additional_config={"twotower": {"drafter": drafter}})
    ids = prompts(6, most=20)
    ours = expected(name, ids, 60)
    assert ask(running, ids, 60) == ours
    drafted = count(running, "spec_decode_num_draft_tokens")
    assert drafted > 0
    # A random tower with experts repeats nothing that it has written: its drafts are all rejected.
    assert (count(running, "spec_decode_num_accepted_tokens") > 0) == (name != "M*-M*E")
    assert ask(running, ids[:1], 60) == ours[:1]
    assert ask(running, ids, 60, ["ar", "verified"] * 3) == ours


@pytest.mark.parametrize(
    ("name", "drafter"), [("stories", "denoiser"), ("llama", "denoiser"), ("stories", "prompt,denoiser")]
)
def test_verified_with_drafts_from_the_denoiser_gives_the_tokens_of_ar_beside_other_modes(
    name, drafter, engine, expected, prompts, ask, count
) -> None:
    settings = {"twotower": {"drafter": drafter, "denoiser": True}}
    running = engine(name, speculative_config=SPECULATIVE, additional_config=settings)
    ids = prompts(6, most=20)
    ours, blocks = expected(name, ids, 60), expected(name, ids, 60, "diffusion")
    assert ask(running, ids, 60) == ours
    assert count(running, "spec_decode_num_accepted_tokens") > 0
    assert ask(running, ids[:1], 60) == ours[:1]
    mixed = ask(running, ids, 60, ["ar", "verified", "diffusion"] * 2)
    assert mixed == [blocks[n] if n % 3 == 2 else ours[n] for n in range(6)]


def test_as_many_drafted_tokens_are_kept_as_in_our_own_verified(engine, prompts, ask, count, checkpoint) -> None:
    settings = {"twotower": {"drafter": "denoiser", "denoiser": True}}
    running = engine(
        "stories", speculative_config=SPECULATIVE | {"num_speculative_tokens": 15}, additional_config=settings
    )
    model = twotower.load("stories", dtype="float32")
    ids = list(model.tokenizer.encode("Once upon a time").ids)
    common = {"max_new_tokens": 100, "temperature": 0, "ignore_eos": True}
    [ours] = twotower.generate(model, [ids], twotower.SamplingParams(mode="verified", drafter="denoiser", **common))
    ask(running, [ids], 100)
    kept = sum(one.accepted for one in ours.stats.drafts)
    # The first block is another: ours begins before the first token, vLLM's behind it.
    assert abs(count(running, "spec_decode_num_accepted_tokens") - kept) <= 8


def test_requests_in_ar_get_no_drafts(engine, prompts, ask, count) -> None:
    running = engine("stories", speculative_config=SPECULATIVE, additional_config={"twotower": {"mode": "ar"}})
    ids = prompts(2)
    ask(running, ids, 30)
    ask(running, ids, 30, ["ar", "ar"])
    assert count(running, "spec_decode_num_draft_tokens") == 0
    ask(running, ids, 30, ["verified", "ar"])
    assert count(running, "spec_decode_num_draft_tokens") > 0


def test_a_schedule_by_batch_size_shortens_drafts_and_leaves_the_tokens(engine, expected, prompts, ask, count) -> None:
    schedule = {"num_speculative_tokens_per_batch_size": [[1, 2, 8], [3, 4, 1], [5, 8, 0]]}
    running = engine("stories", speculative_config=SPECULATIVE | schedule)
    ids = prompts(6, most=20)
    ours = expected("stories", ids, 60)
    longest = []
    for number in (2, 4, 6):
        before = [count(running, f"spec_decode_num_{what}") for what in ("drafts", "draft_tokens")]
        assert ask(running, ids[:number], 60) == ours[:number]
        after = [count(running, f"spec_decode_num_{what}") for what in ("drafts", "draft_tokens")]
        drafts, tokens = after[0] - before[0], after[1] - before[1]
        longest.append(tokens / max(drafts, 1))
    assert longest[0] > 1.5
    # A row whose neighbours have ended is in a smaller batch
    assert longest[1] < longest[0]
    assert longest[2] < longest[0]


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


def test_the_denoiser_is_refused_beside_drafts_for_recurrent_states(engine) -> None:
    settings = {"twotower": {"drafter": "prompt", "denoiser": True}}
    with pytest.raises(ValueError, match="the denoiser needs no --speculative-config beside recurrent states"):
        engine("M*-", speculative_config=SPECULATIVE, additional_config=settings)


@pytest.mark.parametrize(
    ("name", "drafter", "words"),
    [
        ("stories", "denoiser", "must be of ngram and prompt on a server without the denoiser"),
        ("llama", "ngram", "must be another for a checkpoint without ngrams.npz"),
        ("hybrid", "denoiser", "must be of ngram and prompt on a server without the denoiser"),
    ],
)
def test_a_drafter_that_cant_draft_here_is_refused_at_the_start(name, drafter, words, engine) -> None:
    with pytest.raises((RuntimeError, SettingError), match=words):
        engine(name, speculative_config=SPECULATIVE, additional_config={"twotower": {"drafter": drafter}})
