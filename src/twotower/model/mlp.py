"""The `-` mixer: a two-layer network. Letters: d width, f inner width."""

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Linear, Pack
from twotower.ops.mlp import Activation, mlp


class MLP(nn.Module):
    """down(φ(up(x))), or down(φ(gate(x)) · up(x)) where the config has gated MLPs, see `ops.mlp.Activation`."""

    def __init__(self, config: TwoTowerConfig, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.mlp_bias
        self.names = ("gate_proj", "up_proj") if config.gated_mlp else ("up_proj",)
        self.inner = inner
        self.up_proj = Linear(width, inner * len(self.names), bias=bias, dtype=dtype)
        self.down_proj = Linear(inner, width, bias=bias, dtype=dtype)
        learned = config.mlp_hidden_act == "xielu"
        self.alphas = nn.Parameter(torch.empty(2, dtype=dtype)) if learned else None
        self.plain = plain_activation(config)

    @property
    def activation(self) -> Activation:
        """The activation, with the parameters that it has learned."""
        return self.plain._replace(alphas=self.alphas)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up_proj, self.down_proj
        return mlp(x, up.operand, down.operand, up.bias, down.bias, self.activation)

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        self.up_proj.pack_(dtype, pack)
        self.down_proj.pack_(dtype, pack)
        if self.alphas is not None:
            self.alphas.data = self.alphas.data.to(dtype)

    def released_tensors(self) -> dict[str, Tensor]:
        found = self.up_proj.released_tensors(self.names, (self.inner,) * len(self.names))
        found |= self.down_proj.released_tensors(("down_proj",), (self.down_proj.outputs,))
        if self.alphas is not None:  # Apertus' names, and one number each
            found |= {"alpha_p": self.alphas.data[:1], "alpha_n": self.alphas.data[1:]}
        return found


def plain_activation(config: TwoTowerConfig) -> Activation:
    """The activation of a model's MLPs and experts, without learned parameters."""
    return Activation(
        config.mlp_hidden_act, config.gated_mlp, config.glu_limit, config.glu_offset, gate_scale=config.glu_gate_scale
    )
