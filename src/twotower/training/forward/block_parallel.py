"""The training pass of both towers: the denoiser over every block of a sequence at once (see `layout` for a drawing).

Letters: b batch, v views (noisy versions of one row), t tokens, d width, l noise levels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.config_rules import SEEDED_KINDS
from twotower.model.attention import Attention
from twotower.model.layer import Layer, RecurrentMixer
from twotower.model.time_conditioning import Modulation
from twotower.model.two_tower import TwoTower
from twotower.training.forward.layout import Layout
from twotower.training.forward.recompute import maybe_recomputed
from twotower.training.forward.seeded_mixers import (
    CHUNK_SIZE,
    Plan,
    block_mixed,
    causal_mixed,
    context_mixed,
    context_seed,
    make_plan,
)


class Hidden(NamedTuple):
    """The last hidden states of the denoiser (v·b, t, d) and, where asked for, of the context tower (b, t, d)."""

    denoiser: Tensor
    context: Tensor | None


def block_parallel_hidden(
    model: TwoTower,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    layout: Layout,
    *,
    chunk_size: int = CHUNK_SIZE,
    recompute: bool = False,
    with_context: bool = False,
) -> Hidden:
    """Both towers' last hidden states: the context tower's of clean tokens x0, the denoiser's of noisy tokens xt.

    x0 (b, t) int64; xt (v·b, t) int64, v noisy versions of x0 stacked; t (v·b, t) float, each position's noise level,
    constant within a block. Every block is computed as decoding would compute it: from its own noisy tokens and the
    context tower's keys, convolution rows and recurrent state before it. Both towers advance one layer at a time.

    Where no parameter of the context tower requires a gradient, it runs without one, and without `with_context` only up
    to the last layer that seeds the denoiser. `recompute` keeps one residual stream per layer and recomputes the rest
    in backward, one layer at a time, which takes a third more time. `chunk_size` is the number of tokens in a chunk of
    the scan; it and `recompute` change nothing in the result but, in the case of `chunk_size`, rounding. Raises
    ValueError where shapes don't fit.
    """
    config = model.config
    context, denoiser = model.context_tower, model.denoiser_tower
    if xt.shape[0] % x0.shape[0] or xt.shape[1:] != x0.shape[1:]:
        raise ValueError(f"xt is {tuple(xt.shape)} for x0 {tuple(x0.shape)}, must be (a multiple of rows, tokens)")
    if layout.block.shape[1] != x0.shape[1] or layout.block.shape[0] not in (1, x0.shape[0]):
        rows, tokens = layout.block.shape
        raise ValueError(f"the layout is {rows} rows of {tokens} tokens, must be 1 or x0's {tuple(x0.shape)}")
    dtype = denoiser.activation_dtype
    plan = make_plan(config, layout, chunk_size=chunk_size, dtype=dtype)
    levels, index = _distinct(t)
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in context.parameters())
    with torch.set_grad_enabled(learns):
        clean: Tensor | None = context.embed(x0, layout.position)
    noisy = denoiser.embed(xt, layout.position.repeat(xt.shape[0] // layout.position.shape[0], 1))
    # The number of layers after which the context tower's residual stream is still read: above the last layer that
    # seeds the denoiser it is read by nothing but its own head.
    top = config.num_layers if with_context else config.last_seeding_layer
    shared = model.time_conditioning.shared(levels)
    recompute = recompute and torch.is_grad_enabled()
    noisy_read, clean_read = noisy, clean
    number = dict(zip(config.denoiser_indices, range(len(denoiser.stack)), strict=True))
    # `Layer.forward` only calls the function it is given. A pair runs inside both layers' forward, below's and layer's,
    # because FSDP gathers a module's shards in hooks around it.
    for i, below in enumerate(context.stack):
        clean_read = clean_read if below.joins else clean
        if i in number:
            layer, table = denoiser.stack[number[i]], model.time_conditioning.tables[number[i]]
            noisy_read = noisy_read if layer.joins else noisy
            step = _LayerPair(below, layer, plan, dtype, learns, i < top)
            # FSDP wraps every tensor that a layer is given: one that is given twice has its gradient rounded twice
            earlier = _Streams(noisy_read, clean_read) if layer.joins or below.joins else None
            noisy, clean = below(layer, step.run, noisy, clean, earlier, table, shared, index, recompute)
        elif i < top:
            with torch.set_grad_enabled(learns):
                clean = below(maybe_recomputed, recompute and learns, _alone, below, clean, clean_read, plan, dtype)
    with torch.set_grad_enabled(learns):
        finished = context.finish(clean) if with_context and clean is not None else None
    return Hidden(denoiser.finish(noisy), finished)


@torch.compiler.disable  # the number of levels depends on values
def _distinct(t: Tensor) -> tuple[Tensor, Tensor]:
    """The noise levels (l,) that occur in t (v·b, t), at most one per block, and each position's index among them."""
    levels, index = t.unique(return_inverse=True)
    return levels, index


