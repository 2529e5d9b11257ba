"""Every drafter leaves `verified` what `ar` writes, at temperature 0 and above, alone and beside others."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from twotower.decoding import verified
from twotower.decoding.drafters import DRAFTERS, DrafterName, draft_sources
from twotower.decoding.drafting import denoiser
from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.decoding.sampling import distribution, temper
from twotower.decoding.step import Request
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.errors import SettingError
from twotower.model.sampling_defaults import SamplingDefaults

CHAINS = ["denoiser", "ngram", "prompt", "prompt,ngram", "ngram,prompt", "prompt,ngram,denoiser", "ngram, denoiser"]
PROMPTS = [[4], [5, 0, 1], [2] * 9, [4, 1, 5, 2, 0] * 4, [3, 3, 1]]


def test_the_table_has_every_drafter() -> None:
    assert tuple(DRAFTERS) == get_args(DrafterName)
    assert all(source.name == name and source.summary.endswith(".") for name, source in DRAFTERS.items())
    assert [s.name for s in draft_sources("prompt, ngram")] == ["prompt", "ngram"]


@pytest.mark.parametrize("drafter", ["", "ngrams", "prompt;ngram", "prompt,,ngram", "prompt,prompt", ","])
def test_a_drafter_that_is_none_is_refused_with_the_choices(drafter: str) -> None:
    with pytest.raises(SettingError, match=r"drafter is .*must be one of denoiser, ngram, prompt"):
        SamplingParams(mode="verified", drafter=drafter)


def test_a_drafter_is_refused_where_nothing_drafts_and_where_its_counts_are_missing(tiny: Callable) -> None:
    with pytest.raises(SettingError, match="left out in mode 'diffusion'; only modes 'verified' and 'auto' draft"):
        SamplingParams(mode="diffusion", drafter="prompt")
    params = SamplingParams(mode="verified", drafter="prompt,ngram")
    with pytest.raises(SettingError, match=r"made of denoiser, prompt: the checkpoint has no counts.*twotower ngrams"):
        generate(tiny("M*-E"), [[4]], params)


def test_the_checkpoint_says_which_drafter_runs_where_nobody_asks(tiny: Callable, with_ngrams: Callable) -> None:
    model = with_ngrams(tiny("M*-E", vocab_size=6))
    params = SamplingParams(mode="verified", max_new_tokens=20)

    def ran(params: SamplingParams) -> set[str]:
        return {count.drafter for count in generate(model, [[4]], params)[0].stats.drafts}

    assert ran(params) == {"denoiser"}
    model.sampling = SamplingDefaults(drafter="ngram")
    assert ran(params) == {"ngram"}
    assert ran(dataclasses.replace(params, drafter="denoiser")) == {"denoiser"}
    assert generate(model, [[4]], SamplingParams(max_new_tokens=20))[0].stats.drafts == ()


@pytest.mark.parametrize("drafter", CHAINS)
@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
def test_greedy_is_ar_token_for_token(pattern: str, drafter: str, tiny: Callable, with_ngrams: Callable) -> None:
    model = with_ngrams(tiny(pattern, vocab_size=6, seed=1))
    ar = generate(model, PROMPTS, SamplingParams(mode="ar", max_new_tokens=40))
    for block_size in (1, 2, 5, 16):
        params = SamplingParams(mode="verified", max_new_tokens=40, block_size=block_size, drafter=drafter)
        found = generate(model, PROMPTS, params)
        for ours, theirs in zip(found, ar, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.confidences == pytest.approx(theirs.confidences, rel=1e-4)
    drafts = [count for ours in found for count in ours.stats.drafts]
    assert {count.drafter for count in drafts} <= {name.strip() for name in drafter.split(",")}
    assert sum(count.accepted for count in drafts) > 20


@pytest.mark.parametrize("drafter", CHAINS)
def test_counts_say_what_drafts_gave(drafter: str, tiny: Callable, with_ngrams: Callable) -> None:
    model = with_ngrams(tiny("M*-E", vocab_size=6, seed=1))
    params = SamplingParams(mode="verified", max_new_tokens=40, drafter=drafter, block_size=6)
    [result] = generate(model, [[5, 0, 1]], params)
    stats = result.stats
    rounds = stats.context_calls - 1  # without the prompt's
    assert all(0 <= count.accepted <= count.drafted <= 6 * count.rounds for count in stats.drafts)
    assert sum(count.rounds for count in stats.drafts) <= rounds
    # every round gives the accepted tokens and one more; the first round's placeholder is no draft but may be kept
    gained = sum(count.accepted for count in stats.drafts) + rounds
    assert gained <= 40 <= gained + 1
    by_denoiser = sum(count.rounds for count in stats.drafts if count.drafter == "denoiser")
    assert stats.denoiser_calls == by_denoiser


def test_an_end_of_text_ends_a_draft_unless_it_is_ignored(tiny: Callable, with_ngrams: Callable) -> None:
    model = with_ngrams(tiny("M*-E", vocab_size=6, seed=1, eos_token_id=(2,)))
    for ignore_eos in (False, True):
        params = SamplingParams(mode="verified", max_new_tokens=40, drafter="prompt", ignore_eos=ignore_eos)
        request = Request((4, 5, 2, 1, 0, 4, 5), params.settled(16, SamplingDefaults()), 0)
        rows = verified.start(model, (request,), model.prefill([list(request.prompt_ids)]))
        draft = DRAFTERS["prompt"].drafter.propose(model, rows, [0])
        # what followed "4 5" before, up to twice the matched pair
        assert draft.ids.tolist() == [[2, 1, 0, 4] if ignore_eos else [2]]


def test_prompt_lookup_takes_the_longest_match_and_goes_on_with_its_period(tiny: Callable) -> None:
    model = tiny("M*-E", vocab_size=20)

    def draft(*prompt: int) -> list[int]:
        params = SamplingParams(mode="verified", max_new_tokens=40, drafter="prompt")
        request = Request(prompt, params.settled(16, SamplingDefaults()), 0)
        rows = verified.start(model, (request,), model.prefill([list(prompt)]))
        proposal = DRAFTERS["prompt"].drafter.propose(model, rows, [0])
        assert proposal.blocks == (proposal.ids[0, : proposal.widths[0]].tolist(),)
        return proposal.blocks[0]

    assert draft(1, 2, 3) == []
    assert draft(7) == []
    # the pair (2, 3) stood twice before; the earlier place agrees in one more token
    assert draft(1, 2, 3, 8, 9, 9, 9, 9, 5, 2, 3, 6, 1, 2, 3) == [8, 9, 9, 9, 9, 5]
    assert draft(5, 6, 7, 5, 6, 7, 5, 6) == [7, 5, 6, 7, 5, 6, 7, 5, 6, 7][:10]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_different_drafters_are_what_each_is_alone(
    temperature: float, tiny: Callable, with_ngrams: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch of `generate` and in an engine; the denoiser runs for the rows that need it and for no other."""
    model = with_ngrams(tiny("M*-E", vocab_size=6, seed=1))
    chains = [None, *CHAINS]
    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(len(chains))]
    params = [
        SamplingParams(mode="verified", max_new_tokens=24 + n, drafter=d, temperature=temperature, seed=n, block_size=7)
        for n, d in enumerate(chains)
    ]
    alone = [generate(model, [prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    asked: list[int] = []
    propose = denoiser.propose
    monkeypatch.setattr(denoiser, "propose", lambda m, rows, at: asked.append(len(at)) or propose(m, rows, at))
    together = generate(model, prompts, params)
    assert sum(asked) == sum(g.stats.denoiser_calls for g in together)
    in_engine = Engine(model, EngineConfig(state_bytes=1 << 20, max_num_requests=5)).generate(prompts, params)
    for one, other, third in zip(alone, together, in_engine, strict=True):
        assert one.token_ids == other.token_ids == third.token_ids
        assert one.stats.drafts == other.stats.drafts == third.stats.drafts


NUM = 1000


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["ngram", "prompt", "prompt,ngram,denoiser"])
@pytest.mark.parametrize("changed", [{"temperature": 1.0}, {"temperature": 1.5, "top_k": 4}])
def test_sampling_is_distributed_as_ar(
    drafter: str, changed: dict[str, Any], tiny: Callable, with_ngrams: Callable, chi_square: Callable
) -> None:
    """A draft without a distribution is one point: accepted with p of it, and else p without it is sampled from."""
    import itertools

    model, prompt = with_ngrams(tiny("M*-", vocab_size=6)), [4, 5, 4, 5]
    params = SamplingParams(mode="verified", max_new_tokens=3, block_size=4, drafter=drafter, **changed)
    sequences = list(itertools.product(range(6), repeat=3))
    logits = model.context_logits([prompt + list(s) for s in sequences])[:, len(prompt) - 1 :]
    p = distribution(logits, temper((params,) * len(sequences), 6, torch.device("cpu"))).double()
    product = p[:, :3].gather(-1, torch.tensor(sequences).unsqueeze(-1)).squeeze(-1).prod(-1)
    seeded = [dataclasses.replace(params, seed=seed) for seed in range(NUM)]
    done = generate(model, [prompt] * NUM, seeded)
    assert sum(count.drafted for g in done for count in g.stats.drafts) > NUM / 2
    expected = dict(zip(sequences, product.tolist(), strict=True))
    found = chi_square(collections.Counter(tuple(g.token_ids) for g in done), expected, NUM)
    assert found.degrees >= 5
    assert found.p_value > 1e-3


@pytest.mark.slow
def test_the_chi_square_test_finds_a_residual_with_the_draft_in_it(
    tiny: Callable, with_ngrams: Callable, chi_square: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    correction = verified._correction

    def uncorrected(rows: Any, draft: Any, p: torch.Tensor, accepted: torch.Tensor) -> torch.Tensor:
        everywhere = p.new_zeros(*draft.ids.shape, p.shape[-1])
        drawn = draft._replace(drawn=tuple(range(len(draft.widths))), probabilities=everywhere)
        return correction(rows, drawn, p, accepted)

    monkeypatch.setattr(verified, "_correction", uncorrected)
    with pytest.raises(AssertionError):
        test_sampling_is_distributed_as_ar("ngram", {"temperature": 1.0}, tiny, with_ngrams, chi_square)
