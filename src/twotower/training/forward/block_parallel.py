"""The training pass: the denoiser over every block of a sequence at once.

Letters: b batch, v views (noisy versions of one row), t tokens, d width, l noise levels.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twotower.model.attention import Attention, rotation
from twotower.model.layer import Layer
from twotower.model.mamba2 import Mamba2
from twotower.model.time_conditioning import Modulation
from twotower.model.two_tower import TwoTower
from twotower.training.forward.layout import Layout
from twotower.training.forward.seeded_mixers import Plan, block_mixed, context_mixed, context_seed, make_plan

T = TypeVar("T")

# Tokens of a chunk of the scan, which keeps one state per chunk and products quadratic in it.
CHUNK_SIZE = 64


class Hidden(NamedTuple):
    """The denoiser's last hidden (v·b, t, d) and, where asked for, the context tower's (b, t, d)."""

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
    """Both towers' last hidden states for noisy tokens xt given the context tower's pass over clean tokens x0.

    x0 (b, t) int64; xt (v·b, t) int64, v noisy versions of x0 stacked; t (v·b, t) each position's noise level
    (constant within a block). A position sees the context tower's keys, convolution rows and SSM state of earlier
    blocks of its document, and the noisy tokens of its own block. The towers advance layer by layer. Where no parameter
    of the context tower requires a gradient it runs without one, and only as far up as something reads it.

    `recompute` keeps one residual stream per layer and computes the rest again in backward, with only one layer's
    tensors live, for a third more time. The result doesn't depend on it, nor, but for rounding, on `chunk_size`.
    """
    config = model.config
    context, denoiser = model.context_tower, model.denoiser_tower
    if xt.shape[0] % x0.shape[0] or xt.shape[1:] != x0.shape[1:]:
        raise ValueError(f"xt is {tuple(xt.shape)} for x0 {tuple(x0.shape)}, must be (a multiple of rows, tokens)")
    if layout.block.shape[1] != x0.shape[1] or layout.block.shape[0] not in (1, x0.shape[0]):
        rows, tokens = layout.block.shape
        raise ValueError(f"the layout is {rows} rows of {tokens} tokens, must be 1 or x0's {tuple(x0.shape)}")
    dtype = denoiser.activation_dtype
    plan, levels, index = _prepare(model, t, layout, chunk_size)
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in context.parameters())
    with torch.set_grad_enabled(learns):
        clean: Tensor | None = context.embed(x0)
    noisy = denoiser.embed(xt)
    # Above the last layer that seeds the denoiser nobody reads the context tower
    top = len(config.pattern) if with_context else max(config.pattern.rfind("M"), config.pattern.rfind("*"))
    shared = model.time_conditioning.shared(levels)
    for i, (below, layer) in enumerate(zip(context.stack, denoiser.stack, strict=True)):
        step = _LayerPair(below, layer, plan, dtype, learns, i < top)
        time = (model.time_conditioning.tables[i], shared, index)
        noisy, clean = below(layer, step.run, noisy, clean, *time, recompute and torch.is_grad_enabled())
    with torch.set_grad_enabled(learns):
        finished = context.finish(clean) if with_context and clean is not None else None
    return Hidden(denoiser.finish(noisy), finished)


class _Prepared(NamedTuple):
    """What doesn't depend on weights or tokens: the plan, the levels (l,) and which of them each position has."""

    plan: Plan
    levels: Tensor
    which: Tensor


@torch.compiler.disable  # sizes depend on values
def _prepare(model: TwoTower, t: Tensor, layout: Layout, chunk_size: int) -> _Prepared:
    config, dtype = model.config, model.denoiser_tower.activation_dtype
    rope = rotation(layout.position, config.head_dim, config.rope_theta, dtype) if config.use_rope else None
    plan = make_plan(
        layout, chunk_size=chunk_size if "M" in config.pattern else None, conv_kernel=config.conv_kernel, rope=rope
    )
    levels, index = t.unique(return_inverse=True)  # few: one per block of each row at most
    return _Prepared(plan, levels, index)


class _LayerPair(NamedTuple):
    """The same layer of both towers."""

    below: Layer
    layer: Layer
    plan: Plan
    dtype: torch.dtype
    learns: bool
    needs_clean: bool

    def run(
        self, noisy: Tensor, clean: Tensor | None, table: Tensor, shared: Tensor, index: Tensor, recompute: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The next residual streams: noisy (v·b, t, d) and, while it is needed, clean (b, t, d); `table`, `shared` and
        `index` are what `_modulation` reads."""
        time = (table, shared, index)
        if self.layer.kind in "M*":
            return maybe_recomputed(recompute, self._seeded, noisy, clean, *time)
        if self.needs_clean:
            assert clean is not None
            with torch.set_grad_enabled(self.learns):
                clean = maybe_recomputed(recompute and self.learns, self._clean, clean)
        return maybe_recomputed(recompute, self._noisy, noisy, *time), clean if self.needs_clean else None

    def _seeded(
        self, noisy: Tensor, clean: Tensor, table: Tensor, shared: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        context, mixer = self.below.mixer, self.layer.mixer
        assert isinstance(context, Mamba2 | Attention)
        assert isinstance(mixer, Mamba2 | Attention)
        with torch.set_grad_enabled(self.learns):
            seed = context_seed(context, self.below.enter(clean, None, self.dtype), self.plan)
        own = _modulation(table, shared, index)
        entered = self.layer.enter(noisy, own, self.dtype)
        views = [block_mixed(mixer, x, seed, self.plan, self.dtype) for x in entered.split(clean.shape[0])]
        noisy = self.layer.leave(noisy, views[0] if len(views) == 1 else torch.cat(views), own)
        if not self.needs_clean:
            return noisy, None
        # Last, because recomputing stops at the last tensor that backward needs: a frozen tower's output is made once
        with torch.set_grad_enabled(self.learns):
            return noisy, self.below.leave(clean, context_mixed(context, seed, self.plan, self.dtype), None)

    def _clean(self, clean: Tensor) -> Tensor:
        mixer = self.below.mixer
        assert not isinstance(mixer, Mamba2 | Attention)
        return self.below.leave(clean, mixer(self.below.enter(clean, None, self.dtype)), None)

    def _noisy(self, noisy: Tensor, table: Tensor, shared: Tensor, index: Tensor) -> Tensor:
        mixer = self.layer.mixer
        assert not isinstance(mixer, Mamba2 | Attention)
        own = _modulation(table, shared, index)
        return self.layer.leave(noisy, mixer(self.layer.enter(noisy, own, self.dtype)), own)


def maybe_recomputed(recompute: bool, function: Callable[..., T], *arguments: object) -> T:
    if not recompute:
        return function(*arguments)
    result: T = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def _modulation(table: Tensor, shared: Tensor, index: Tensor) -> Modulation:
    """A layer's modulation (v·b, t, d) at every position: its table (3, d) plus each level's share (l, 3, d), by
    index (v·b, t)."""
    return Modulation(*(F.embedding(index, part) for part in (shared + table).unbind(1)))
