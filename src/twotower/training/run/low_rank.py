"""LoRA (arXiv 2106.09685): a tower that learns by low-rank additions to its projections.

Letters: r rank, i inputs, o outputs, e experts.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from twotower.model.linear import Linear
from twotower.model.moe import MixtureOfExperts
from twotower.model.tower import Tower


class LowRank(nn.Module):
    """weight + up · down for a weight (o, i) or (e, o, i): up (…, o, r) starts at 0, down (…, r, i) random."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *experts, outputs, inputs = weight.shape
        wide = torch.promote_types(weight.dtype, torch.float32)
        # Weights that are still to come say nothing about the device
        device = None if weight.is_meta else weight.device
        self.up = nn.Parameter(torch.zeros(*experts, outputs, rank, dtype=wide, device=device))
        self.down = nn.Parameter(torch.empty(*experts, rank, inputs, dtype=wide, device=device))
        if not self.down.is_meta:  # nothing to draw there
            drawn = torch.randn(self.down.shape, generator=generator) * inputs**-0.5
            self.down.data.copy_(drawn)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight to multiply by, in the dtype of the one that stays."""
        return weight + (self.up @ self.down).to(weight.dtype)


def add_low_rank_(tower: Tower, rank: int) -> None:
    """Gives every projection of a tower's layers an addition of `rank`, which starts at 0; the projections themselves
    are frozen. The tower's `released_tensors` are the sums. Raises ValueError for a rank that no projection could
    have."""
    projections = [(module, name) for module in tower.modules() for name in _projections(module)]
    highest = min(size for module, name in projections for size in getattr(module, name).shape[-2:])
    if rank > highest:
        raise ValueError(f"lora_rank is {rank}, must be 1 to {highest}, the smallest projection's, or 0 to train all")
    generator = torch.Generator().manual_seed(0)
    for module, name in projections:
        weight = getattr(module, name).requires_grad_(False)
        added = LowRank(weight, rank, generator)
        # Unsafe only in that it isn't called once to see what it gives: weights may still be on the meta device
        parametrize.register_parametrization(module, name, added, unsafe=True)


def _projections(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own projections."""
    if isinstance(module, Linear):
        return ("weight",)
    return ("up", "down") if isinstance(module, MixtureOfExperts) else ()


def plain_name(name: str) -> str:
    """A parameter's name without what an addition to it puts around it."""
    return name.replace(".parametrizations.", ".").removesuffix(".original")
