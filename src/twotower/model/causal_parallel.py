"""The training pass of one tower by itself, over packed rows. Letters: b batch, t tokens, d width."""

import torch
from torch import Tensor

from twotower.model.attention import Attention, rotation
from twotower.model.block_parallel import CHUNK_SIZE, maybe_recomputed
from twotower.model.layer import Layer
from twotower.model.layout import Layout
from twotower.model.mamba2 import Mamba2
from twotower.model.seeded_mixers import Plan, context_mixed, context_seed, make_plan
from twotower.model.tower import Tower


def causal_hidden(
    tower: Tower, x0: Tensor, layout: Layout, *, chunk_size: int = CHUNK_SIZE, recompute: bool = False
) -> Tensor:
    """The last hidden states (b, t, d) of x0 (b, t) int64, each document by itself; differentiable.

    This is what `block_parallel_hidden` computes as its context; the blocks of `layout` don't matter. `recompute` and
    `chunk_size` are as there.
    """
    plan = _prepare(tower, layout, chunk_size)
    x = tower.embed(x0)
    for layer in tower.stack:
        x = layer(
            maybe_recomputed, recompute and torch.is_grad_enabled(), _layer, layer, x, plan, tower.activation_dtype
        )
    return tower.finish(x)


@torch.compiler.disable  # sizes depend on values
def _prepare(tower: Tower, layout: Layout, chunk_size: int) -> Plan:
    c = tower.config
    rope = rotation(layout.position, c.head_dim, c.rope_theta, tower.activation_dtype) if c.use_rope else None
    return make_plan(layout, chunk_size=chunk_size if "M" in c.pattern else None, conv_kernel=c.conv_kernel, rope=rope)


def _layer(layer: Layer, x: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    entered = layer.enter(x, None, dtype)
    if isinstance(layer.mixer, Mamba2 | Attention):
        mixed = context_mixed(layer.mixer, context_seed(layer.mixer, entered, plan), plan, dtype)
    else:
        mixed = layer.mixer(entered)
    return layer.leave(x, mixed, None)
