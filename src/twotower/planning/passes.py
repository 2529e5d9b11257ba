"""What passes need beside weights, keys and states: memory for what they compute on the way, and the number of prompt
tokens that makes one worth its fixed cost. Estimates, rather too high than too low; tests hold the reference to them.
"""

import math
from typing import NamedTuple

import torch

from twotower.config import TwoTowerConfig
from twotower.model.recurrent import RECURRENT_KINDS
from twotower.ops.selective_scan import PIECE
from twotower.ops.ssd import CHUNK
from twotower.planning.footprint import StateSizes, Weights, recurrent_sizes

# Recurrent states that one pass may keep for the prefix cache, those of all of its rows together.
MOST_MARKED = 16
# Recurrent states that are there beside a request's own: the ones before a step and a copy of the batch's.
_COPIES = 2
# A pass over prompts takes at least so many times what it would take without arithmetic, and is worth so many seconds.
_WORTH, _SECONDS = 4, 0.2
_FEWEST = 32


class PassMemory(NamedTuple):
    """Bytes: `row` for every prompt token of a pass; `cell` for each of these times each token that its text has so
    far; `key` for every token in the cache while a step of all requests runs; `fixed` for the rest of such a step."""

    row: int
    cell: int
    key: int
    fixed: int


class Speed(NamedTuple):
    """Operations per second that products of many rows attain, bytes read per second, seconds that a pass takes if it
    does nothing, and the number of prompt tokens beyond which a pass gains nothing."""

    flops: float
    bandwidth: float
    overhead: float
    most_rows: int


def speed_of(device_type: str, num_threads: int) -> Speed:
    """Rough numbers of a kind of device; only the order of magnitude of their ratios counts.

    A CPU's are those of `num_threads` threads with bfloat16 products; its products attain their speed at some tens of
    rows, a GPU's at thousands, because it must be given work by a host that takes milliseconds for it.
    """
    if device_type == "cpu":
        return Speed(1.5e11 * num_threads, 1.5e10 * num_threads, 5e-4, 256)
    return Speed(3e14, 3e12, 2e-2, 8192) if device_type == "cuda" else Speed(1e13, 2e11, 2e-2, 2048)


def prompt_chunk(weights: Weights, speed: Speed) -> int:
    """How many prompt tokens, a power of two, a pass should take.

    A pass over r rows takes about `fixed` + 2·r·active / flops seconds, where fixed = layers / bandwidth + overhead: a
    mixture of experts reads all of its experts for some hundred rows. So r is chosen that the second part is three
    times the first: reading weights is then a quarter of the pass, and a step of other requests, which reads them as
    well, is held up for four times its own time at most. Where that is quick, r may be larger: 0.2 seconds' worth.
    """
    fixed = weights.layers / speed.bandwidth + speed.overhead
    rows = max((_WORTH - 1) * fixed, _SECONDS) * speed.flops / (2 * weights.active)
    return 2 ** round(math.log2(min(max(rows, _FEWEST), speed.most_rows)))


def pass_memory(
    config: TwoTowerConfig,
    sizes: StateSizes,
    activations: torch.dtype,
    num_requests: int,
    *,
    device_type: str,
    fused: bool,
) -> PassMemory:
    """What passes of either tower need, with `num_requests` requests in a step.

    `fused` says that attention is computed without a table of scores or a copy of the pages, as the C kernels do.
    Letters: a, w bytes of an activation and of float32; d width; h heads of width p, k of keys; f inner width.
    """
    c, a = config, activations.itemsize
    w = torch.promote_types(activations, torch.float32).itemsize
    kept = sum(_kept(c, kind, a, w) for kind in c.pattern if kind in RECURRENT_KINDS)
    worked = max(_worked(c, kind, a, w) for kind in c.pattern)
    row = kept + worked + 4 * c.hidden_size * (w if c.residual_in_fp32 else a)
    cell = key = 0
    if "*" in c.pattern and not fused:
        heads = c.num_attention_heads
        # PyTorch has no kernel for grouped queries with a mask but on CPUs, nor one for caps and sinks.
        grouped = device_type != "cpu" and heads != c.num_key_value_heads
        scored = grouped or c.attention_softcap is not None or c.attention_sinks
        cell = len(c.attention_kinds) * (2 * w + 3 + 2 * a * heads * bool(c.alibi_slopes)) + 4 * heads * w * scored
        # [scores of the past, all scores, masked ones, weights], and the pages of one layer in one piece, twice
        key = 4 * heads * c.block_size * a + 2 * sizes.page // (16 * c.pattern.count("*"))
    rows = num_requests * (c.block_size + 1)
    logits = 3 * rows * sizes.logits
    pieces = max(_piece(c, kind, w, num_requests) for kind in c.pattern)
    states = (_COPIES * num_requests + MOST_MARKED) * sizes.slot
    return PassMemory(row, cell, key, rows * row + logits + pieces + states)


def _kept(c: TwoTowerConfig, kind: str, a: int, w: int) -> int:
    """Bytes per token that a recurrent layer keeps until it is known how many tokens of the pass stay."""
    channels, _ = recurrent_sizes(c, kind)
    inner, heads = c.mamba_width, c.mamba_num_heads
    wide = {"M": channels, "G": 2 * channels}.get(kind, 4 * inner)
    return a * (inner + channels + 2 * heads) + w * (wide + 2 * heads)


def _worked(c: TwoTowerConfig, kind: str, a: int, w: int) -> int:
    """Bytes per token that are there while a layer of a kind computes."""
    if kind in RECURRENT_KINDS:
        return (6 * w + 2 * a) * c.mamba_width
    if kind == "*":
        return a * (7 * c.num_attention_heads + 8 * c.num_key_value_heads) * c.head_dim
    gates = 2 if c.gated_mlp else 1
    if kind == "-":
        return a * (2 * gates + 1) * c.intermediate_size
    expert = 3 * (c.moe_latent_size or c.hidden_size) + (2 * gates + 1) * c.expert_intermediate_size
    routed = 8 * (c.hidden_size + 4 * c.num_experts)  # in float64
    return a * (c.num_experts_per_tok * expert + 3 * c.shared_expert_intermediate_size) + routed


def _piece(c: TwoTowerConfig, kind: str, w: int, num_requests: int) -> int:
    """Bytes while a recurrent layer's scan is at one of the pieces that it cuts a pass into."""
    if kind in "MG":  # products of a piece's tokens with each other
        return 4 * w * CHUNK * CHUNK * c.mamba_num_heads * num_requests
    if kind in "SR":  # a state for each token of the piece
        return 12 * w * max(PIECE, c.mamba_width * (c.mamba_state_size if kind == "S" else 1) * num_requests)
    return 0
