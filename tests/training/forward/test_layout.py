import pytest
import torch

from twotower.training.forward.layout import Layout, answer_offsets, make_layout

DOCUMENT = torch.tensor([[0] * 5 + [1] * 6, [0] * 11])


def test_blocks_start_at_documents_and_at_the_grid() -> None:
    layout = make_layout(DOCUMENT, 4, torch.tensor([0, 3]))
    assert layout.block.tolist() == [[0, 0, 0, 0, 1, 2, 2, 2, 2, 3, 3], [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]]
    assert layout.block_start.tolist() == [[0, 0, 0, 0, 4, 5, 5, 5, 5, 9, 9], [0, 1, 1, 1, 1, 5, 5, 5, 5, 9, 9]]
    assert layout.block_end.tolist() == [[4, 4, 4, 4, 5, 9, 9, 9, 9, 11, 11], [1, 5, 5, 5, 5, 9, 9, 9, 9, 11, 11]]
    assert layout.document_start.tolist() == [[0] * 5 + [5] * 6, [0] * 11]
    assert layout.position.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5], list(range(11))]


@pytest.mark.parametrize("offset", range(4))
def test_the_grid_starts_before_every_document(offset: int) -> None:
    layout = make_layout(DOCUMENT, 4, offset)
    for row in range(2):
        for start in (0, 5) if row == 0 else (0,):
            assert layout.block_start[row, start] == start
            assert layout.block_end[row, start] == min(start + 4 - offset, 11 if start or row else 5)


def test_blocks_begin_where_answers_do() -> None:
    scored = torch.zeros_like(DOCUMENT, dtype=torch.bool)
    scored[0, [3, 4, 6, 8, 9]] = True  # in the first document from its place 3 on, in the second from its place 1
    offset = answer_offsets(DOCUMENT, scored, 4)
    assert offset.tolist() == [[1] * 5 + [3] * 6, [0] * 11]
    layout = make_layout(DOCUMENT, 4, offset)
    assert layout.block.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]]


@pytest.mark.parametrize(
    ("block", "document", "message"),
    [
        ([[0, 1]], [[0, 0, 0]], r"shapes \(1, 2\) and \(1, 3\), must be one"),
        ([[1, 0]], [[0, 0]], "block decreases along a row"),
        ([[0, 1]], [[1, 0]], "document decreases along a row"),
        ([[0, 0]], [[0, 1]], "a document starts inside a block"),
    ],
)
def test_layouts_that_cannot_be_raise(block: list, document: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(torch.tensor(block), torch.tensor(document))


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (4, 4), (4, -1), (4, [0, 4])])
def test_offsets_outside_a_block_raise(size: int, offset: int | list[int]) -> None:
    with pytest.raises(ValueError, match="block_size is 0" if size == 0 else r"must be in \[0, block_size=4\)"):
        make_layout(DOCUMENT, size, torch.tensor(offset))
