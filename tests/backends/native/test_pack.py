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


# Inputs: none to several whole matrix tiles of 32, and every kind of rest; outputs: whole panels, and a part of one
@pytest.mark.parametrize("shape", [(40, 24), (1, 1), (33, 31), (32, 32), (70, 33), (64, 65), (96, 96), (101, 301)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, x = pack_weight(normal(*shape, dtype=dtype)), normal(67, shape[1])
    whole = weight(x, None)
    for count in (1, 2, 3, 5, 8, 13, 16, 17, 18, 31, 32, 33, 47, 48, 64, 65, 66):
        for first in (0, 67 - count):
            assert torch.equal(weight(x[first : first + count], None), whole[first : first + count])


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-25, 1e25, 1e38])
def test_tiny_and_huge_values_have_the_same_bits_in_a_row_alone(scale: float) -> None:
    """Where products are denormal, rounded to zero, or overflow."""
    weight, x, bias = pack_weight(normal(50, 70).mul(scale).bfloat16()), normal(20, 70) * 1e-6, normal(50) * 1e-39
    x[3:6] *= 1e8
    whole = weight(x, bias)
    alone = torch.cat([weight(row[None], bias) for row in x])
    torch.testing.assert_close(alone, whole, rtol=0, atol=0, equal_nan=True)
