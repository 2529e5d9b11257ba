"""Products with a packed weight against PyTorch's: every tile height and width that a pass may or may not meet."""

from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.backends.native import build
from twotower.backends.native.pack import has_bf16_pairs, pack_weight
from twotower.ops import linear

pytestmark = pytest.mark.skipif(build.library() is None, reason="this machine has no C compiler")

# float32 sums in another order: some ulps of the largest term
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def multiplied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What rows are in a product with a weight of `dtype`."""
    return x.bfloat16().float() if dtype == torch.bfloat16 and has_bf16_pairs() else x


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 17, 33])
@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (33, 7), (40, 24), (130, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x, bias = normal(*shape, dtype=dtype), normal(rows, shape[1]), normal(shape[0])
    expected = multiplied(x, dtype) @ weight.float().t()
    torch.testing.assert_close(linear.linear(x, pack_weight(weight)), expected, **CLOSE)
    torch.testing.assert_close(linear.linear(x, pack_weight(weight), bias), expected + bias, **CLOSE)


def test_linear_takes_columns_of_a_wider_table_and_more_dimensions() -> None:
    weight, wide = normal(20, 12), normal(2, 3, 30)
    x = wide[..., 5:17]
    torch.testing.assert_close(linear.linear(x, pack_weight(weight)), x @ weight.t(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    weight, x = pack_weight(normal(40, 24, dtype=dtype)), normal(17, 24)
    whole = weight(x, None)
    for first, last in ((0, 1), (0, 3), (1, 4), (3, 9), (4, 17), (9, 17)):
        assert torch.equal(weight(x[first:last], None), whole[first:last])
