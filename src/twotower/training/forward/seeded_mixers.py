"""The mixers of the training pass: the context tower's side, and every block's side seeded with it.

Letters: b batch, t tokens, d width, c chunks, q places of a chunk, h heads, p head width, n state width, k KV heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twotower.model.attention import Attention, Projected, Rotation
from twotower.model.mamba2 import Mamba2
from twotower.ops import seeded_conv
from twotower.ops.chunks import Chunks, take
from twotower.ops.norm import gated_group_rms_norm
from twotower.ops.seeded_ssd import ChunkInputs, chunk_states, context_output, seeded_output
from twotower.ops.tiled_attention import Tile, make_tiles, tiled_attention
from twotower.training.forward.layout import Layout


class Plan(NamedTuple):
    """What a layout means to each mixer; made once per pass. `rope` is None where the model has none."""

    chunks: Chunks | None
    context_rows: seeded_conv.RowReach
    block_rows: seeded_conv.RowReach
    context_tiles: list[Tile]
    block_tiles: list[Tile]
    rope: Rotation | None


def make_plan(layout: Layout, *, chunk_size: int | None, conv_kernel: int, rope: Rotation | None) -> Plan:
    """`chunk_size` None is for models without `M` layers."""
    return Plan(
        None if chunk_size is None else layout.chunks(chunk_size),
        layout.context_rows(conv_kernel),
        layout.block_rows(conv_kernel),
        make_tiles(layout.context_keys()),
        make_tiles(layout.block_keys()),
        rope,
    )


class MambaSeed(NamedTuple):
    """The context tower's side of one `M` layer: raw xBC (b, t, c), the scan's inputs and A (h,), and the state before
    each chunk (b, c, h, p, n); the gate z (b, t, h·p) is for its own output."""

    z: Tensor
    xbc: Tensor
    inputs: ChunkInputs
    A: Tensor
    states: Tensor


class AttentionSeed(NamedTuple):
    """The context tower's side of one `*` layer."""

    projected: Projected


Seed = MambaSeed | AttentionSeed


def context_seed(mixer: Mamba2 | Attention, x: Tensor, plan: Plan) -> Seed:
    """What the blocks read of a context layer with normed inputs x (b, t, d)."""
    if isinstance(mixer, Attention):
        return AttentionSeed(mixer.project(x, plan.rope))
    assert plan.chunks is not None
    z, xbc, dt = _split(mixer, x)
    inputs = _scan_inputs(mixer, xbc, None, dt, plan.context_rows, plan.chunks.token, plan.chunks.filled)
    A = -mixer.A_log.exp()
    return MambaSeed(z, xbc, inputs, A, chunk_states(inputs, A, plan.chunks))


def context_mixed(mixer: Mamba2 | Attention, seed: Seed, plan: Plan, dtype: torch.dtype) -> Tensor:
    """The context layer's own output (b, t, d), causal."""
    if isinstance(mixer, Attention):
        assert isinstance(seed, AttentionSeed)
        q, key, value = seed.projected
        return mixer.output(tiled_attention(q, key, value, None, plan.context_tiles))
    assert isinstance(seed, MambaSeed)
    assert plan.chunks is not None
    y = _recomputed(context_output, seed.inputs, seed.A, mixer.D, seed.states, plan.chunks)
    return _finished(mixer, take(y.flatten(1, 2), plan.chunks.place), seed.z, dtype)


def block_mixed(mixer: Mamba2 | Attention, x: Tensor, seed: Seed, plan: Plan, dtype: torch.dtype) -> Tensor:
    """The denoiser layer's output (b, t, d) for every block of x (b, t, d), seeded with the context layer's side."""
    if isinstance(mixer, Attention):
        assert isinstance(seed, AttentionSeed)
        q, key, value = mixer.project(x, plan.rope)
        past = (seed.projected.key, seed.projected.value)
        return mixer.output(tiled_attention(q, key, value, past, plan.block_tiles))
    assert isinstance(seed, MambaSeed)
    assert plan.chunks is not None
    z, xbc, dt = _split(mixer, x)
    chunks = plan.chunks
    inputs = _scan_inputs(mixer, xbc, seed.xbc, dt, plan.block_rows, chunks.block_token, chunks.block_filled)
    y = _recomputed(seeded_output, inputs, -mixer.A_log.exp(), mixer.D, seed.inputs, seed.A, seed.states, plan.chunks)
    return _finished(mixer, take(y.flatten(1, 3), chunks.block_place), z, dtype)


def _recomputed(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Several (q, q) products per head are cheap to make again and would be most of what a layer saves."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def _split(mixer: Mamba2, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c = mixer.config
    z, xbc, dt = mixer.in_proj(x).split((c.mamba_width, c.conv_width, c.mamba_num_heads), dim=-1)
    return z, xbc, dt


def _scan_inputs(
    mixer: Mamba2,
    xbc: Tensor,
    context: Tensor | None,
    dt: Tensor,
    rows: seeded_conv.RowReach,
    token: Tensor,
    filled: Tensor,
) -> ChunkInputs:
    c = mixer.config
    wide = torch.promote_types(xbc.dtype, torch.float32)
    active = F.silu(seeded_conv.seeded_conv(xbc, context, rows, mixer.conv_taps, mixer.conv_bias))
    laid = take(active, token).to(wide)  # (b, …, channels)
    x, B, C = laid.split((c.mamba_width, *(c.mamba_num_groups * c.mamba_state_size,) * 2), dim=-1)
    dt = F.softplus(take(dt, token).to(wide) + mixer.dt_bias)
    low, high = c.time_step_limit
    if low > 0 or high != float("inf"):
        dt = dt.clamp(low, high)
    dt = dt * filled.unsqueeze(-1)
    heads, groups = (c.mamba_num_heads, c.mamba_head_dim), (c.mamba_num_groups, c.mamba_state_size)
    return ChunkInputs(x.unflatten(-1, heads), dt, B.unflatten(-1, groups), C.unflatten(-1, groups))


def _finished(mixer: Mamba2, y: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    c = mixer.config
    normed = gated_group_rms_norm(y.flatten(2), z, mixer.norm, c.mamba_num_groups, c.layer_norm_epsilon)
    return mixer.out_proj(normed.to(dtype))
