"""The two-layer network of `-` layers and experts. Letters: d width, f inner width, u outputs of the first product."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.linear import PackedWeight, linear

# xIELU's slope at 0 (arXiv 2411.13010)
XIELU_SLOPE = 0.5


class Activation(NamedTuple):
    """What stands between the two products: φ(h), or φ(gate_scale · g) · (v + offset) where gated, with g and v the
    halves of h.

    `kind` is a config's `mlp_hidden_act`: `gelu` has the error function, `gelu_tanh` its approximation by tanh.
    `alphas` (2,) are xielu's learned curvatures above and below 0, before softplus. A `limit` clamps g from above and v
    from both sides, as gpt-oss does, which also has an offset of 1.
    """

    kind: str = "relu2"
    gated: bool = False
    limit: float | None = None
    offset: float = 0.0
    alphas: Tensor | None = None
    gate_scale: float = 1.0


def mlp(
    x: Tensor,
    up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
) -> Tensor:
    """x (…, d) to down(activation(up(x))): (…, d).

    up (u, d), u being 2f where gated and f where not; down (d, f); biases of their outputs or None.
    """
    return linear(activate(linear(x, up, up_bias), activation), down, down_bias)


def activate(hidden: Tensor, by: Activation) -> Tensor:
    """The first product's output (…, u) to the second one's input (…, f)."""
    if not by.gated:
        return _phi(hidden, by)
    gate, value = hidden.chunk(2, dim=-1)
    if by.gate_scale != 1.0:
        gate = gate * by.gate_scale
    if by.limit is not None:
        gate, value = gate.clamp(max=by.limit), value.clamp(-by.limit, by.limit)
    return _phi(gate, by) * (value + by.offset if by.offset else value)


def _phi(x: Tensor, by: Activation) -> Tensor:
    match by.kind:
        case "relu2":
            return x.relu().square()
        case "relu":
            return x.relu()
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * (1.702 * x).sigmoid()
    assert by.kind == "xielu", by.kind
    assert by.alphas is not None
    above, below = F.softplus(by.alphas.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
    curved = torch.where(x > 0, above * x * x, (x.clamp(max=0).expm1() - x) * (XIELU_SLOPE + below))
    return curved + XIELU_SLOPE * x
