"""What an `S` mixer makes its scan's inputs of: Mamba-1. Letters: b batch, s tokens, c channels, n state width, r rank
of the step sizes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Linear, Pack
from twotower.ops.norm import rms_norm
from twotower.ops.selective_scan import SelectiveInputs
from twotower.ops.ssd import time_steps


class Mamba1(nn.Module):
    """Step sizes, B and C are made of the channels behind the convolution (arXiv 2312.00752):

        x = silu(convolved);  dt', B, C = x_proj·x;  dt = softplus(dt_proj·dt' + dt_bias)
        h_t = exp(dt_t·A)·h_{t-1} + dt_t·x_t·B_t,   y_t = h_t·C_t + D·x_t,   A = −exp(A_log)

    With a `mamba_inner_epsilon` each of dt', B and C has an RMSNorm, as in Jamba and, with weights of 1, FalconMamba.
    """

    counts = False
    projections = ("in_proj",)

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        width, rank, n = config.mamba_width, config.mamba_dt_rank, config.mamba_state_size
        self.sizes = {"dt_norm": rank, "b_norm": n, "c_norm": n}
        self.x_proj = Linear(width, rank + 2 * n, bias=False, dtype=dtype)
        self.dt_proj = Linear(rank, width, bias=False, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self.dt_bias = nn.Parameter(torch.empty(width, dtype=wide))
        self.A_log = nn.Parameter(torch.empty(width, n, dtype=wide))
        self.D = nn.Parameter(torch.empty(width, dtype=wide))
        norms = {} if config.mamba_inner_epsilon is None else self.sizes
        self.norms = nn.ParameterDict({name: torch.empty(size, dtype=dtype) for name, size in norms.items()})

    @property
    def A(self) -> Tensor:
        """(c, n)."""
        return -self.A_log.exp()

    def scan_inputs(self, convolved: Tensor) -> SelectiveInputs:
        """What the scan reads, from the channels behind the convolution (b, s, c)."""
        x = F.silu(convolved)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dt, B, C = map(self._normed, self.sizes, self.x_proj(x).split(tuple(self.sizes.values()), dim=-1))
        steps = time_steps(self.dt_proj(dt.to(x.dtype)), self.dt_bias, self.config.time_step_limit)
        return SelectiveInputs(steps, steps * wide, B, C, wide * self.D)

    def _normed(self, name: str, part: Tensor) -> Tensor:
        wide, epsilon = torch.promote_types(part.dtype, torch.float32), self.config.mamba_inner_epsilon
        return part.to(wide) if epsilon is None else rms_norm(part, self.norms[name], epsilon, wide)

    def gate(self, z: Tensor) -> Tensor:
        """What the outputs are multiplied by."""
        return F.silu(z)

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        self.x_proj.pack_(dtype, pack)
        self.dt_proj.pack_(dtype, pack)

    def released_tensors(self) -> dict[str, Tensor]:
        found = {"dt_bias": self.dt_bias.data, "A_log": self.A_log.data, "D": self.D.data}
        found |= {f"{name}.weight": weight.data for name, weight in self.norms.items()}
        found |= self.x_proj.released_tensors(("x_proj",), (self.x_proj.outputs,))
        return found | self.dt_proj.released_tensors(("dt_proj",), (self.dt_proj.outputs,))
