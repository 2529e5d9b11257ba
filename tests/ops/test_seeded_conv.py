from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.ops.seeded_conv import make_reach, seeded_conv

TOKENS, CHANNELS = 13, 3
# first positions of each token's document and block
DOCUMENT = torch.tensor([[0] * 5 + [5] * 8, [0] * 13])
BLOCK = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 7, 7, 7, 7, 11, 11], [0, 1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 12]])


def naive(x: Tensor, context: Tensor | None, block: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.zeros_like(x)
    width = taps.shape[0]
    for row in range(2):
        for i in range(TOKENS):
            y[row, i] = 0 if bias is None else bias
            for back in range(width):
                j = i - back
                source = x if j >= block[row, i] else context
                if j >= DOCUMENT[row, i] and source is not None:
                    y[row, i] += taps[width - 1 - back] * source[row, j]
    return y


@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize("biased", [True, False])
def test_blocks_see_the_context_before_them_and_documents_nothing(width: int, biased: bool, close: Callable) -> None:
    torch.manual_seed(0)
    x, context = torch.randn(2, 2, TOKENS, CHANNELS, dtype=torch.float64)
    taps, bias = torch.randn(width, CHANNELS).double(), torch.randn(CHANNELS).double() if biased else None
    seeded = seeded_conv(x, context, make_reach(DOCUMENT, BLOCK, width), taps, bias)
    close(seeded, naive(x, context, BLOCK, taps, bias), 1e-14)
    alone = seeded_conv(context, None, make_reach(DOCUMENT, DOCUMENT, width), taps, bias)
    close(alone, naive(context, None, DOCUMENT, taps, bias), 1e-14)


def test_gradients_reach_everything() -> None:
    torch.manual_seed(0)
    reach = make_reach(DOCUMENT, BLOCK, 4)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 13, 2), (2, 13, 2), (4, 2), (2,))]
    assert torch.autograd.gradcheck(lambda x, context, taps, bias: seeded_conv(x, context, reach, taps, bias), inputs)
