from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.model.state import KEY_TILE, ContextState
from twotower.model.two_tower import TwoTower

EXACT = 1e-10  # float64 in another order of sums
BLOCK = [[3, 7, 3, 3, 8]]


def answer(model: TwoTower, state: ContextState) -> Tensor:
    """Something that every key and every recurrent state reaches."""
    return model.denoise(BLOCK * state.batch_size, state)


@pytest.fixture(params=["M*-E", "llama", "M-", "**"])
def model(request: pytest.FixtureRequest, tiny: Callable) -> TwoTower:
    return tiny(request.param, dtype=torch.float64)


def test_extending_one_state_twice_leaves_both_results_right(model: TwoTower, ids: Callable, close: Callable) -> None:
    prompt, left, right = ids(1, 20), ids(1, 9, seed=1), ids(1, 5, seed=2)
    old = model.prefill(prompt, capacity=200)
    first = model.extend(left, old)
    second = model.extend(right, old)  # the buffer's tip is first's: this one must copy
    third = model.extend(left, second)
    for state, tokens in (
        (old, [prompt]),
        (first, [prompt, left]),
        (second, [prompt, right]),
        (third, [prompt, right, left]),
    ):
        close(answer(model, state), answer(model, model.prefill(torch.cat(tokens, 1))), EXACT)


def test_only_the_newest_state_appends_in_place(tiny: Callable, ids: Callable) -> None:
    model = tiny("*")
    old = model.prefill(ids(1, 20), capacity=200)
    first = model.extend(ids(1, 3), old)
    assert first.buffer is old.buffer
    assert model.extend(ids(1, 3), first).buffer is old.buffer
    assert model.extend(ids(1, 3), old).buffer is not old.buffer


def test_views_of_the_keys_are_as_long_as_asked_for_and_made_once(tiny: Callable, ids: Callable) -> None:
    buffer = tiny("M*-").prefill(ids(1, 20), capacity=3 * KEY_TILE).buffer
    short, long = buffer.past(KEY_TILE), buffer.past(2 * KEY_TILE)
    assert (short.length, long.length) == (KEY_TILE, 2 * KEY_TILE)
    assert buffer.past(2 * KEY_TILE) is long
    assert long.keys[0].data_ptr() == buffer.keys[0].data_ptr()


def test_a_ragged_extension_moves_only_its_rows(model: TwoTower, ids: Callable, close: Callable) -> None:
    prompt, more = ids(2, 12), ids(2, 6, seed=1)
    old = model.prefill(prompt)
    with torch.no_grad():
        ragged = model.absorb(more, old, (0, 6), with_logits=True)
        again = model.extend(more, old)
    assert ragged.lengths == (12, 18)
    assert torch.equal(ragged.next_logits[0], old.next_logits[0])
    close(answer(model, ragged)[0], answer(model, model.prefill(prompt))[0], EXACT)
    whole = answer(model, model.prefill(torch.cat((prompt, more), 1)))
    close(answer(model, ragged)[1], whole[1], EXACT)
    close(answer(model, again), whole, EXACT)


@pytest.mark.parametrize("step", [1, 16, KEY_TILE, KEY_TILE + 1])
def test_growth_past_key_tiles(step: int, tiny: Callable, ids: Callable, close: Callable) -> None:
    model, tokens = tiny("M*", dtype=torch.float64), ids(1, 3 * KEY_TILE)
    length = KEY_TILE - 2
    state = model.prefill(tokens[:, :length])
    assert state.buffer.capacity == KEY_TILE
    while length + step <= min(3 * KEY_TILE, KEY_TILE + 40 * step):
        state = model.extend(tokens[:, length : length + step], state)
        length += step
        assert state.buffer.capacity % KEY_TILE == 0
        assert state.buffer.capacity >= length
    assert length > KEY_TILE
    close(answer(model, state), answer(model, model.prefill(tokens[:, :length])), EXACT)


def test_growth_is_amortised_and_capacity_is_used(tiny: Callable, ids: Callable) -> None:
    model = tiny("*")
    state, buffers = model.prefill(ids(1, 1)), set()
    kept = []  # keeps buffers alive, so that ids are not reused
    for _ in range(300):
        state = model.extend([[5]], state)
        buffers.add(id(state.buffer))
        kept.append(state)
    assert len(buffers) <= 4  # 64, 128, 256, 512
    roomy = model.prefill(ids(1, 1), capacity=301)
    for _ in range(300):
        before, roomy = roomy, model.extend([[5]], roomy)
        assert roomy.buffer is before.buffer


def test_select_takes_rows_in_any_order_and_is_independent(model: TwoTower, ids: Callable, close: Callable) -> None:
    prompt, lengths, more = ids(3, 70), [70, 9, 33], ids(2, 6, seed=1)
    state = model.prefill(prompt, lengths)
    expected = answer(model, state)
    chosen = state.select([2, 0])
    assert chosen.lengths == (33, 70)
    close(answer(model, chosen), expected[[2, 0]], EXACT)
    extended = model.extend(more, chosen)
    close(answer(model, state), expected, EXACT)
    alone = model.prefill(torch.cat((prompt[2:, :33], more[:1]), 1))
    close(answer(model, extended)[:1], answer(model, alone), EXACT)


def test_select_from_a_state_that_is_no_longer_the_newest(model: TwoTower, ids: Callable, close: Callable) -> None:
    prompt, more = ids(2, 10), ids(1, 6, seed=1)
    old = model.prefill(prompt)
    newer = model.extend(ids(2, 4), old)
    expected = answer(model, newer)
    branch = model.extend(more, old.select([1]))
    close(answer(model, branch), answer(model, model.prefill(torch.cat((prompt[1:], more), 1))), EXACT)
    assert torch.equal(answer(model, newer), expected)


def test_length_needs_equal_rows(tiny: Callable, ids: Callable) -> None:
    model = tiny("*")
    assert model.prefill(ids(2, 7)).length == 7
    ragged = model.prefill(ids(2, 7), [7, 3])
    with pytest.raises(ValueError, match=r"\(7, 3\).*state.lengths"):
        _ = ragged.length


def test_a_state_stays_itself_on_its_own_device(model: TwoTower, ids: Callable) -> None:
    state = model.prefill(ids(1, 5))
    dtype = model.denoiser_tower.activation_dtype
    assert state.to("cpu", dtype, dtype) is state
    assert model.seed(state) is state
    assert state.device == torch.device("cpu")


def test_prefill_reserves_what_is_asked_for(tiny: Callable, ids: Callable) -> None:
    state = tiny("M*").prefill(ids(1, 5), capacity=KEY_TILE + 1)
    assert state.buffer.capacity == 2 * KEY_TILE
    assert state.reserve(2 * KEY_TILE - 5) is state
    assert state.reserve(2 * KEY_TILE - 4) is not state


def test_scored_tokens_do_not_disturb_what_else_extends_their_state(
    model: TwoTower, ids: Callable, close: Callable
) -> None:
    prompt, first, second, more = ids(1, 10), ids(1, 16, seed=1), ids(1, 16, seed=2), ids(1, 3, seed=3)
    old = model.prefill(prompt, capacity=200)
    with torch.no_grad():
        scored, other = model.score(first, old), model.score(second, old)
        extended = model.extend(more, old)
        accepted, others = model.accept(scored, (8,)), model.accept(other, (5,))
    for state, tail in ((accepted, first[:, :8]), (others, second[:, :5]), (extended, more)):
        close(answer(model, state), answer(model, model.prefill(torch.cat((prompt, tail), 1))), EXACT)
    with pytest.raises(AssertionError, match="committed before"):
        model.accept(scored, (3,))
