from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.ops.attention import ScoreRule
from twotower.ops.tiled_attention import KeyReach, make_tiles, tiled_attention

TOKENS, WIDTH = 21, 4
RULE = ScoreRule(WIDTH**-0.5)
DOCUMENT = torch.tensor([[0] * 9 + [9] * 12, [0] * 21])
BLOCK = torch.tensor([[0] * 3 + [3] * 6 + [9] * 8 + [17] * 4, [0] + [1] * 8 + [9] * 8 + [17] * 4])
END = torch.tensor([[3] * 3 + [9] * 6 + [17] * 8 + [21] * 4, [1] + [9] * 8 + [17] * 8 + [21] * 4])
CAUSAL = KeyReach(DOCUMENT, DOCUMENT, torch.arange(1, TOKENS + 1).expand(2, -1))
BLOCKS = KeyReach(DOCUMENT, BLOCK, END)


def inputs(kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    heads = (4, *(kv_heads,) * 4)
    return [torch.randn(2, h, TOKENS, WIDTH, dtype=dtype, requires_grad=True) for h in heads]


def naive(q: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None, reach: KeyReach) -> Tensor:
    """Query by query over exactly the keys it sees."""
    group = q.shape[1] // key.shape[1]
    rows = []
    for row in range(2):
        for head in range(q.shape[1]):
            for i in range(TOKENS):
                first, start, end = (int(edge[row, i]) for edge in reach)
                k, v = key[row, head // group, start:end], value[row, head // group, start:end]
                if past is not None:
                    k = torch.cat((past[0][row, head // group, first:start], k))
                    v = torch.cat((past[1][row, head // group, first:start], v))
                rows.append((k @ q[row, head, i] * WIDTH**-0.5).softmax(0) @ v)
    return torch.stack(rows).view_as(q)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tile", [1, 4, 7, 256])
def test_queries_see_their_block_and_what_precedes_it(kv_heads: int, tile: int, close: Callable) -> None:
    q, key, value, *past = inputs(kv_heads)
    for arguments in ((None, CAUSAL), ((past[0], past[1]), BLOCKS)):
        actual = tiled_attention(q, key, value, arguments[0], make_tiles(arguments[1], tile), RULE)
        close(actual, naive(q, key, value, *arguments), 1e-13)


@pytest.mark.parametrize("tile", [4, 20, 256])
def test_gradients(tile: int, close: Callable) -> None:
    leaves = inputs()
    q, key, value, *past = leaves
    weight = torch.randn_like(q)

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y * weight).sum(), leaves)

    tiled = gradients(tiled_attention(q, key, value, (past[0], past[1]), make_tiles(BLOCKS, tile), RULE))
    for actual, expected in zip(tiled, gradients(naive(q, key, value, (past[0], past[1]), BLOCKS)), strict=True):
        close(actual, expected, 1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_one_row_of_the_layout_serves_all_rows(grad: bool) -> None:
    q, key, value, *past = inputs()
    shared = KeyReach(*(edge[1:] for edge in BLOCKS))
    with torch.set_grad_enabled(grad):
        both = tiled_attention(
            q, key, value, (past[0], past[1]), make_tiles(KeyReach(*(e.expand(2, -1) for e in shared)), 8), RULE
        )
        assert torch.equal(tiled_attention(q, key, value, (past[0], past[1]), make_tiles(shared, 8), RULE), both)


def test_what_is_saved_for_backward_is_linear_in_the_tokens() -> None:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    def largest(t: int) -> int:
        saved.clear()
        q, key, value, past_key, past_value = torch.randn(5, 1, 2, t, WIDTH, requires_grad=True)
        start = torch.arange(t)[None] // 8 * 8
        reach = KeyReach(torch.zeros_like(start), start, start + 8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tiled_attention(q, key, value, (past_key, past_value), make_tiles(reach, 16), RULE)
        return max(saved, default=0)

    # the queries, keys and values themselves, and no mask or weights
    assert largest(256) <= 2 * largest(128)
    assert largest(256) <= 2 * 256 * WIDTH
