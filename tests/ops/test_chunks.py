import pytest
import torch
from torch import Tensor

from twotower.ops.chunks import make_chunks, take

# (lengths of blocks, lengths of documents) of each row
ROWS = [
    ([[4, 4, 4, 4, 4]], [[20]]),
    ([[1, 4, 4, 4, 4, 3]], [[20]]),
    ([[3, 4, 4, 4, 4, 1], [4, 4, 2, 4, 4, 2]], [[20], [10, 10]]),
    ([[20], [1] * 20], [[20], [1] * 20]),
    ([[7, 7, 6], [2, 2, 16]], [[7, 13], [2, 2, 16]]),
]


def indices(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


@pytest.mark.parametrize(("blocks", "documents"), ROWS)
@pytest.mark.parametrize("size", [1, 4, 6, 8, 64])
def test_every_token_has_one_place_and_every_block_one_chunk(
    blocks: list[list[int]], documents: list[list[int]], size: int
) -> None:
    block, document = indices(blocks), indices(documents)
    chunks = make_chunks(block, document, size)
    r, _, k, s = chunks.block_token.shape
    longest = max(max(row) for row in blocks)
    assert s == longest
    assert k == max(size // longest, 1)
    assert chunks.token.shape[2] <= k * longest
    for row in range(r):
        for token, filled, place in (
            (chunks.token, chunks.filled, chunks.place),
            (chunks.block_token, chunks.block_filled, chunks.block_place),
        ):
            assert token[row][filled[row]].tolist() == list(range(20))
            assert token[row].flatten()[place[row]].tolist() == list(range(20))
        slots = chunks.block_place[row] // s
        assert torch.equal(slots, block[row])  # blocks are numbered from 0 here
        # both towers' tokens of a block lie in the same chunk
        assert torch.equal(slots // k, chunks.place[row] // chunks.token.shape[2])


@pytest.mark.parametrize(("blocks", "documents"), ROWS)
@pytest.mark.parametrize("size", [1, 6, 64])
def test_places_see_what_they_should(blocks: list[list[int]], documents: list[list[int]], size: int) -> None:
    block, document = indices(blocks), indices(documents)
    chunks = make_chunks(block, document, size)
    r, c, k, _ = chunks.block_token.shape
    for row in range(r):
        for chunk in range(c):
            held = chunks.token[row, chunk][chunks.filled[row, chunk]].tolist()
            if not held:
                continue
            before = document[row, held[0] - 1] if held[0] else -1
            for i, a in enumerate(held):
                assert chunks.continues[row, chunk, i] == (document[row, a] == before)
                assert chunks.stays[row, chunk, i] == (document[row, a] == document[row, held[-1]])
                for j, b in enumerate(held):
                    assert chunks.causal[row, chunk, i, j] == (document[row, a] == document[row, b] and b <= a)
            for slot in range(k):
                own = chunks.block_token[row, chunk, slot][chunks.block_filled[row, chunk, slot]].tolist()
                if own:
                    assert chunks.block_continues[row, chunk, slot] == (document[row, own[0]] == before)
                    for j, b in enumerate(held):
                        earlier = document[row, own[0]] == document[row, b] and block[row, b] < block[row, own[0]]
                        assert chunks.before[row, chunk, slot, j] == earlier


def test_laying_out_and_back_is_the_identity_with_its_gradient() -> None:
    block, document = indices(ROWS[2][0]), indices(ROWS[2][1])
    for rows in (1, 2):
        chunks = make_chunks(block[:rows], document[:rows], 8)
        x = torch.randn(2, 20, 3, 2, dtype=torch.float64, requires_grad=True)
        laid = take(x, chunks.block_token)
        assert laid.shape == (2, *chunks.block_token.shape[1:], 3, 2)
        back = take(laid.flatten(1, 3), chunks.block_place)
        assert torch.equal(back, x)
        (gradient,) = torch.autograd.grad((back * torch.arange(20.0)[:, None, None]).sum(), x)
        assert torch.equal(gradient, torch.arange(20.0, dtype=torch.float64)[:, None, None].expand_as(x))


def test_block_numbers_need_not_be_consecutive() -> None:
    block, document = indices(ROWS[1][0]), indices(ROWS[1][1])
    for ours, theirs in zip(make_chunks(block * 3 + 5, document, 8), make_chunks(block, document, 8), strict=True):
        assert torch.equal(ours, theirs)


def test_a_size_below_one_raises() -> None:
    with pytest.raises(ValueError, match="chunk size is 0, must be at least 1 token"):
        make_chunks(indices([[4]]), indices([[4]]), 0)
