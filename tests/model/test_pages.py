"""States whose keys lie in pages of a pool are the states they would be alone."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from twotower.model.pages import PAGE_SIZE, PagedKeys
from twotower.model.state import ContextState, join
from twotower.model.two_tower import TwoTower

BLOCK = [[3, 7, 3, 3, 8]]


def paged(model: TwoTower, tables: list[list[int]]) -> list[ContextState]:
    """Empty states, one per table, over one pool."""
    empty = model.context_tower.initial_state(1)
    shapes = [(40, PAGE_SIZE, k.shape[1], k.shape[3]) for k in empty.buffer.keys]
    keys, values = ([torch.zeros(s, dtype=torch.float64).transpose(1, 2) for s in shapes] for _ in range(2))
    return [dataclasses.replace(empty, buffer=PagedKeys(keys, values, (table,), (0,))) for table in tables]


@pytest.mark.parametrize("pattern", ["*", "M*-E", "llama"])
def test_join_select_and_put_keep_every_row(pattern: str, tiny: Callable, ids: Callable, close: Callable) -> None:
    model, tokens = tiny(pattern, dtype=torch.float64), ids(3, 90)
    lengths = (20, 37, 64)
    tables = [[9, 4, 7, 30, 8, 1], [2, 3, 39, 5, 6, 11], [12, 20, 13, 19, 14, 18]]
    with torch.inference_mode():
        states = paged(model, tables)
        for row, n in enumerate(lengths):
            states[row] = model.absorb(tokens[row : row + 1, :n], states[row], with_logits=True)
        state = join((join(states[:2]), states[2]))
        assert state.lengths == lengths
        # two of the three rows go on, each by as many tokens as it likes
        more = torch.zeros(2, 17, dtype=torch.long)
        more[0, :5], more[1, :17] = tokens[0, 20:25], tokens[2, 64:81]
        state = model.absorb(more, state, (5, 17), with_logits=True, rows=[0, 2])
        assert state.lengths == (25, 37, 81)
        for row, n in enumerate(state.lengths):
            fresh = model.prefill(tokens[row : row + 1, :n])
            one = state.select([row])
            close(one.next_logits, fresh.next_logits, 1e-10)
            close(model.denoise(BLOCK, one), model.denoise(BLOCK, fresh), 1e-10)
            moved = dataclasses.replace(one, buffer=one.buffer.moved(n, one.lengths, "cpu"))
            close(model.denoise(BLOCK, moved), model.denoise(BLOCK, fresh), 1e-10)


def test_copies_in_pools_of_their_own_can_be_joined(tiny: Callable, ids: Callable, close: Callable) -> None:
    """As a denoiser on another device has them; also after some rows have left."""
    model, tokens, lengths = tiny("M*-E", dtype=torch.float64), ids(3, 90), (20, 70, 33)
    with torch.inference_mode():
        states = paged(model, [[9, 4, 7, 30, 8, 1], [2, 3, 39, 5, 6, 11], [12, 20, 13, 19, 14, 18]])
        copies = []
        for row, n in enumerate(lengths):
            state = model.absorb(tokens[row : row + 1, :n], states[row], with_logits=False)
            copies.append(dataclasses.replace(state, buffer=state.buffer.moved(n, state.lengths, "cpu")))
        joined = join((join(copies[:2]), copies[2]))
        again = join((joined.select([2, 1]), copies[0]))
        assert again.lengths == (33, 70, 20)
        assert again.buffer.keys[0].shape[0] < 3 * joined.buffer.keys[0].shape[0]
        for state, order in ((joined, (0, 1, 2)), (again, (2, 1, 0))):
            seen = model.denoise(BLOCK * 3, state)
            for place, row in enumerate(order):
                fresh = model.denoise(BLOCK, model.prefill(tokens[row : row + 1, : lengths[row]]))
                close(seen[place : place + 1], fresh, 1e-10)


def test_put_into_a_row_buffer_is_an_extension(tiny: Callable, ids: Callable, close: Callable) -> None:
    """`generate` keeps its keys in one buffer: rows that go on alone are copied out and back."""
    model, tokens = tiny("M*-E", dtype=torch.float64), ids(3, 90)
    before = model.prefill(tokens[:, :60], [10, 60, 30])
    with torch.inference_mode():
        after = model.absorb(tokens[1:2, 60:71], before, with_logits=False, rows=[1])
        assert after.lengths == (10, 71, 30)
        again = model.absorb(tokens[:1, 10:20], after, with_logits=False, rows=[0])
        for state, lengths in ((before, (10, 60, 30)), (after, (10, 71, 30)), (again, (20, 71, 30))):
            for row, n in enumerate(lengths):
                fresh = model.denoise(BLOCK, model.prefill(tokens[row : row + 1, :n]))
                close(model.denoise(BLOCK, state.select([row])), fresh, 1e-10)


def test_padding_goes_to_the_page_of_nobody(tiny: Callable, ids: Callable) -> None:
    model = tiny("*", dtype=torch.float64)
    short, other = paged(model, [[5], [6, 7, 8]])
    with torch.inference_mode():
        other = model.absorb(ids(1, 48), other, with_logits=False)
        kept = [k[[6, 7, 8]].clone() for k in other.buffer.keys]
        model.absorb(ids(1, 48), short, (3,), with_logits=False)  # 45 places of padding, 32 without a page
        assert all(torch.equal(k[[6, 7, 8]], old) for k, old in zip(other.buffer.keys, kept, strict=True))


def test_only_the_newest_state_goes_on(tiny: Callable, ids: Callable) -> None:
    model = tiny("*", dtype=torch.float64)
    (state,) = paged(model, [[5, 6]])
    model.absorb(ids(1, 4), state, with_logits=False)
    with pytest.raises(AssertionError, match="only the newest state can be extended"):
        model.absorb(ids(1, 4), state, with_logits=False)
