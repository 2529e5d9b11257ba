import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from twotower.decoding import verified
from twotower.decoding.drafting.draft import Draft, VerifiedRows
from twotower.decoding.drafting.propose import propose_draft
from twotower.decoding.drafting.written import Written
from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.decoding.sampling import distribution, temper
from twotower.decoding.shaping import shaping
from twotower.decoding.step import Request, read, step
from twotower.decoding.verified import Verdict
from twotower.model.sampling_defaults import SamplingDefaults
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower

CPU = torch.device("cpu")
# float32 sums in another order
CLOSE = 1e-5
PROMPT = [9, 8, 7, 4, 6]


def rows(
    model: TwoTower, prompts: Sequence[Sequence[int]], params: SamplingParams, newest: Sequence[int]
) -> VerifiedRows:
    """RowBatch whose prompts are absorbed; `newest` holds each row's one token after the prompt, or nothing."""
    params = params.settled(16, SamplingDefaults())
    table = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        table[row, : len(prompt)] = torch.tensor(prompt)
    context = model.prefill(table, [len(p) for p in prompts])
    requests = tuple(Request(tuple(p), params, seed) for seed, p in enumerate(prompts))
    settings = temper((params,) * len(prompts), model.config.vocab_size, CPU)
    shape = shaping(model, requests, CPU)
    written = tuple(Written.of([*p, *newest[row : row + 1]]) for row, p in enumerate(prompts))
    return VerifiedRows(requests, context, settings, shape, (len(newest) and 1,) * len(prompts), written, tuple(newest))


def greedy_draft(ids: Tensor) -> Draft:
    b, s = ids.shape
    return Draft(ids, (s,) * b, ("denoiser",) * b)


def drawn_draft(ids: Tensor, probabilities: Tensor) -> Draft:
    b, s = ids.shape
    return Draft(ids, (s,) * b, ("denoiser",) * b, tuple(range(b)), probabilities)


class Verified(NamedTuple):
    """What the context tower decided, and its state with what was accepted."""

    verdict: Verdict
    context: ContextState


def verify(model: TwoTower, batch: VerifiedRows, draft: Draft) -> Verified:
    judged = verified.judge(model, batch, draft)
    [values] = read([judged])
    found = verified.verdict(values, draft, batch.num_known, counts_apart=judged.counts_apart)
    return Verified(found, model.accept(judged.scored, found.accepted))


def same_state(model: TwoTower, ours: ContextState, tokens: list[int], close: Callable) -> None:
    fresh = model.prefill([tokens])
    assert ours.lengths == fresh.lengths
    for a, b in zip(ours.mamba, fresh.mamba, strict=True):
        close(a.conv, b.conv, CLOSE)
        close(a.ssm, b.ssm, CLOSE)
    for a, b in zip(ours.buffer.keys + ours.buffer.values, fresh.buffer.keys + fresh.buffer.values, strict=True):
        close(a[:, :, : len(tokens)], b[:, :, : len(tokens)], CLOSE)


