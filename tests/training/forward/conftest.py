"""What tests of the training pass share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.training.forward.layout import Layout


@pytest.fixture
def noisy() -> Callable[[Tensor, Layout], tuple[Tensor, Tensor]]:
    """Makes of x0 (b, t) the same with some masks, and a noise level for each block of each row (b, t)."""

    def make(x0: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        xt = x0.masked_fill(torch.rand(x0.shape) < 0.5, 3)
        level = torch.rand(x0.shape[0], int(layout.block.max()) + 1)
        return xt, level.gather(1, layout.block.expand(x0.shape[0], -1))

    return make
