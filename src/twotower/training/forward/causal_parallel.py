"""The training pass of one tower by itself, over packed rows.

Letters: b batch, t tokens, d width, l `E` layers, e experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.model.attention import Attention, rotation
from twotower.model.layer import Layer
from twotower.model.mamba2 import Mamba2
from twotower.model.moe import MixtureOfExperts
from twotower.model.tower import Tower
from twotower.training.forward.block_parallel import CHUNK_SIZE, maybe_recomputed
from twotower.training.forward.layout import Layout
from twotower.training.forward.seeded_mixers import Plan, context_mixed, context_seed, make_plan


class Causal(NamedTuple):
    """The last hidden states (b, t, d), and how many tokens each expert of each `E` layer got (l, e)."""

    hidden: Tensor
    loads: Tensor


def causal_hidden(
    tower: Tower, x0: Tensor, layout: Layout, *, chunk_size: int = CHUNK_SIZE, recompute: bool = False
) -> Causal:
    """The last hidden states of x0 (b, t) int64, each document by itself; differentiable.

    This is what `block_parallel_hidden` computes as its context; the blocks of `layout` don't matter. `recompute` and
    `chunk_size` are as there.
    """
    plan = _prepare(tower, layout, chunk_size)
    recompute = recompute and torch.is_grad_enabled()
    x = tower.embed(x0)
    loads = [x.new_zeros(0, tower.config.num_experts, dtype=torch.float32)]
    for layer in tower.stack:
        x, load = layer(maybe_recomputed, recompute, _layer, layer, x, plan, tower.activation_dtype)
        loads += [] if load is None else [load]
    return Causal(tower.finish(x), torch.cat(loads))


@torch.compiler.disable  # sizes depend on values
def _prepare(tower: Tower, layout: Layout, chunk_size: int) -> Plan:
    c = tower.config
    rope = rotation(layout.position, c.head_dim, c.rope_theta, tower.activation_dtype) if c.use_rope else None
    return make_plan(layout, chunk_size=chunk_size if "M" in c.pattern else None, conv_kernel=c.conv_kernel, rope=rope)


def _layer(layer: Layer, x: Tensor, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    entered, load = layer.enter(x, None, dtype), None
    if isinstance(layer.mixer, Mamba2 | Attention):
        mixed = context_mixed(layer.mixer, context_seed(layer.mixer, entered, plan), plan, dtype)
    else:
        mixed = layer.mixer(entered)
    if isinstance(layer.mixer, MixtureOfExperts):
        load = _load(layer.mixer, entered)
    return layer.leave(x, mixed, None), load


@torch.no_grad()
def _load(mixer: MixtureOfExperts, entered: Tensor) -> Tensor:
    """(1, e): routed once more, which costs little beside the experts."""
    chosen = mixer.route(entered.flatten(0, 1)).experts.flatten()
    counts = torch.zeros(mixer.config.num_experts, dtype=torch.float32, device=chosen.device)
    return counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype)).unsqueeze(0)