@pytest.mark.parametrize("adaptive_draft", [True, False])
@pytest.mark.parametrize(
    ("pattern", "layers"),
    [(p, None) for p in ("M", "*", "G*-", "S*-", "R*-", "M*-E", "MEM*MEM*E", "llama")]
    + [("MEM*MEM*E", (0, 3, 7, 8)), ("llama", (2, 3))],
)
def test_greedy_is_ar_token_for_token(
    pattern: str, layers: tuple[int, ...] | None, adaptive_draft: bool, tiny: Callable
) -> None:
    """Six words, so that drafts are often right; ragged rows, so that they are right at different places."""
    model, accepted = tiny(pattern, vocab_size=6, seed=1, denoiser_layers=layers), 0
    prompts = [[4], [5, 0, 1], [2] * 9, [4, 1, 5, 2, 0] * 4]
    ar = generate(model, prompts, SamplingParams(mode="ar", max_new_tokens=24))
    for block_size in (1, 2, 5, 16):
        params = SamplingParams(
            mode="verified", max_new_tokens=24, block_size=block_size, adaptive_draft=adaptive_draft
        )
        for ours, theirs in zip(generate(model, prompts, params), ar, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.confidences == pytest.approx(theirs.confidences, rel=1e-4)
            accepted += 24 - ours.stats.denoiser_calls
    assert accepted > 0


@pytest.mark.parametrize("mode", ["verified", "diffusion", "simulated_ar", "mock_ar"])
def test_a_denoiser_of_all_layers_by_name_is_the_usual_one(mode: Any, tiny: Callable) -> None:
    prompts, params = [[4], [5, 0, 1] * 4], SamplingParams(mode=mode, max_new_tokens=16, block_size=5)
    usual, named = tiny("M*-E", vocab_size=6), tiny("M*-E", vocab_size=6, denoiser_layers=(0, 1, 2, 3))
    for ours, theirs in zip(generate(named, prompts, params), generate(usual, prompts, params), strict=True):
        assert (ours.token_ids, ours.confidences) == (theirs.token_ids, theirs.confidences)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "known"), [("M*-E", False), ("M*-E", True), ("llama", True)])
def test_rejection_at_every_offset(pattern: str, known: bool, tiny: Callable, close: Callable) -> None:
    model, params = tiny(pattern), SamplingParams(mode="verified", max_new_tokens=100, adaptive_draft=False)
    ar = generate(model, [PROMPT], dataclasses.replace(params, mode="ar", max_new_tokens=40))[0].token_ids
    newest = ar[:1] if known else []
    for offset in range(len(newest), 17):
        batch = rows(model, [PROMPT], params, newest)
        draft = torch.tensor([ar[:16]])
        if offset < 16:
            draft[0, offset] = (draft[0, offset] + 1) % 40
        verdict, context = verify(model, batch, greedy_draft(draft))
        assert verdict.accepted == (offset,)
        assert verdict.bonus == (ar[offset],)
        same_state(model, context, PROMPT + ar[:offset], close)
        after = dataclasses.replace(batch, context=context, produced=(offset + 1,), newest=verdict.bonus)
        tokens = ar[: offset + 1]
        for _ in range(3):
            stepped = step(verified, model, after)
            tokens, after = tokens + [t.id for t in stepped.tokens[0]], stepped.rows
        assert tokens == ar[: len(tokens)]
        same_state(model, after.context, PROMPT + tokens[:-1], close)


def test_a_draft_grows_with_what_was_accepted(tiny: Callable) -> None:
    model, params = tiny("M*-E", vocab_size=6, seed=2), SamplingParams(mode="verified", max_new_tokens=200)
    batch, lengths = rows(model, [[4], [5, 0, 1], [2] * 9], params, []), []
    for _ in range(12):
        widths, stepped = propose_draft(model, batch).widths, step(verified, model, batch)
        batch = stepped.rows
        for width, tokens, draft in zip(widths, stepped.tokens, propose_draft(model, batch).widths, strict=True):
            expected = 2 * width if len(tokens) >= width else len(tokens) + 2
            assert draft == min(expected, 16)
            lengths.append(draft)
    assert len(set(lengths)) > 2, "some drafts were kept, some not"
    fixed = dataclasses.replace(params, adaptive_draft=False)
    assert propose_draft(model, rows(model, [[4]], fixed, [5])).widths == (16,)


