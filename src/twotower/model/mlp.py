"""The `-` mixer: a two-layer network. Letters: d width, f inner width."""

import torch
from torch import Tensor, nn

from twotower.model.linear import Linear, Pack
from twotower.ops.mlp import mlp


class MLP(nn.Module):
    """down(relu(up(x))²), or down(silu(gate(x)) · up(x)) when gated (the Llama family's)."""

    def __init__(self, width: int, inner: int, *, gated: bool, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.names = ("gate_proj", "up_proj") if gated else ("up_proj",)
        self.inner = inner
        self.up_proj = Linear(width, inner * len(self.names), bias=bias, dtype=dtype)
        self.down_proj = Linear(inner, width, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up_proj, self.down_proj
        return mlp(x, up.operand, down.operand, up.bias, down.bias, gated=len(self.names) == 2)

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        self.up_proj.pack_(dtype, pack)
        self.down_proj.pack_(dtype, pack)

    def released_tensors(self) -> dict[str, Tensor]:
        up = self.up_proj.released_tensors(self.names, (self.inner,) * len(self.names))
        return up | self.down_proj.released_tensors(("down_proj",), (self.down_proj.outputs,))
