"""The two-layer network of `-` layers and experts. Letters: d width, f inner width."""

import torch.nn.functional as F
from torch import Tensor

from twotower.ops.linear import PackedWeight, linear


def mlp(
    x: Tensor,
    up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    gated: bool,
) -> Tensor:
    """x (…, d) to down(relu(up(x))²), or where gated down(silu(g) · u) with g, u the halves of up(x): (…, d).

    up (f, d), gated (2f, d); down (d, f); biases of their outputs or None.
    """
    hidden = linear(x, up, up_bias)
    if gated:
        gate, value = hidden.chunk(2, dim=-1)
        return linear(F.silu(gate) * value, down, down_bias)
    return linear(hidden.relu().square(), down, down_bias)
