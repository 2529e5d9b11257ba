"""Attention and recurrent mixers in the training pass: the context tower's side over clean tokens, and the denoiser's
side over noisy ones, which starts every block from the context tower's keys, convolution rows and recurrent states
before it.

Letters: b batch, t tokens, d width, c chunks, q places of a chunk, h heads, p head width, n state width, k KV heads.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.attention import Attention, Projected
from twotower.model.delta_net import DeltaNet
from twotower.model.layer import RecurrentMixer
from twotower.model.mamba2 import Mamba2
from twotower.model.recurrent import RECURRENT_KINDS
from twotower.model.selective import SelectiveMixer
from twotower.model.tower import positionings
from twotower.ops import seeded_conv, seeded_delta
from twotower.ops.chunks import Chunks, take
from twotower.ops.delta import DeltaInputs
from twotower.ops.rope import Positioning
from twotower.ops.seeded_ssd import chunk_states, context_output, seeded_output
from twotower.ops.ssd import ScanInputs
from twotower.ops.tiled_attention import Tile, make_tiles, tiled_attention
from twotower.training.forward.layout import Layout
from twotower.training.forward.recompute import maybe_recomputed
from twotower.training.forward.selective import (
    SelectiveSeed,
    selective_blocks,
    selective_context,
    selective_seed,
)

T = TypeVar("T")

# The number of tokens in a chunk of the scan. It keeps one state per chunk and computes products quadratic in the size.
CHUNK_SIZE = 64


class Plan(NamedTuple):
    """A layout in the terms of each mixer, made once per pass: the chunks of the scan (None without recurrent layers),
    the rows that convolutions read, and for each of the config's `attention_kinds` the tiles of attention and what
    positions do."""

    chunks: Chunks | None
    context_rows: seeded_conv.RowReach
    block_rows: seeded_conv.RowReach
    context_tiles: tuple[list[Tile], ...]
    block_tiles: tuple[list[Tile], ...]
    positioning: tuple[Positioning, ...]


@torch.compiler.disable  # the plan's sizes depend on values of the layout
def make_plan(config: TwoTowerConfig, layout: Layout, *, chunk_size: int, dtype: torch.dtype) -> Plan:
    """The plan of a pass with activations of `dtype`. Where RoPE depends on a text's length, a document has its own."""
    lengths = None
    if config.rope_length(layout.block.shape[1]):
        numbers, index = layout.document_length.unique(return_inverse=True)
        lengths = torch.tensor([config.rope_length(n) for n in numbers.tolist()])[index.cpu()]
    return Plan(
        layout.chunks(chunk_size) if set(RECURRENT_KINDS) & set(config.pattern) else None,
        layout.context_rows(config.conv_kernel),
        layout.block_rows(config.conv_kernel),
        tuple(make_tiles(layout.context_keys(kind)) for kind in config.attention_kinds),
        tuple(make_tiles(layout.block_keys(kind)) for kind in config.attention_kinds),
        positionings(config, layout.position, dtype, lengths),
    )


class MambaSeed(NamedTuple):
    """The context tower's side of one `M` layer: xBC before the convolution (b, t, channels), the scan's inputs, A (h,)
    and the state before each chunk (b, c, h, p, n). The gate z (b, t, h·p) is for the layer's own output only."""

    z: Tensor
    xbc: Tensor
    inputs: ScanInputs
    A: Tensor
    states: Tensor


class AttentionSeed(NamedTuple):
    """The context tower's side of one `*` layer: its queries, keys and values."""

    projected: Projected


class DeltaSeed(NamedTuple):
    """The context tower's side of one `G` layer: the gate z (b, t, h·p), for its own output only, values, keys and
    queries before the convolution (b, t, channels), the scan's inputs, and the states."""

    z: Tensor
    vkq: Tensor
    inputs: DeltaInputs
    states: seeded_delta.DeltaStates


Seed = MambaSeed | DeltaSeed | SelectiveSeed | AttentionSeed


def context_seed(mixer: RecurrentMixer | Attention, x: Tensor, plan: Plan) -> Seed:
    """The part of a context layer with normed inputs x (b, t, d) that the blocks read, and its own output needs."""
    if isinstance(mixer, Attention):
        return AttentionSeed(mixer.project(x, plan.positioning[mixer.index]))
    chunks = plan.chunks
    assert chunks is not None
    if isinstance(mixer, SelectiveMixer):
        return selective_seed(mixer, x, plan.context_rows, chunks)
    z, xbc, dt = mixer.split(x)
    if isinstance(mixer, DeltaNet):
        given = _delta_inputs(mixer, xbc, None, dt, plan.context_rows, chunks.token, chunks.filled)
        return DeltaSeed(z, xbc, given, _recomputed(seeded_delta.context_corrections, given, chunks))
    inputs = _scan_inputs(mixer, xbc, None, dt, plan.context_rows, chunks.token, chunks.filled)
    A = -mixer.A_log.exp()
    return MambaSeed(z, xbc, inputs, A, chunk_states(inputs, A, chunks))