class _Streams(NamedTuple):
    """The residual streams that a layer reads: noisy (v·b, t, d) and, while anything reads it, clean (b, t, d)."""

    noisy: Tensor
    clean: Tensor | None


class _LayerPair(NamedTuple):
    """The same layer of both towers: `below` of the context tower, `layer` of the denoiser.

    `learns`: the context tower gets a gradient. `needs_clean`: something reads the context tower above this layer.
    """

    below: Layer
    layer: Layer
    plan: Plan
    dtype: torch.dtype
    learns: bool
    needs_clean: bool

    def run(
        self,
        noisy: Tensor,
        clean: Tensor | None,
        earlier: _Streams | None,
        table: Tensor,
        shared: Tensor,
        index: Tensor,
        recompute: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual streams after this layer: noisy (v·b, t, d) and clean (b, t, d), None once nothing reads it.

        `earlier` are the streams that a parallel layer reads; others read `noisy` and `clean`. `table`, `shared` and
        `index` are the arguments of `_modulation`."""
        time = (table, shared, index)
        noisy_read, clean_read = earlier or (noisy, clean)
        if self.layer.kind in SEEDED_KINDS:
            return maybe_recomputed(recompute, self._seeded, noisy, clean, noisy_read, clean_read, *time)
        if self.needs_clean:
            assert clean is not None
            with torch.set_grad_enabled(self.learns):
                clean = maybe_recomputed(recompute and self.learns, self._clean, clean, clean_read)
        return maybe_recomputed(recompute, self._noisy, noisy, noisy_read, *time), clean if self.needs_clean else None

    def _seeded(
        self,
        noisy: Tensor,
        clean: Tensor,
        noisy_read: Tensor,
        clean_read: Tensor,
        table: Tensor,
        shared: Tensor,
        index: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        context, mixer = self.below.mixer, self.layer.mixer
        assert isinstance(context, RecurrentMixer | Attention)
        assert isinstance(mixer, RecurrentMixer | Attention)
        with torch.set_grad_enabled(self.learns):
            seed = context_seed(context, self.below.enter(clean_read, None, self.dtype), self.plan)
        own = _modulation(table, shared, index)
        entered = self.layer.enter(noisy_read, own, self.dtype)
        views = [block_mixed(mixer, x, seed, self.plan, self.dtype) for x in entered.split(clean.shape[0])]
        noisy = self.layer.leave(noisy, views[0] if len(views) == 1 else torch.cat(views), own)
        if not self.needs_clean:
            return noisy, None
        # Computed last: recomputing in backward stops at the last tensor that backward needs, which for a frozen
        # context tower is before this.
        with torch.set_grad_enabled(self.learns):
            return noisy, self.below.leave(clean, context_mixed(context, seed, self.plan, self.dtype), None)

    def _clean(self, clean: Tensor, read: Tensor) -> Tensor:
        mixer = self.below.mixer
        assert not isinstance(mixer, RecurrentMixer | Attention)
        return self.below.leave(clean, mixer(self.below.enter(read, None, self.dtype)), None)

    def _noisy(self, noisy: Tensor, read: Tensor, table: Tensor, shared: Tensor, index: Tensor) -> Tensor:
        mixer = self.layer.mixer
        assert not isinstance(mixer, RecurrentMixer | Attention)
        own = _modulation(table, shared, index)
        return self.layer.leave(noisy, mixer(self.layer.enter(read, own, self.dtype)), own)


def _alone(below: Layer, clean: Tensor, read: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """The context tower's residual stream clean (b, t, d) after a layer that seeds nothing, and reads `read`."""
    return below.leave(clean, causal_mixed(below.mixer, below.enter(read, None, dtype), plan, dtype), None)


def _modulation(table: Tensor, shared: Tensor, index: Tensor) -> Modulation:
    """A layer's shift, scale and gate (v·b, t, d) at every position: the layer's own table (3, d) plus the part that
    all layers share of each noise level (l, 3, d), looked up by index (v·b, t)."""
    return Modulation(*(F.embedding(index, part) for part in (shared + table).unbind(1)))
