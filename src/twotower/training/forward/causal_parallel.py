"""The training pass of one tower by itself, causal within each document of a row.

Letters: b batch, t tokens, d width, l `E` layers, e experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.model.layer import Layer
from twotower.model.moe import MixtureOfExperts
from twotower.model.tower import Tower
from twotower.training.forward.layout import Layout
from twotower.training.forward.recompute import maybe_recomputed
from twotower.training.forward.seeded_mixers import CHUNK_SIZE, Plan, causal_mixed, make_plan


class Causal(NamedTuple):
    """The last hidden states (b, t, d), and the number of tokens that each expert of each `E` layer got (l, e)."""

    hidden: Tensor
    loads: Tensor


def causal_hidden(
    tower: Tower, x0: Tensor, layout: Layout, *, chunk_size: int = CHUNK_SIZE, recompute: bool = False
) -> Causal:
    """The last hidden states of x0 (b, t) int64, each document by itself; differentiable.

    The same as the context tower's states in `block_parallel_hidden`; the blocks of `layout` have no influence.
    `recompute` and `chunk_size` are explained there.
    """
    plan = make_plan(tower.config, layout, chunk_size=chunk_size, dtype=tower.activation_dtype)
    recompute = recompute and torch.is_grad_enabled()
    x = read = tower.embed(x0, layout.position)
    loads = [x.new_zeros(0, tower.config.num_experts, dtype=torch.float32)]
    for layer in tower.stack:
        # Called, so that FSDP gathers the layer's shards: `Layer.forward` only calls the function it is given.
        read = read if layer.joins else x
        x, load = layer(maybe_recomputed, recompute, _layer, layer, x, read, plan, tower.activation_dtype)
        loads += [] if load is None else [load]
    return Causal(tower.finish(x), torch.cat(loads))


def _layer(layer: Layer, x: Tensor, read: Tensor, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The residual stream x (b, t, d) after the layer, which reads `read` (b, t, d), and the loads of its experts."""
    entered, load = layer.enter(read, None, dtype), None
    mixed = causal_mixed(layer.mixer, entered, plan, dtype)
    if isinstance(layer.mixer, MixtureOfExperts):
        load = _load(layer.mixer, entered)
    return layer.leave(x, mixed, None), load


@torch.no_grad()
def _load(mixer: MixtureOfExperts, entered: Tensor) -> Tensor:
    """(1, e): the number of tokens that each expert gets. Routes once more, which costs little beside the experts."""
    chosen = mixer.route(entered.flatten(0, 1)).experts.flatten()
    counts = torch.zeros(mixer.config.num_experts, dtype=torch.float32, device=chosen.device)
    return counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype)).unsqueeze(0)