def context_mixed(mixer: RecurrentMixer | Attention, seed: Seed, plan: Plan, dtype: torch.dtype) -> Tensor:
    """The context layer's own output (b, t, d): causal attention, or the scan over each document."""
    if isinstance(mixer, Attention):
        assert isinstance(seed, AttentionSeed)
        q, key, value, gate = seed.projected
        return mixer.output(tiled_attention(q, key, value, None, plan.context_tiles[mixer.index], mixer.rule), gate)
    assert plan.chunks is not None
    if isinstance(mixer, SelectiveMixer):
        assert isinstance(seed, SelectiveSeed)
        return selective_context(mixer, seed, plan.chunks, dtype)
    if isinstance(mixer, DeltaNet):
        assert isinstance(seed, DeltaSeed)
        y = _recomputed(seeded_delta.context_output, seed.inputs, seed.states, plan.chunks)
        return mixer.output(take(y.flatten(1, 2), plan.chunks.place), seed.z, dtype)
    assert isinstance(seed, MambaSeed)
    y = _recomputed(context_output, seed.inputs, seed.A, mixer.D, seed.states, plan.chunks)
    return mixer.output(take(y.flatten(1, 2), plan.chunks.place), seed.z, dtype)


def causal_mixed(mixer: nn.Module, x: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """The output (b, t, d) of a layer's mixer of any kind for its normed inputs x (b, t, d), causal in a document."""
    if isinstance(mixer, RecurrentMixer | Attention):
        return context_mixed(mixer, context_seed(mixer, x, plan), plan, dtype)
    mixed: Tensor = mixer(x)
    return mixed


def block_mixed(mixer: RecurrentMixer | Attention, x: Tensor, seed: Seed, plan: Plan, dtype: torch.dtype) -> Tensor:
    """The denoiser layer's output (b, t, d) for the normed inputs x (b, t, d) of one view, each block seeded with the
    context layer's side."""
    if isinstance(mixer, Attention):
        assert isinstance(seed, AttentionSeed)
        q, key, value, gate = mixer.project(x, plan.positioning[mixer.index])
        past = (seed.projected.key, seed.projected.value)
        return mixer.output(tiled_attention(q, key, value, past, plan.block_tiles[mixer.index], mixer.rule), gate)
    chunks = plan.chunks
    assert chunks is not None
    if isinstance(mixer, SelectiveMixer):
        assert isinstance(seed, SelectiveSeed)
        return selective_blocks(mixer, x, seed, plan.block_rows, chunks, dtype)
    z, xbc, dt = mixer.split(x)
    if isinstance(mixer, DeltaNet):
        assert isinstance(seed, DeltaSeed)
        own = _delta_inputs(mixer, xbc, seed.vkq, dt, plan.block_rows, chunks.block_token, chunks.block_filled)
        y = _recomputed(seeded_delta.seeded_output, own, seed.inputs, seed.states, chunks)
        return mixer.output(take(y.flatten(1, 3), chunks.block_place), z, dtype)
    assert isinstance(seed, MambaSeed)
    inputs = _scan_inputs(mixer, xbc, seed.xbc, dt, plan.block_rows, chunks.block_token, chunks.block_filled)
    y = _recomputed(seeded_output, inputs, -mixer.A_log.exp(), mixer.D, seed.inputs, seed.A, seed.states, chunks)
    return mixer.output(take(y.flatten(1, 3), chunks.block_place), z, dtype)


def _recomputed(function: Callable[..., T], *arguments: object) -> T:
    """The scan's (q, q) products per head are cheap to compute again; kept, they would be most of a layer's memory."""
    return maybe_recomputed(torch.is_grad_enabled(), function, *arguments)


def _scan_inputs(
    mixer: Mamba2,
    xbc: Tensor,
    context: Tensor | None,
    dt: Tensor,
    rows: seeded_conv.RowReach,
    token: Tensor,
    filled: Tensor,
) -> ScanInputs:
    """The scan's inputs, laid out in chunks: the convolution over xBC, seeded with the context tower's rows, then SiLU;
    dt = softplus(dt + bias), limited as the config says, and 0 in places that hold no token (`filled` False)."""
    active = F.silu(seeded_conv.seeded_conv(xbc, context, rows, mixer.conv_taps, mixer.conv_bias))
    inputs = mixer.scan_inputs(take(active, token), take(dt, token))
    return inputs._replace(dt=inputs.dt * filled.unsqueeze(-1))


def _delta_inputs(
    mixer: DeltaNet,
    vkq: Tensor,
    context: Tensor | None,
    gates: Tensor,
    rows: seeded_conv.RowReach,
    token: Tensor,
    filled: Tensor,
) -> DeltaInputs:
    """As `_scan_inputs`, for the gated delta rule."""
    active = F.silu(seeded_conv.seeded_conv(vkq, context, rows, mixer.conv_taps, None))
    return mixer.scan_inputs(take(active, token), take(gates, token)).masked(filled)
