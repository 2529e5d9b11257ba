"""Which places each kind of masks hides, and that it depends on the seed and the row alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.training.config import Share
from twotower.training.masks.mixing import with_states
from twotower.training.masks.noise import MIN_LEVEL, Corrupted, Noise, corrupt

S = 8


def masked(
    x0: Tensor, *shares: Share, first: int = 0, seed: int = 0, later: bool = False, known: Any = None
) -> Corrupted:
    samples, scored = torch.arange(first, first + len(x0)), torch.arange(x0.shape[1]) >= 3
    noise: Any = {"seed": seed, "noise": Noise(), "block_size": S, "mask_token_id": 3}
    noisy = corrupt(x0, scored.expand_as(x0), samples, **noise)
    settings: Any = {"seed": seed, "mask_token_id": 3, "later": later, "known_from": known}
    return with_states(noisy, x0, samples, shares=shares, **settings)


def blocks(found: Corrupted) -> list[list[bool]]:
    """The masks of each block's scored places."""
    cut = []
    for row, masks in enumerate(found.masked):
        block, scored = found.layout.block[row % len(found.scored)], found.scored[row % len(found.scored)]
        cut += [masks[(block == index) & scored].tolist() for index in block.unique()]
    return [block for block in cut if block]


def test_drafting_knows_the_first_place(ids: Callable) -> None:
    found = masked(ids(6, 40), Share("drafting", 1.0))
    assert all(block == [False] + [True] * (len(block) - 1) for block in blocks(found))
    whole = found.layout.block_end - found.layout.block_start == S
    inner = whole & (found.layout.block_start >= 3)
    assert set(found.level[inner].tolist()) == {7 / 8}
    assert (found.told[inner] - 7 / 8).abs().max() < 1e-2
    assert torch.equal(found.xt == 3, found.masked)


def test_prefixes_are_of_all_lengths(ids: Callable) -> None:
    found = [block for block in blocks(masked(ids(60, 40), Share("prefix", 1.0))) if len(block) == S]
    lengths = [block.index(True) for block in found]
    assert all(all(block[n:]) for block, n in zip(found, lengths, strict=True))
    assert all(lengths.count(n) == pytest.approx(len(found) / S, rel=0.5) for n in range(S))


def test_a_trajectory_s_states_are_equally_likely(ids: Callable) -> None:
    x0 = ids(60, 40)
    order = torch.tensor([1, 3, 1, 2, 1, 1, 2, 1])  # known after so many passes: states of 8, 3 and 1 masks

    def known() -> Tensor:
        noisy = masked(x0, Share("prefix", 1.0))
        place = torch.arange(40) - noisy.layout.block_start
        return torch.where(noisy.scored, order[place], 0)

    found = [block for block in blocks(masked(x0, Share("trajectory", 1.0), known=known)) if len(block) == S]
    states = [tuple(bool(n > made) for n in order.tolist()) for made in range(3)]
    assert set(map(tuple, found)) == set(states)
    assert all(list(map(tuple, found)).count(s) == pytest.approx(len(found) / 3, rel=0.3) for s in states)
    both = masked(x0, Share("trajectory", 1.0), known=known, later=True)
    early, late = (map(tuple, blocks(both._replace(masked=part))) for part in both.masked.chunk(2))
    pairs = {pair for pair in zip(early, late, strict=True) if len(pair[0]) == S}
    assert pairs == set(zip(states, [*states[1:], (False,) * S], strict=True))


def test_a_later_state_knows_more(ids: Callable) -> None:
    shares = [Share(name, 1.0) for name in ("noise", "drafting", "prefix")]
    found = masked(ids(20, 40), *shares, later=True)
    early, late = found.masked.chunk(2)
    assert not (late & ~early).any()
    assert 0.3 < late.sum() / early.sum() < 0.7
    after = found.level.chunk(2)[1]
    assert torch.equal(early, masked(ids(20, 40), *shares).masked)
    assert after.min() == pytest.approx(MIN_LEVEL)


def test_kinds_come_in_their_shares_and_noise_stays_what_it_was(ids: Callable) -> None:
    x0 = ids(200, 40)
    plain = masked(x0, Share("noise", 1.0))
    noise: Any = {"seed": 0, "noise": Noise(), "block_size": S, "mask_token_id": 3}
    expected = corrupt(x0, plain.scored, torch.arange(200), **noise)
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], expected[:4], strict=True))
    found = masked(x0, Share("noise", 3.0), Share("drafting", 1.0))
    pairs = [(a, b) for a, b in zip(blocks(found), blocks(plain), strict=True) if len(a) == S]
    drafts = [a == [False] + [True] * 7 for a, _ in pairs]
    assert sum(drafts) / len(pairs) == pytest.approx(0.25, rel=0.15)
    assert all(draft or a == b for draft, (a, b) in zip(drafts, pairs, strict=True))


def test_masks_depend_on_the_seed_and_the_row_s_number_alone(ids: Callable) -> None:
    shares = (Share("noise", 1.0), Share("prefix", 1.0))
    x0 = ids(6, 40)
    whole = masked(x0, *shares, later=True)
    part = masked(x0[2:5], *shares, first=2, later=True)
    for ours, theirs in zip(part[:4], whole.rows(slice(2, 5))[:4], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(masked(x0, *shares, seed=1).masked, masked(x0, *shares).masked)