def test_a_request_made_anew_goes_on_with_its_draft(tiny: Callable) -> None:
    """At a temperature the tokens depend on the draft's length: whoever drops the state must keep it."""
    model = tiny("M*-E", vocab_size=6, seed=1)
    params = SamplingParams(mode="verified", max_new_tokens=40, block_size=16, temperature=1.0)
    request, produced = Request((4, 1), params, seed=3), ()
    never_stopped = generate(model, [[4, 1]], dataclasses.replace(params, seed=3))[0].token_ids
    while len(produced) < 40:
        request = request._replace(produced=produced)
        context = model.prefill([verified.context_ids(request)])
        stepped = step(verified, model, verified.start(model, (request,), context))
        produced += tuple(t.id for t in stepped.tokens[0])
        request = stepped.rows.requests[0]
    assert list(produced) == never_stopped


def test_rows_reject_at_their_own_offsets(tiny: Callable, close: Callable) -> None:
    model, params = (
        tiny("M*-E"),
        SamplingParams(mode="verified", max_new_tokens=100, block_size=8, adaptive_draft=False),
    )
    prompts = [[9, 8], [7] * 70, [4, 5, 6]]
    continuations = [
        g.token_ids for g in generate(model, prompts, dataclasses.replace(params, mode="ar", max_new_tokens=9))
    ]
    draft = torch.tensor([c[:8] for c in continuations])
    for row, offset in ((0, 0), (1, 5)):
        draft[row, offset] = (draft[row, offset] + 1) % 40
    verdict, context = verify(model, rows(model, prompts, params, []), greedy_draft(draft))
    assert verdict.accepted == (0, 5, 8)
    assert verdict.bonus == tuple(c[n] for c, n in zip(continuations, (0, 5, 8), strict=True))
    for row, offset in enumerate((0, 5, 8)):
        same_state(model, context.select([row]), prompts[row] + continuations[row][:offset], close)


def test_a_draft_never_looks_to_the_right_or_at_other_drafts(tiny: Callable) -> None:
    """Speculative sampling is exact only if q is fixed before anything to the right is drawn: one step over masks."""
    model = tiny("M*-E", vocab_size=8)
    params = SamplingParams(mode="verified", max_new_tokens=50, block_size=6, temperature=1.0, adaptive_draft=False)
    batch = rows(model, [[4, 5]] * 2, params, [])  # two seeds, so two different drafts
    draft = propose_draft(model, batch)
    assert not torch.equal(draft.ids[0], draft.ids[1])
    torch.testing.assert_close(draft.probabilities[0], draft.probabilities[1])
    assert not draft.probabilities[..., model.config.mask_token_id].any()


@pytest.mark.parametrize(("wanted", "first", "later"), [(1, 1, None), (2, 1, 1), (5, 4, 4), (6, 5, 5), (50, 6, 6)])
def test_a_draft_is_no_longer_than_what_may_be_used(wanted: int, first: int, later: int | None, tiny: Callable) -> None:
    """The token after the draft is free; from the second round on the newest token fills the first place."""
    model, params = (
        tiny("*"),
        SamplingParams(mode="verified", max_new_tokens=wanted, block_size=6, adaptive_draft=False),
    )
    assert propose_draft(model, rows(model, [PROMPT], params, [])).ids.shape == (1, first)
    if later is not None:
        assert propose_draft(model, rows(model, [PROMPT], params, [5])).ids.shape == (1, later)


def test_probabilities_of_one_draft_decide_between_accept_and_residual(tiny: Callable) -> None:
    """With q = p everything is accepted; with q on one impossible token nothing is, and p itself is sampled."""
    model = tiny("M*-E", vocab_size=8)
    params = SamplingParams(mode="verified", max_new_tokens=50, block_size=4, temperature=1.0)
    batch = rows(model, [[4, 5]], params, [])
    ids = torch.tensor([[1, 2, 0, 5]])
    logits = torch.cat((batch.context.next_logits[:, None], model.context_logits([[4, 5, 1, 2, 0, 5]])[:, 2:]), 1)
    p = logits.softmax(-1)
    verdict, _ = verify(model, batch, drawn_draft(ids, p[:, :4]))
    assert verdict.accepted == (4,)
    torch.testing.assert_close(torch.tensor(verdict.confidence[0][:4]), p[0, range(4), ids[0]], rtol=1e-4, atol=1e-6)
    narrow = SamplingParams(mode="verified", max_new_tokens=50, block_size=4, temperature=1.0, top_k=1)
    batch = rows(model, [[4, 5]], narrow, [])
    worst = p[0, 0].argmin()
    one_hot = torch.nn.functional.one_hot(worst.expand(1, 4), 8).float()
    verdict, _ = verify(model, batch, drawn_draft(worst.expand(1, 4), one_hot))
    assert verdict.accepted == (0,)
    assert verdict.bonus == (int(p[0, 0].argmax()),)


