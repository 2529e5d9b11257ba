from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from twotower.ops.chunks import Chunks, make_chunks, take
from twotower.ops.seeded_ssd import chunk_states, context_output, seeded_output
from twotower.ops.ssd import ScanInputs

HEADS, WIDTH, GROUPS, STATE, TOKENS = 4, 3, 2, 5, 22


class Stream(NamedTuple):
    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor


def stream(seed: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Stream:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return Stream(
        normal(batch, TOKENS, HEADS, WIDTH),
        normal(batch, TOKENS, HEADS).exp() * 0.3,
        normal(batch, TOKENS, GROUPS, STATE),
        normal(batch, TOKENS, GROUPS, STATE),
        -normal(HEADS).exp(),
        normal(HEADS),
    )


def indices(*lengths: list[int]) -> Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


LAYOUTS = {
    "even": (indices([4, 4, 4, 4, 4, 2]), indices([22])),
    "ragged": (indices([3, 8, 8, 3]), indices([22])),
    "own grid per row": (indices([1, 4, 4, 4, 4, 4, 1], [4, 4, 4, 4, 4, 2]), indices([22], [22])),
    "packed": (indices([3, 4, 2, 4, 4, 1, 4], [1, 1, 5, 5, 5, 5]), indices([9, 9, 4], [1, 1, 20])),
}


def naive(own: Stream, context: Stream, block: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token: the context's outputs, and every block's from the context state at its start."""
    outputs, causal = torch.empty_like(own.x), torch.empty_like(own.x)

    def advance(s: Stream, H: Tensor, row: int, i: int) -> tuple[Tensor, Tensor]:
        states, y = [], []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            decay = (s.dt[row, i, head] * s.A[head]).exp()
            added = s.dt[row, i, head] * torch.outer(s.x[row, i, head], s.B[row, i, group])
            states.append(decay * H[head] + added)
            y.append(states[-1] @ s.C[row, i, group] + s.D[head] * s.x[row, i, head])
        return torch.stack(states), torch.stack(y)

    for row in range(own.x.shape[0]):
        blocks, documents = block[row % len(block)].tolist(), document[row % len(document)].tolist()
        zero = torch.zeros(HEADS, WIDTH, STATE, dtype=own.x.dtype)
        H = seeded = zero
        for i in range(TOKENS):
            if i == 0 or documents[i] != documents[i - 1]:
                H = zero
            if i == 0 or blocks[i] != blocks[i - 1]:
                seeded = H
            H, causal[row, i] = advance(context, H, row, i)
            seeded, outputs[row, i] = advance(own, seeded, row, i)
    return causal, outputs


def laid(s: Stream, token: Tensor, filled: Tensor) -> ScanInputs:
    x, dt, B, C = (take(v, token) for v in s[:4])
    return ScanInputs(x, dt * filled.unsqueeze(-1), B, C)


def run(own: Stream, context: Stream, chunks: Chunks) -> tuple[Tensor, Tensor]:
    inputs = laid(own, chunks.block_token, chunks.block_filled)
    past = laid(context, chunks.token, chunks.filled)
    states = chunk_states(past, context.A, chunks)
    causal = context_output(past, context.A, context.D, states, chunks)
    seeded = seeded_output(inputs, own.A, own.D, past, context.A, states, chunks)
    return take(causal.flatten(1, 2), chunks.place), take(seeded.flatten(1, 3), chunks.block_place)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 4, 6, 10, 64])
def test_both_scans_are_the_token_loop(layout: str, size: int, close: Callable) -> None:
    block, document = LAYOUTS[layout]
    own, context = stream(0), stream(1)
    for actual, expected in zip(
        run(own, context, make_chunks(block, document, size)), naive(own, context, block, document), strict=True
    ):
        close(actual, expected, 1e-13)  # float64 in another order of sums


def test_float32_stays_close_to_float64(close: Callable) -> None:
    block, document = LAYOUTS["packed"]
    expected = naive(stream(0), stream(1), block, document)
    own, context = stream(0, dtype=torch.float32), stream(1, dtype=torch.float32)
    for actual, exact in zip(run(own, context, make_chunks(block, document, 8)), expected, strict=True):
        assert actual.dtype == torch.float32
        close(actual, exact, 2e-6)


def test_long_decays_neither_overflow_nor_leave_nans() -> None:
    block, document = LAYOUTS["packed"]
    own, context = (
        s._replace(dt=s.dt * 1000) for s in (stream(0, dtype=torch.float32), stream(1, dtype=torch.float32))
    )
    leaves = [v.requires_grad_() for s in (own, context) for v in s]
    outputs = run(own, context, make_chunks(block, document, 64))
    assert all(bool(y.isfinite().all()) for y in outputs)
    gradients = torch.autograd.grad(sum(y.sum() for y in outputs), leaves)
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("layout", ["ragged", "packed"])
def test_gradients_reach_both_sides_as_in_the_token_loop(layout: str, close: Callable) -> None:
    block, document = LAYOUTS[layout]
    own, context = stream(0), stream(1)
    leaves = [v.requires_grad_() for s in (own, context) for v in s]
    weight = torch.randn_like(own.x)

    def gradients(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad((outputs[1] * weight).sum(), leaves, allow_unused=True)

    chunked = gradients(run(own, context, make_chunks(block, document, 8)))
    looped = gradients(naive(own, context, block, document))
    # the context's C and D shape its own outputs alone
    unread = {len(Stream._fields) + Stream._fields.index(name) for name in ("C", "D")}
    for i, (actual, expected) in enumerate(zip(chunked, looped, strict=True)):
        if i in unread:
            assert actual is None or not actual.any()
        else:
            assert actual is not None
            assert expected is not None
            assert expected.any()
            close(actual, expected, 1e-12)


def test_only_chunks_have_states() -> None:
    block, document = LAYOUTS["even"]
    context = stream(1)
    chunks = make_chunks(block, document, 12)
    assert chunk_states(laid(context, chunks.token, chunks.filled), context.A, chunks).shape == (
        2,
        2,
        HEADS,
        WIDTH,
        STATE,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_leaks(layout: str) -> None:
    """To the bit: a token outside what a block sees doesn't even change how its sums round."""
    block, document = (v.expand(2, -1) for v in LAYOUTS[layout])
    own, context = stream(0, dtype=torch.float32), stream(1, dtype=torch.float32)
    chunks = make_chunks(block, document, 10)
    causal, seeded = run(own, context, chunks)
    for at in range(TOKENS):
        other = [
            Stream(
                *(v.clone() if v.ndim == 1 else v.index_add(1, torch.tensor([at]), v[:, at : at + 1] * 0.7) for v in s)
            )
            for s in (own, context)
        ]
        moved = run(own, other[1], chunks)
        same = document == document[:, at : at + 1]
        later = torch.arange(TOKENS) >= at
        assert torch.equal((moved[0] != causal).flatten(2).any(-1), same & later)
        assert torch.equal((moved[1] != seeded).flatten(2).any(-1), same & (block > block[:, at : at + 1]))
        moved = run(other[0], context, chunks)
        assert torch.equal((moved[1] != seeded).flatten(2).any(-1), later & (block == block[:, at : at + 1]))
