import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twotower.decoding.params import SamplingParams
from twotower.decoding.sampling import distribution, inverse_sample, propose, temper, uniforms
from twotower.ops import unmask

CPU = torch.device("cpu")


def naive(logits: list[float], p: SamplingParams) -> list[float]:
    """Temperature, then top-k, then top-p with the token that reaches it; ties by place."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if p.temperature == 0:
        return [float(i == order[0]) for i in range(len(logits))]
    kept = order[: p.top_k or len(order)]

    def weigh(indices: list[int]) -> dict[int, float]:
        top = logits[order[0]] / p.temperature
        weights = {i: math.exp(logits[i] / p.temperature - top) for i in indices}
        total = sum(weights.values())
        return {i: w / total for i, w in weights.items()}

    probabilities = weigh(kept)
    if p.top_p is not None and p.top_p < 1:
        total, nucleus = 0.0, []
        for i in kept:
            nucleus.append(i)
            total += probabilities[i]
            if total >= p.top_p:
                break
        probabilities = weigh(nucleus)
    return [probabilities.get(i, 0.0) for i in range(len(logits))]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.01, 0.5, 1.0, 1.7, 100.0]),
    top_k=st.sampled_from([None, 1, 2, 7, 12, 50]),
    top_p=st.sampled_from([None, 0.05, 0.5, 0.9, 0.999, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=4), st.integers(0, 10**6))
def test_distribution_is_the_naive_one(params: list[SamplingParams], seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(len(params), 3, 12) * 3
    logits[..., 3] = -torch.inf  # the mask token of a denoiser
    ours = distribution(logits, temper(tuple(params), 12, CPU))
    for row, p in enumerate(params):
        for position in range(3):
            expected = torch.tensor(naive(logits[row, position].tolist(), p), dtype=torch.float64)
            # float32 softmax
            torch.testing.assert_close(ours[row, position].double(), expected, rtol=1e-4, atol=1e-6)
            alone = distribution(logits[row : row + 1], temper((p,), 12, CPU))
            assert torch.equal(alone[0], ours[row])


def test_rows_without_top_p_keep_every_token_beside_rows_with_one() -> None:
    """float32 sums over a large vocabulary pass 1 early; the tail must not go."""
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 50_000).expand(3, 1, -1) * 3
    params = (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=1.0), SamplingParams(top_p=0.5))
    kept = (distribution(logits, temper(params, 50_000, CPU)) > 0).sum(-1)[:, 0]
    assert kept[:2].tolist() == [50_000, 50_000]
    assert kept[2] == 1


@pytest.mark.parametrize("temperature", [1e-6, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.randn(1, 2, 12) * 100
    probabilities = distribution(logits, temper((SamplingParams(temperature=temperature),), 12, CPU))
    assert probabilities.isfinite().all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8).filter(lambda w: sum(w) > 1e-3), st.data())
def test_inverse_sample_is_the_naive_one(weights: list[float], data: st.DataObject) -> None:
    u = data.draw(st.floats(0, 1, exclude_max=True, width=32))
    cumulative = list(itertools.accumulate(weights))
    expected = next(token for token, total in enumerate(cumulative) if u * cumulative[-1] < total)
    assert inverse_sample(torch.tensor([[weights]]), torch.tensor([[u]])).item() == expected


def test_inverse_sample_never_draws_what_has_no_weight() -> None:
    weights = torch.tensor([[[0.0, 0.3, 0.0, 0.7, 0.0]]]).expand(1, 4, 5)
    just_below_one = 1 - 2**-24
    draws = inverse_sample(weights, torch.tensor([[0.0, 0.29, 0.31, just_below_one]]))
    assert draws.tolist() == [[1, 1, 3, 3]]


def test_inverse_sample_follows_the_distribution() -> None:
    torch.manual_seed(0)
    weights = torch.tensor([0.1, 0.4, 0.0, 0.5])
    draws = inverse_sample(weights.expand(1, 20_000, 4), torch.rand(1, 20_000))
    frequencies = draws.flatten().bincount(minlength=4) / 20_000
    assert (frequencies - weights).abs().max() < 0.015  # 4 standard deviations of 0.0035


def test_propose_gives_argmax_or_sample_and_the_unscaled_probability() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 12) * 2
    params = (SamplingParams(), SamplingParams(temperature=1.3, top_k=4))
    settings_ = temper(params, 12, CPU)
    draws = torch.rand(2, 5)
    tokens, confidence = propose(logits, settings_, draws, unmask)
    assert torch.equal(tokens[0], logits[0].argmax(-1))
    assert torch.equal(tokens[1], inverse_sample(distribution(logits, settings_), draws)[1])
    expected = logits.softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(confidence, expected)
    greedy = propose(logits, temper((SamplingParams(), SamplingParams(top_k=3)), 12, CPU), None, unmask)
    assert torch.equal(greedy.tokens, logits.argmax(-1))


def draw(*where: int) -> Tensor:
    return uniforms(*where)


def test_uniforms_depend_on_their_place_alone() -> None:
    first = draw(7, 100, 3, 16)
    torch.rand(100)
    assert torch.equal(draw(7, 100, 3, 16), first)
    assert torch.equal(draw(7, 100, 3, 5), first[:5])
    assert bool(((first >= 0) & (first < 1)).all())


def test_uniforms_differ_between_places() -> None:
    places = {(s, p, t) for s in (0, 1, 2, 2**40, 2**63 - 1) for p in (0, 1, 2, 100) for t in (0, 1, 2, 1 << 20)}
    values = {tuple(draw(*where, 4).tolist()) for where in places}
    assert len(values) == len(places)
    everything = torch.cat([draw(*where, 50) for where in places])
    assert abs(everything.mean() - 0.5) < 0.02  # 4 standard deviations of 0.0046


def test_select_keeps_each_rows_settings() -> None:
    params = (SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(temperature=2.0, top_p=0.3))
    logits = torch.randn(3, 2, 12)
    everything = temper(params, 12, CPU)
    chosen = everything.select([2, 0])
    torch.testing.assert_close(
        distribution(logits[[2, 0]], chosen), distribution(logits, everything)[[2, 0]], rtol=0, atol=0
    )
