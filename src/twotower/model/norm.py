"""Norms with learnt weights. Letters: b batch, s tokens, d width."""

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.ops.norm import layer_norm, modulate, rms_norm


class Norm(nn.Module):
    """An RMSNorm or LayerNorm over the last dimension, as the config says, with a weight of the given shape.

    A shape of two dimensions gives each head a weight of its own. `bias` is for LayerNorm alone.
    """

    def __init__(self, config: TwoTowerConfig, *shape: int, dtype: torch.dtype, bias: bool | None = None) -> None:
        super().__init__()
        self.layer = config.norm_type == "layer"
        self.eps, self.offset = config.layer_norm_epsilon, config.norm_offset
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))
        has_bias = config.norm_bias if bias is None else bias
        self.bias = nn.Parameter(torch.empty(shape, dtype=dtype)) if has_bias else None

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The norm of x (…, d), computed in at least float32, as `dtype`."""
        weight: Tensor = self.weight
        if self.offset != 0:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset
        if self.layer:
            return layer_norm(x, weight, self.bias, self.eps, dtype)
        return rms_norm(x, weight, self.eps, dtype)

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor, *, norm_first: bool, dtype: torch.dtype) -> Tensor:
        """The norm of x (b, s, d) and the modulation x·(1 + scale) + shift, before it or (`norm_first`) after it, as
        `dtype`; shift, scale (b, 1 or s, d)."""
        if norm_first:
            return modulate(self(x, dtype), shift, scale)
        return self(modulate(x, shift, scale), dtype)

    def pack_(self, dtype: torch.dtype) -> None:
        """Prepares for inference with activations of `dtype`; the norm can't be trained or saved any more."""
        wide = torch.promote_types(dtype, torch.float32)
        self.weight.data = self.weight.data.to(wide) + self.offset
        self.offset = 0.0
        if self.bias is not None:
            self.bias.data = self.bias.data.to(wide)

    def released_tensors(self, name: str) -> dict[str, Tensor]:
        """Its tensors under the released name of the norm."""
        found = {f"{name}.weight": self.weight.data}
        return found if self.bias is None else found | {f"{name}.bias": self.bias.data}
