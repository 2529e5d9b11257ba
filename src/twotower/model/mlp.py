"""The `-` mixer. Letters: d width, f inner width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.model.linear import Linear


class MLP(nn.Module):
    """down(relu(up(x))²), or down(silu(gate(x)) · up(x)) when gated (the Llama family's)."""

    def __init__(self, width: int, inner: int, *, gated: bool, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.names = ("gate_proj", "up_proj") if gated else ("up_proj",)
        self.inner = inner
        self.up_proj = Linear(width, inner * len(self.names), bias=bias, dtype=dtype)
        self.down_proj = Linear(inner, width, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up_proj(x)
        if len(self.names) == 2:
            gate, up = hidden.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(hidden.relu().square())

    def pack_(self, dtype: torch.dtype) -> None:
        self.up_proj.pack_(dtype)
        self.down_proj.pack_(dtype)

    def released_tensors(self) -> dict[str, Tensor]:
        up = self.up_proj.released_tensors(self.names, (self.inner,) * len(self.names))
        return up | self.down_proj.released_tensors(("down_proj",), (self.down_proj.outputs,))
