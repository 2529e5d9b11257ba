"""One residual layer: a norm and a mixer. Letters: b batch, s tokens, d width."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.attention import Attention
from twotower.model.linear import Pack
from twotower.model.mamba2 import Mamba2
from twotower.model.mlp import MLP
from twotower.model.moe import MixtureOfExperts
from twotower.model.time_conditioning import Modulation
from twotower.ops.norm import modulated_rms_norm, residual_sum, rms_norm

T = TypeVar("T")


class Layer(nn.Module):
    """y = x + mixer(norm(x)), with the denoiser's modulation where one is given."""

    def __init__(self, config: TwoTowerConfig, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        self.eps = config.layer_norm_epsilon
        self.norm = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))
        self.mixer: Attention | Mamba2 | MLP | MixtureOfExperts
        if kind == "M":
            self.mixer = Mamba2(config, dtype)
        elif kind == "*":
            self.mixer = Attention(config, dtype)
        elif kind == "-":
            self.mixer = MLP(
                config.hidden_size, config.intermediate_size, gated=config.gated_mlp, bias=config.mlp_bias, dtype=dtype
            )
        else:
            self.mixer = MixtureOfExperts(config, dtype)

    def forward(self, function: Callable[..., T], *arguments: object) -> T:
        """function(*arguments), called inside this module, so that FSDP's hooks gather the layer's sharded parameters
        for as long as the function runs."""
        return function(*arguments)

    def enter(self, x: Tensor, modulation: Modulation | None, dtype: torch.dtype) -> Tensor:
        """The mixer's input (b, s, d) in `dtype`. `M` and `*` modulate before the norm, `E` and `-` after it."""
        if modulation is None:
            return rms_norm(x, self.norm, self.eps, dtype)
        shift, scale = modulation.shift, modulation.scale
        return modulated_rms_norm(x, self.norm, self.eps, shift, scale, norm_first=self.kind in "E-", dtype=dtype)

    def leave(self, x: Tensor, mixed: Tensor, modulation: Modulation | None) -> Tensor:
        """x + mixed, with the modulation's gate if there is one: x + mixed · gate."""
        return residual_sum(x, mixed, None if modulation is None else modulation.gate)

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        self.mixer.pack_(dtype, pack)
        self.norm.data = self.norm.data.to(torch.promote_types(dtype, torch.float32))

    def released_tensors(self) -> dict[str, Tensor]:
        return {"norm.weight": self.norm.data} | {f"mixer.{k}": v for k, v in self.mixer.released_tensors().items()}
