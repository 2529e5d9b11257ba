"""A single tower with its head: the backbone that two towers start from."""

import math
from collections.abc import Iterator

import tokenizers
import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.head import Head
from twotower.model.tower import Tower

_STD = 0.02
# Range of a fresh layer's time steps, and of the decay rates -A.
_TIME_STEPS = (1e-3, 0.1)
_RATES = (1.0, 16.0)
# Range of an RG-LRU's decays where its gates are half open
_DECAYS = (0.9, 0.999)
# Recurrent mixers' own norms have no offset.
_WITHOUT_OFFSET = (".D", "mixer.norm.weight", "dt_norm.weight", "b_norm.weight", "c_norm.weight")


class OneTower(nn.Module):
    """A causal language model with the shapes of one of `TwoTower`'s towers. Parameters are not initialised."""

    def __init__(self, config: TwoTowerConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: tokenizers.Tokenizer | None = None
        self.tower = Tower(config, dtype)
        self.lm_head = Head(config, dtype)
        if config.tie_word_embeddings:
            self.lm_head.tie_(self.tower.embeddings)

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        """Sets the weights to `initial_tensors`."""
        places = self.released_tensors()
        for name, tensor in self.initial_tensors(seed):
            places[name].copy_(tensor)

    def initial_tensors(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Random weights as this family starts, one tensor at a time on the CPU, by its released name: normal of
        deviation 0.02, narrower by √layers where a layer writes to the residual stream; time steps log-uniform in
        [1e-3, 0.1], decay rates uniform in [1, 16]."""
        generator = torch.Generator().manual_seed(seed)
        for name, place in self.released_tensors().items():
            tensor = torch.empty_like(place, device="cpu")
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                plain = name.endswith(_WITHOUT_OFFSET)
                tensor.fill_(1.0 if plain else 1.0 - self.config.norm_offset)
            elif name.endswith("dt_bias"):
                low, high = map(math.log, _TIME_STEPS)
                steps = tensor.uniform_(low, high, generator=generator).exp()
                tensor.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the steps
            elif name.endswith("A_log"):
                tensor.uniform_(*_RATES, generator=generator).log_()
            elif name.endswith("recurrent_param"):
                decays = tensor.uniform_(*_DECAYS, generator=generator)
                tensor.copy_(torch.expm1(-0.25 * decays.log()).log())  # a = exp(−8·½·softplus)
            elif name.endswith("bias"):
                tensor.zero_()
            elif name.endswith("conv1d.weight"):
                bound = tensor.shape[-1] ** -0.5
                tensor.uniform_(-bound, bound, generator=generator)
            else:
                writes = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
                std = _STD / self.config.num_layers**0.5 if writes else _STD
                tensor.normal_(0, std, generator=generator)
            yield name, tensor

    def released_tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name it has in a single-tower checkpoint, as a view of this model's parameters."""
        found = {f"backbone.{name}": tensor for name, tensor in self.tower.released_tensors().items()}
        return found | self.lm_head.released_tensors("lm_head")