def exact(model: TwoTower, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every continuation under `ar`, by enumeration."""
    sequences = list(itertools.product(range(model.config.vocab_size), repeat=params.max_new_tokens))
    logits = model.context_logits([prompt + list(s) for s in sequences])[:, len(prompt) - 1 :]
    p = distribution(logits, temper((params,) * len(sequences), model.config.vocab_size, CPU)).double()
    tokens = torch.tensor(sequences)
    product = p[:, : tokens.shape[1]].gather(-1, tokens.unsqueeze(-1)).squeeze(-1).prod(-1)
    return dict(zip(sequences, product.tolist(), strict=True))


def sampled(model: TwoTower, prompt: list[int], params: SamplingParams, num: int) -> collections.Counter:
    seeded = [dataclasses.replace(params, seed=seed) for seed in range(num)]
    return collections.Counter(tuple(g.token_ids) for g in generate(model, [prompt] * num, seeded))


NUM = 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "changed"),
    [
        ("M*-", {"temperature": 1.0}),
        ("llama", {"temperature": 1.0, "block_size": 2}),
        ("M*-", {"temperature": 0.7}),
        ("llama", {"temperature": 1.5, "top_k": 4}),
        ("M*-", {"temperature": 1.0, "top_p": 0.85}),
        ("llama", {"temperature": 2.0, "block_size": 1}),
    ],
)
def test_sampling_is_distributed_as_ar(
    pattern: str, changed: dict[str, Any], tiny: Callable, chi_square: Callable
) -> None:
    """Chi-square against the exact distribution of three tokens over six words, seeds fixed.

    A first round that accepts nothing starts where the next one does: their corrections must not share a draw.
    """
    model, prompt = tiny(pattern, vocab_size=6), [4, 5]
    params = SamplingParams(**{"mode": "verified", "max_new_tokens": 3, "block_size": 4} | changed)
    found = chi_square(sampled(model, prompt, params, NUM), exact(model, prompt, params), NUM)
    assert found.degrees >= 5
    assert found.p_value > 1e-3


@pytest.mark.slow
def test_the_chi_square_test_finds_wrong_acceptance(
    tiny: Callable, chi_square: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of the drafter's distribution, or a correction from p instead of (p − q)⁺, are found."""
    model, prompt = tiny("M*-", vocab_size=6), [4, 5]
    params = SamplingParams(mode="verified", max_new_tokens=3, block_size=4, temperature=1.0)
    right = exact(model, prompt, params)
    drafter = propose_draft(model, rows(model, [prompt], params, [])).probabilities[0, 0].double()
    firsts = collections.Counter(s[0] for s in sampled(model, prompt, params, NUM).elements())
    assert chi_square(firsts, dict(enumerate(drafter.tolist())), NUM).p_value < 1e-6

    def uncorrected(rows: VerifiedRows, draft: Draft, p: Tensor, accepted: Tensor) -> Tensor:
        if draft.probabilities is not None:
            draft = draft._replace(probabilities=torch.zeros_like(draft.probabilities))
        return correction(rows, draft, p, accepted)

    correction = verified._correction
    monkeypatch.setattr(verified, "_correction", uncorrected)
    assert chi_square(sampled(model, prompt, params, NUM), right, NUM).p_value < 1e-6
