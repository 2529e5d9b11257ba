"""What each commit rule promises. Letters: b rows, s positions, v vocabulary."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twotower.backends.native import unmask as native
from twotower.backends.native.build import library
from twotower.backends.protocol import LogitOps
from twotower.decoding.params import SamplingParams
from twotower.decoding.sampling import Proposal
from twotower.decoding.unmasking import CommitSchedule, certainty, commit, remask, schedule, table_thresholds
from twotower.model.sampling_defaults import SamplingDefaults
from twotower.ops import unmask as reference
from twotower.ops.unmask import ranks

CPU = torch.device("cpu")
SURE_RULES = ("confidence", "margin", "entropy")
COUNTED_RULES = (*SURE_RULES, "fixed", "leftmost")
OPS: dict[str, LogitOps] = {"reference": reference} | ({} if library() is None else {"native": native})


class Rows(NamedTuple):
    sure: Tensor
    masked: Tensor
    at: CommitSchedule


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """1 to 3 rows of 1 to 17 positions, any mask with something left, any step, values with ties and at γ itself."""
    b, s = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    grid = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 0.9, 1.0]) | st.floats(0, 1, width=32)
    sure = draw(st.lists(st.lists(grid, min_size=s, max_size=s), min_size=b, max_size=b))
    masked = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=s, max_size=s), min_size=b, max_size=b)))
    steps = torch.tensor(draw(st.lists(st.integers(1, 20), min_size=b, max_size=b)))
    step = draw(st.integers(0, int(steps.min()) - 1))
    thresholds = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]), min_size=b, max_size=b)))
    bounds = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.25, 0.7, 4.0]), min_size=b, max_size=b)))
    return Rows(torch.tensor(sure), masked, CommitSchedule(step, steps, thresholds, bounds, (None,) * b))


def at_step(step: int, steps: int, threshold: float, bound: float = 0.0) -> CommitSchedule:
    """The schedule of one row."""
    return CommitSchedule(step, torch.tensor([steps]), torch.tensor([threshold]), torch.tensor([bound]), (None,))


def wanted(rule: str, r: Rows, row: int) -> int:
    """The number of commits by the definition, in plain arithmetic."""
    left, remaining = int(r.at.num_steps[row]) - r.at.step, int(r.masked[row].sum())
    if left <= 1:
        return remaining
    count = max(1, math.ceil(remaining / left))
    if rule in SURE_RULES:
        threshold = r.at.threshold[row].item()
        over = [v > threshold for v, m in zip(r.sure[row].tolist(), r.masked[row].tolist(), strict=True) if m]
        count = max(count, sum(over))
    return min(count, remaining)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("rule", COUNTED_RULES)
@settings(max_examples=30, deadline=None)
@given(rows())
def test_the_right_number_of_the_right_positions_commit(rule: str, ops: LogitOps, r: Rows) -> None:
    now = commit(rule, r.sure, r.masked, r.at, None, ops)
    assert not bool((now & ~r.masked).any())
    for row in range(len(r.masked)):
        places = r.masked[row].nonzero()[:, 0].tolist()
        if rule != "leftmost":  # the surest first, the leftmost among equals
            places.sort(key=lambda place: -r.sure[row, place].item())
        assert set(now[row].nonzero()[:, 0].tolist()) == set(places[: wanted(rule, r, row)])


@pytest.mark.parametrize("rule", COUNTED_RULES)
@settings(max_examples=15, deadline=None)
@given(rows())
def test_progress_never_stops_and_the_last_step_commits_all(rule: str, r: Rows) -> None:
    masked = r.masked
    for step in range(r.at.step, int(r.at.num_steps.max())):
        now = commit(rule, r.sure, masked, r.at._replace(step=step), None, reference)
        assert torch.equal(now.any(-1), masked.any(-1))
        masked = masked & ~now
        assert not bool(masked[r.at.num_steps <= step + 1].any())


def test_gamma_itself_is_not_enough() -> None:
    sure = torch.tensor([[0.8, 0.8, 0.81, 0.5]])
    at = at_step(0, 16, 0.8)
    assert commit("confidence", sure, torch.ones(1, 4, dtype=torch.bool), at, None, reference).tolist() == [
        [False, False, True, False]
    ]
    above = at_step(0, 16, 0.79)
    assert commit("confidence", sure, torch.ones(1, 4, dtype=torch.bool), above, None, reference).sum() == 3


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@settings(max_examples=60, deadline=None)
@given(rows())
def test_a_bounded_step_commits_the_surest_that_share_no_more_than_the_bound(ops: LogitOps, r: Rows) -> None:
    """By the definition: the most tokens of lowest entropy with Σ H − max H ≤ bound (Ben-Hamu et al. 2025)."""
    entropies = 1 - r.sure
    now = commit("entropy_bound", -entropies, r.masked, r.at, None, ops)
    for row in range(len(r.masked)):
        left, bound = int(r.at.num_steps[row]) - r.at.step, r.at.bound[row].item()
        places = r.masked[row].nonzero()[:, 0].tolist()
        places.sort(key=lambda place: entropies[row, place].item())
        count = len(places) if left <= 1 else min(len(places), max(1, math.ceil(len(places) / left)))
        for k in range(1, len(places) + 1):
            values = [entropies[row, place].item() for place in places[:k]]
            if sum(values[:-1]) <= bound:  # ascending, so that the last is the largest
                count = max(count, k)
        assert set(now[row].nonzero()[:, 0].tolist()) == set(places[:count])


def test_thresholds_of_a_table_are_those_of_the_place_and_the_number_of_masks() -> None:
    table = torch.arange(9.0).reshape(3, 3)  # of m masks in row m - 1
    found = table_thresholds((table, None, table), (1, 5, 3), torch.zeros(3, 5))
    assert found.tolist() == [[0, 1, 2, 0, 0], [0] * 5, [6, 7, 8, 0, 0]]
    assert table_thresholds((table,), (2,), torch.zeros(1, 2)).tolist() == [[3, 4]]


@settings(max_examples=30, deadline=None)
@given(rows(), st.integers(0, 10**6))
def test_posterior_commits_by_coins_alone(r: Rows, seed: int) -> None:
    torch.manual_seed(seed)
    coins = torch.rand(r.masked.shape)
    now = commit("posterior", r.sure, r.masked, r.at, coins, reference)
    for row in range(len(r.masked)):
        left = int(r.at.num_steps[row]) - r.at.step
        assert now[row].tolist() == [
            m and c < 1 / left for m, c in zip(r.masked[row].tolist(), coins[row].tolist(), strict=True)
        ]


def test_posterior_rate_is_that_of_absorbing_diffusion() -> None:
    """From t = left/T to s = (left − 1)/T a masked position opens with probability (t − s)/t."""
    torch.manual_seed(0)
    masked = torch.ones(1, 20_000, dtype=torch.bool)
    for step, steps in ((0, 4), (1, 4), (2, 4), (3, 4)):
        at = at_step(step, steps, 0.8)
        t, s = (steps - step) / steps, (steps - step - 1) / steps
        rate = commit("posterior", torch.zeros(1, 20_000), masked, at, torch.rand(1, 20_000), reference).float().mean()
        assert abs(rate - (t - s) / t) < 0.015  # 4 standard deviations of 0.0035


@settings(max_examples=30, deadline=None)
@given(rows(), st.data())
def test_remask_keeps_the_surest_and_masks_the_rest_again(r: Rows, data: st.DataObject) -> None:
    widths = [data.draw(st.integers(1, r.masked.shape[1])) for _ in r.masked]
    valid = torch.arange(r.masked.shape[1]) < torch.tensor(widths)[:, None]
    kept = remask(r.sure, valid, r.at)
    for row, width in enumerate(widths):
        steps = int(r.at.num_steps[row])
        masked = math.ceil(width * (steps - r.at.step - 1) / steps)
        places = sorted(range(width), key=lambda place: -r.sure[row, place].item())
        assert set(kept[row].nonzero()[:, 0].tolist()) == set(places[: max(1, width - masked)])


def test_certainty_of_each_rule() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 6) * 2
    logits[..., 3] = -torch.inf
    p = logits.double().softmax(-1)
    proposal = Proposal(torch.zeros(2, 3, dtype=torch.long), torch.rand(2, 3))
    ordered = p.sort(-1, descending=True).values
    torch.testing.assert_close(
        certainty("margin", logits, proposal, reference).double(),
        ordered[..., 0] - ordered[..., 1],
        rtol=1e-5,
        atol=1e-6,
    )
    entropy = torch.tensor([[-sum(v * math.log(v) for v in row if v > 0) for row in rows_] for rows_ in p.tolist()])
    own = certainty("entropy", logits, proposal, reference)
    torch.testing.assert_close(own, 1 - entropy / math.log(6), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(certainty("entropy_bound", logits, proposal, reference), -entropy, rtol=1e-5, atol=1e-6)
    for rule in ("confidence", "calibrated", "fixed", "leftmost", "posterior", "remask"):
        assert torch.equal(certainty(rule, logits, proposal, reference), proposal.confidence)


@pytest.mark.parametrize("rule", ["margin", "entropy"])
def test_certainty_is_within_its_range(rule: str) -> None:
    flat, peaked = torch.zeros(1, 1, 6), torch.tensor([[[1e4, 0, 0, 0, 0, -torch.inf]]])
    proposal = Proposal(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1))
    assert certainty(rule, flat, proposal, reference).item() == pytest.approx(0.0, abs=1e-6)
    assert certainty(rule, peaked, proposal, reference).item() == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 0.5, 1.0, -1.0]), min_size=1, max_size=17))
def test_ranks_are_a_stable_descending_order(values: list[float]) -> None:
    order = sorted(range(len(values)), key=lambda place: -values[place])
    found = ranks(torch.tensor([values]))[0].tolist()
    assert [found.index(rank) for rank in range(len(values))] == order


def test_schedule_reads_the_settings() -> None:
    params: list[dict[str, Any]] = [
        {"steps_per_block": 4, "confidence_threshold": 0.5},
        {"mode": "simulated_ar", "steps_per_block": 4, "block_size": 8},
    ]
    params.append({"commit_rule": "entropy_bound", "entropy_bound": 0.25})
    settled = tuple(SamplingParams(**p).settled(16, SamplingDefaults()) for p in params)
    at = schedule(settled, CPU).at(3)
    assert at.step == 3
    assert at.num_steps.tolist() == [4, 8, 16]
    assert at.threshold.tolist() == [0.5, pytest.approx(0.8), pytest.approx(0.8)]
    assert at.bound.tolist() == [0, 0, 0.25]
    assert at.select([2, 0]).join(at).bound.tolist() == [0.25, 0, 0, 0, 0.25]


def test_a_whole_threshold_is_a_float_to_the_kernels() -> None:
    assert schedule((SamplingParams(confidence_threshold=1),), CPU).threshold.dtype == torch.float32
