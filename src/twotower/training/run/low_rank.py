"""LoRA (arXiv 2106.09685): training low-rank additions to a tower's projections instead of the projections.

Letters: r rank, i inputs, o outputs, e experts.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from twotower.errors import SettingError
from twotower.model.linear import Linear
from twotower.model.moe import MixtureOfExperts
from twotower.model.tower import Tower


class LowRank(nn.Module):
    """weight + up · down, for a weight (o, i) or (e, o, i) with up (…, o, r), which starts at 0, and down (…, r, i),
    which starts random."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *experts, outputs, inputs = weight.shape
        wide = torch.promote_types(weight.dtype, torch.float32)
        # The device of a weight that is not loaded yet ("meta") says nothing; the default device is used then.
        device = None if weight.is_meta else weight.device
        self.up = nn.Parameter(torch.zeros(*experts, outputs, rank, dtype=wide, device=device))
        self.down = nn.Parameter(torch.empty(*experts, rank, inputs, dtype=wide, device=device))
        if not self.down.is_meta:
            drawn = torch.randn(self.down.shape, generator=generator) * inputs**-0.5
            self.down.data.copy_(drawn)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its addition, in the weight's dtype."""
        return weight + (self.up @ self.down).to(weight.dtype)


def add_low_rank_(tower: Tower, rank: int) -> None:
    """Freezes every projection of a tower's layers and gives it a trainable addition of rank `rank`, which starts at 0.

    `tower.released_tensors()` then gives the sums. Raises SettingError for a rank above the smallest projection's.
    """
    projections = [(module, name) for module in tower.modules() for name in _projections(module)]
    highest = min(size for module, name in projections for size in getattr(module, name).shape[-2:])
    if rank > highest:
        raise SettingError("lora_rank", rank, f"1 to {highest}, the smallest projection's, or 0 to train all")
    generator = torch.Generator().manual_seed(0)
    for module, name in projections:
        weight = getattr(module, name).requires_grad_(False)
        added = LowRank(weight, rank, generator)
        # `unsafe` skips a trial call that checks shape and dtype, which fails for weights on the meta device.
        parametrize.register_parametrization(module, name, added, unsafe=True)


def _projections(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own projections."""
    if isinstance(module, Linear):
        return ("weight",)
    return ("up", "down") if isinstance(module, MixtureOfExperts) else ()


def plain_name(name: str) -> str:
    """A parameter's name as it is without a low-rank addition, which PyTorch's parametrizations change."""
    return name.replace(".parametrizations.", ".").removesuffix(".original")
