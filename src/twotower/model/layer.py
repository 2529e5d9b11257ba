"""One residual layer: a mixer and its norms. Letters: b batch, s tokens, d width."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.attention import Attention
from twotower.model.delta_net import DeltaNet
from twotower.model.linear import Pack
from twotower.model.mamba2 import Mamba2
from twotower.model.mlp import MLP
from twotower.model.moe import MixtureOfExperts
from twotower.model.norm import Norm
from twotower.model.recurrent import RECURRENT_KINDS
from twotower.model.selective import SelectiveMixer
from twotower.model.time_conditioning import Modulation
from twotower.ops.norm import modulate, residual_sum

T = TypeVar("T")
RecurrentMixer = Mamba2 | DeltaNet | SelectiveMixer


class Layer(nn.Module):
    """y = x + post_norm(mixer(norm(x))), with the denoiser's modulation where one is given.

    Either norm may be missing. A layer that `joins` reads the x that the layer before it has read. `index` is its place
    in the config's pattern, and `memory` says which of a context state's recurrent states, or of its keys and values,
    are those of the layer of this index.
    """

    def __init__(self, config: TwoTowerConfig, index: int, dtype: torch.dtype, *, joins: bool) -> None:
        super().__init__()
        self.index = index
        self.kind = kind = config.pattern[index]
        self.joins = joins
        alike = RECURRENT_KINDS if kind in RECURRENT_KINDS else kind
        self.memory = sum(other in alike for other in config.pattern[:index])
        self.scale = config.layer_scale(kind)
        self.norm = Norm(config, config.hidden_size, dtype=dtype) if config.pre_norm else None
        self.post_norm = Norm(config, config.hidden_size, dtype=dtype) if config.post_norm else None
        self.mixer: Attention | RecurrentMixer | MLP | MixtureOfExperts
        if kind == "M":
            self.mixer = Mamba2(config, dtype)
        elif kind == "G":
            self.mixer = DeltaNet(config, dtype)
        elif kind in "SR":
            self.mixer = SelectiveMixer(config, kind, dtype)
        elif kind == "*":
            self.mixer = Attention(config, self.memory, dtype)
        elif kind == "-":
            self.mixer = MLP(config, config.intermediate_size, dtype)
        else:
            self.mixer = MixtureOfExperts(config, dtype)

    def forward(self, function: Callable[..., T], *arguments: object) -> T:
        """function(*arguments), called inside this module, so that FSDP's hooks gather the layer's sharded parameters
        for as long as the function runs."""
        return function(*arguments)

    def enter(self, x: Tensor, modulation: Modulation | None, dtype: torch.dtype) -> Tensor:
        """The mixer's input (b, s, d) in `dtype`. Recurrent layers and `*` modulate before the norm, `E` and `-`
        after it."""
        if modulation is None:
            return x.to(dtype) if self.norm is None else self.norm(x, dtype)
        shift, scale = modulation.shift, modulation.scale
        if self.norm is None:
            return modulate(x, shift, scale).to(dtype)
        return self.norm.modulated(x, shift, scale, norm_first=self.kind in "E-", dtype=dtype)

    def leave(self, x: Tensor, mixed: Tensor, modulation: Modulation | None) -> Tensor:
        """x + mixed · gate: mixed after the last norm, if there is one, and with the gate, if there is one."""
        if self.post_norm is not None:
            mixed = self.post_norm(mixed, mixed.dtype)
        if self.scale != 1.0:
            mixed = mixed * self.scale
        return residual_sum(x, mixed, None if modulation is None else modulation.gate)

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        self.mixer.pack_(dtype, pack)
        for norm in (self.norm, self.post_norm):
            if norm is not None:
                norm.pack_(dtype)

    def released_tensors(self) -> dict[str, Tensor]:
        found = {} if self.norm is None else self.norm.released_tensors("norm")
        found |= {f"mixer.{k}": v for k, v in self.mixer.released_tensors().items()}
        return found if self.post_norm is None else found | self.post_norm.released_tensors("post_norm")
