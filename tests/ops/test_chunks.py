import pytest
import torch
from torch import Tensor

from twotower.ops.chunks import from_chunks, make_chunks, to_chunks

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
    r, c, q = chunks.token.shape
    assert q <= max(size, max(max(row) for row in blocks))
    for row in range(r):
        assert chunks.token[row][chunks.filled[row]].tolist() == list(range(20))
        assert chunks.token[row].flatten()[chunks.place[row]].tolist() == list(range(20))
        of_block: dict[int, set[int]] = {}
        for token, place in enumerate(chunks.place[row].tolist()):
            of_block.setdefault(int(block[row, token]), set()).add(place // q)
        assert all(len(found) == 1 for found in of_block.values())
    # no two neighbours would fit into one
    filled = chunks.filled.sum(-1)
    assert bool(((filled[:, 1:] == 0) | (filled[:, :-1] > size - torch.tensor(blocks[0]).max())).all()) or c == 1


@pytest.mark.parametrize(("blocks", "documents"), ROWS)
@pytest.mark.parametrize("size", [1, 6, 64])
def test_places_see_what_they_should(blocks: list[list[int]], documents: list[list[int]], size: int) -> None:
    block, document = indices(blocks), indices(documents)
    chunks = make_chunks(block, document, size)
    r, c, _ = chunks.token.shape
    for row in range(r):
        for chunk in range(c):
            held = [
                int(i) for i, there in zip(chunks.token[row, chunk], chunks.filled[row, chunk], strict=True) if there
            ]
            for i, a in enumerate(held):
                for j, b in enumerate(held):
                    same, own = document[row, a] == document[row, b], block[row, a] == block[row, b]
                    assert chunks.causal[row, chunk, i, j] == (same and b <= a)
                    assert chunks.own[row, chunk, i, j] == (own and b <= a)
                    assert chunks.past[row, chunk, i, j] == (same and block[row, b] < block[row, a])
                before = bool(held[0] > 0) and document[row, held[0] - 1] == document[row, a]
                assert chunks.continues[row, chunk, i] == before
                assert chunks.stays[row, chunk, i] == (document[row, a] == document[row, held[-1]])


def test_laying_out_and_back_is_the_identity_with_its_gradient() -> None:
    block, document = indices(ROWS[2][0]), indices(ROWS[2][1])
    for rows in (1, 2):
        chunks = make_chunks(block[:rows], document[:rows], 6)
        x = torch.randn(2, 20, 3, 2, dtype=torch.float64, requires_grad=True)
        laid = to_chunks(x, chunks)
        assert laid.shape == (2, *chunks.token.shape[1:], 3, 2)
        back = from_chunks(laid, chunks)
        assert torch.equal(back, x)
        (gradient,) = torch.autograd.grad((back * torch.arange(20.0)[:, None, None]).sum(), x)
        assert torch.equal(gradient, torch.arange(20.0, dtype=torch.float64)[:, None, None].expand_as(x))


def test_a_size_below_one_raises() -> None:
    with pytest.raises(ValueError, match="chunk size is 0, must be at least 1 token"):
        make_chunks(indices([[4]]), indices([[4]]), 0)
