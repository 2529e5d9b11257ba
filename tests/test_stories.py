"""The shipped checkpoint: what it promises to whoever calls `twotower.load()`."""

import json
from pathlib import Path

import pytest
import torch

import twotower
from twotower.backends.native.build import library
from twotower.checkpoints.load import DEFAULT_CHECKPOINT

PROMPTS = Path(__file__).parents[1] / "benchmarks" / "stories_prompts.json"


@pytest.fixture(scope="module")
def stories() -> twotower.TwoTower:
    return twotower.load()


def test_both_towers_fit_in_35_mb() -> None:
    assert sum(f.stat().st_size for f in DEFAULT_CHECKPOINT.glob("*.safetensors")) < 35e6


@pytest.mark.parametrize("text", ["Once upon a time", "  two spaces", "naïve 🎉\n\ttabs", "", " ", "\x00\x7f", "𝔘𝔫𝔦"])
def test_tokenizer_is_lossless(stories: twotower.TwoTower, text: str) -> None:
    assert stories.tokenizer is not None
    assert stories.tokenizer.decode(stories.tokenizer.encode(text).ids) == text


def test_ar_writes_a_story(stories: twotower.TwoTower) -> None:
    params = twotower.SamplingParams(mode="ar", max_new_tokens=40)
    text = twotower.generate(stories, ["Once upon a time"], params)[0].text
    # stories15M's well-known greedy beginning
    assert text is not None
    assert text.startswith(", there was a little girl named Lily. She loved to play outside in the")


def check_tie(stories: twotower.TwoTower, prompt: tuple[int, ...], one: list[int], other: list[int]) -> None:
    """Where two texts part, both tokens are the likeliest but for the last bit of a bf16 logit."""
    at = next(n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    logits = stories.context_logits([[*prompt, *one[:at]]])[0, -1]
    assert logits[[one[at], other[at]]].min() >= logits.max() - 2**-7 * logits.max().abs()


@pytest.mark.slow
def test_verified_equals_ar_on_200_prompts(stories: twotower.TwoTower) -> None:
    beginnings = (tuple(p[:n]) for p in json.loads(PROMPTS.read_text()) for n in (17, 20, 23, 26, 29, 32))
    rows = list(dict.fromkeys(beginnings))[:200]
    assert len(rows) == 200
    ar = twotower.generate(stories, rows, twotower.SamplingParams(mode="ar", max_new_tokens=24))
    params = twotower.SamplingParams(mode="verified", drafter="denoiser", max_new_tokens=24)
    verified = twotower.generate(stories, rows, params)
    differ = [i for i in range(200) if verified[i].token_ids != ar[i].token_ids]
    if library() is not None:  # no sum depends on how many tokens a pass has
        assert not differ
        assert [g.finish_reason for g in verified] == [g.finish_reason for g in ar]
    assert len(differ) <= 10
    for i in differ:
        check_tie(stories, rows[i], ar[i].token_ids, verified[i].token_ids)
    # the drafts are worth something: more than one token a round
    assert sum(len(g.token_ids) for g in verified) > 1.5 * sum(g.stats.denoiser_calls for g in verified)


def test_denoiser_has_learnt_to_fill(stories: twotower.TwoTower) -> None:
    """Masked-token loss on text the context tower wrote greedily: an untrained copy has about 8 nats."""
    prompts = json.loads(PROMPTS.read_text())[:8]
    outs = twotower.generate(stories, prompts, twotower.SamplingParams(mode="ar", max_new_tokens=16, ignore_eos=True))
    truth = torch.tensor([g.token_ids for g in outs])
    block = truth.clone()
    block[:, ::2] = stories.config.mask_token_id
    logits = stories.denoise(block, stories.prefill(prompts))
    loss = torch.nn.functional.cross_entropy(logits[:, ::2].flatten(0, 1), truth[:, ::2].flatten())
    assert loss < 3.0


def test_counts_of_ngrams_draft_and_give_more_than_a_token_a_round(stories: twotower.TwoTower) -> None:
    """At no pass of the denoiser: the checkpoint names them as its drafter."""
    prompts = [tuple(p) for p in json.loads(PROMPTS.read_text())[:8]]
    ar, verified = (
        twotower.generate(stories, prompts, twotower.SamplingParams(mode=mode, max_new_tokens=48))
        for mode in ("ar", "verified")
    )
    if library() is not None:
        assert [g.token_ids for g in verified] == [g.token_ids for g in ar]
    assert {draft.drafter for g in verified for draft in g.stats.drafts} == {"ngram"}
    assert sum(g.stats.denoiser_calls for g in verified) == 0
    assert sum(g.stats.num_tokens for g in verified) > 1.5 * sum(g.stats.context_calls - 1 for g in verified)
