"""What an `R` mixer makes its scan's inputs of: the RG-LRU. Letters: b batch, s tokens, c channels, h blocks of p
channels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Pack
from twotower.ops.selective_scan import SelectiveInputs

# Decays are sigmoid(Λ)^(8·r), as in the models' own code
POWER = 8.0
# So large at most is the gradient of √(1 − a²), as in the models' own code
STEEPEST = 1000.0


class RGLRU(nn.Module):
    """A real-gated linear recurrent unit (arXiv 2402.19427). With x behind the convolution and gates of each block of
    channels, i = sigmoid(x·W_i + b_i) and r = sigmoid(x·W_r + b_r):

        a_t = exp(−8·r_t·softplus(Λ)),   h_t = a_t·h_{t-1} + √(1 − a_t²)·i_t·x_t,   y_t = h_t

    except that the first token of a text has i_1·x_1 for what is added. In the words of `ops.selective_scan`, n = 1,
    A = −1, dt = 8·r·softplus(Λ), and B = C = 1.
    """

    counts = True
    projections = ("linear_x", "linear_y")

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        h, p = config.mamba_num_heads, config.mamba_head_dim
        # (…, inputs, outputs), of i and r
        self.gate_weights = nn.Parameter(torch.empty(2, h, p, p, dtype=dtype))
        self.gate_biases = nn.Parameter(torch.empty(2, h, p, dtype=dtype))
        self.recurrent_param = nn.Parameter(torch.empty(h * p, dtype=torch.promote_types(dtype, torch.float32)))

    @property
    def A(self) -> Tensor:
        """(c, 1)."""
        return -torch.ones_like(self.recurrent_param).unsqueeze(1)

    def scan_inputs(self, convolved: Tensor) -> SelectiveInputs:
        """What the scan reads, from the channels behind the convolution and the count (b, s, c+1)."""
        x, later = convolved[..., :-1], convolved[..., -1:]
        blocks = x.unflatten(-1, self.gate_biases.shape[1:])
        gates = torch.einsum("bshp,ihpq->ibshq", blocks, self.gate_weights) + self.gate_biases[:, None, None]
        wide = self.recurrent_param.dtype
        enters, decays = gates.to(wide).sigmoid().flatten(3)
        dt = POWER * decays * F.softplus(self.recurrent_param)
        # Not expm1, which is closer: the models were trained with this rounding
        scale = torch.where(later > 0, _Sqrt.apply(1 - (-2 * dt).exp()), 1.0)
        ones, zeros = dt.new_ones(1).expand(*dt.shape[:2], 1), dt.new_zeros(1).expand_as(dt)
        return SelectiveInputs(dt, scale * enters * x.to(wide), ones, ones, zeros)

    def gate(self, z: Tensor) -> Tensor:
        """What the outputs are multiplied by."""
        return F.gelu(z, approximate="tanh")

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        for parameter in (self.gate_weights, self.gate_biases):
            parameter.data = parameter.data.to(dtype)

    def released_tensors(self) -> dict[str, Tensor]:
        found = {"recurrent_param": self.recurrent_param.data}
        for i, name in enumerate(("input_gate", "recurrent_gate")):
            found |= {f"{name}.weight": self.gate_weights.data[i], f"{name}.bias": self.gate_biases.data[i]}
        return found


class _Sqrt(torch.autograd.Function):
    """√x for x ≥ 0 with a gradient that is bounded at 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (4 * x).clamp(min=STEEPEST**-2).rsqrt()
