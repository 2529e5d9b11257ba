from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.ops.chunks import Chunks, make_chunks, take
from twotower.ops.seeded_selective import Reach, chunk_ends, context_output, seeded_output
from twotower.ops.selective_scan import SelectiveInputs, selective_scan

CHANNELS, STATE, TOKENS = 3, 4, 22
Stream = tuple[SelectiveInputs, Tensor]  # and A


def stream(seed: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Stream:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    dt = normal(batch, TOKENS, CHANNELS).exp() * 0.3
    (u, skip), (B, C) = normal(2, batch, TOKENS, CHANNELS), normal(2, batch, TOKENS, STATE)
    return SelectiveInputs(dt, u, B, C, skip), -normal(CHANNELS, STATE).exp()


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
    causal, seeded = [], []
    for row in range(own[0].u.shape[0]):
        blocks, documents = block[row % len(block)].tolist(), document[row % len(document)].tolist()
        zero = torch.zeros(1, CHANNELS, STATE, dtype=own[1].dtype)
        h = state = zero
        for i in range(TOKENS):
            one = [SelectiveInputs(*(v[row : row + 1, i : i + 1] for v in inputs)) for inputs, _ in (own, context)]
            if i == 0 or documents[i] != documents[i - 1]:
                h = zero
            if i == 0 or blocks[i] != blocks[i - 1]:
                state = h
            y, h = selective_scan(one[1], context[1], h)
            causal.append(y)
            y, state = selective_scan(one[0], own[1], state)
            seeded.append(y)
    shape = own[0].u.shape
    return torch.cat(causal).view(shape), torch.cat(seeded).view(shape)


def run(own: Stream, context: Stream, chunks: Chunks) -> tuple[Tensor, Tensor]:
    inputs = SelectiveInputs(*(take(v, chunks.block_token) for v in own[0])).masked(chunks.block_filled)
    past = SelectiveInputs(*(take(v, chunks.token) for v in context[0])).masked(chunks.filled)
    reach = Reach(*(part.expand(past.u.shape[0], -1, -1) for part in Reach.of(chunks)))
    added, kept = chunk_ends(past, context[1], reach.fresh)
    states = [torch.zeros_like(added[:, 0])]
    for a, k in zip(added.unbind(1)[:-1], kept.unbind(1)[:-1], strict=True):
        states.append(k * states[-1] + a)
    before = torch.stack(states, dim=1)
    causal = context_output(past, context[1], before, reach.fresh)
    seeded = seeded_output(inputs, own[1], past, context[1], before, reach)
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


def test_long_decays_neither_overflow_nor_leave_nans() -> None:
    block, document = LAYOUTS["packed"]
    streams = [(s._replace(dt=s.dt * 1000), A) for s, A in (stream(i, dtype=torch.float32) for i in range(2))]
    leaves = [v.requires_grad_() for s, A in streams for v in (*s, A)]
    outputs = run(*streams, make_chunks(block, document, 64))
    assert all(bool(y.isfinite().all()) for y in outputs)
    gradients = torch.autograd.grad(sum(y.sum() for y in outputs), leaves)
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("layout", ["ragged", "packed"])
def test_gradients_reach_both_sides_as_in_the_token_loop(layout: str, close: Callable) -> None:
    block, document = LAYOUTS[layout]
    own, context = stream(0), stream(1)
    leaves = [v.requires_grad_() for s, A in (own, context) for v in (*s, A)]
    weight = torch.randn_like(own[0].u)

    def gradients(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad((outputs[1] * weight).sum(), leaves, allow_unused=True)

    chunked = gradients(run(own, context, make_chunks(block, document, 8)))
    looped = gradients(naive(own, context, block, document))
    unread = {6 + SelectiveInputs._fields.index(name) for name in ("C", "skip")}  # they shape the context's own outputs
    for i, (actual, expected) in enumerate(zip(chunked, looped, strict=True)):
        if i in unread:
            assert actual is None or not actual.any()
        else:
            assert actual is not None
            assert expected is not None
            assert expected.any()
            close(actual, expected, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_leaks(layout: str) -> None:
    """To the bit: a token outside what a block sees doesn't even change how its sums round."""
    block, document = (v.expand(2, -1) for v in LAYOUTS[layout])
    own, context = stream(0), stream(1)
    chunks = make_chunks(block, document, 10)
    causal, seeded = run(own, context, chunks)
    for at in range(TOKENS):
        place = torch.tensor([at])
        other = [
            (SelectiveInputs(*(v.index_add(1, place, v[:, at : at + 1] * 0.7) for v in s)), A)
            for s, A in (own, context)
        ]
        moved = run(own, other[1], chunks)
        same = document == document[:, at : at + 1]
        later = torch.arange(TOKENS) >= at
        assert torch.equal((moved[0] != causal).flatten(2).any(-1), same & later)
        assert torch.equal((moved[1] != seeded).flatten(2).any(-1), same & (block > block[:, at : at + 1]))
        moved = run(other[0], context, chunks)
        assert torch.equal((moved[1] != seeded).flatten(2).any(-1), later & (block == block[:, at : at + 1]))
