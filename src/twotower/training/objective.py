"""The losses as sums over weighted positions. Letters: b batch, v views, t tokens, d width, m rows, o vocabulary."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twotower.model.block_parallel import Hidden, block_parallel_hidden
from twotower.model.two_tower import TwoTower
from twotower.training.corruption import MIN_LEVEL, Corrupted

Reduction = Literal["masked_mean", "example_mean", "elbo"]

# Rows whose logits exist together: 128 MB of float32 at a vocabulary of 131,072.
HEAD_ROWS = 256


class Weighted(NamedTuple):
    """`weight` (v·b, t) float32 of each position's cross-entropy, 0 where it is not masked, and what their sum is
    divided by. The gradient of a step is that of Σ sums / Σ denominators over all its parts, however it is cut."""

    weight: Tensor
    denominator: float


class LossSums(NamedTuple):
    """Weighted sums of cross-entropies, to be divided by the step's denominators; `ar` is None where not asked for."""

    denoising: Tensor
    ar: Tensor | None


def weigh(noisy: Corrupted, reduction: Reduction) -> Weighted:
    """The weights of a reduction.

    `masked_mean`: the mean over all masked positions. `example_mean`: each row's mean over its masked positions (0 for
    a row without any), then the mean over rows; what micro-batches of one row do. `elbo`: 1/t̂ per masked position over
    the number of scored positions, whose expectation bounds the negative log-likelihood in nats per token from above,
    but for t̂ below 1e-3; it needs t̂ to be uniform.
    """
    masked = noisy.masked.float()
    if reduction == "masked_mean":
        return Weighted(masked, float(noisy.masked.sum()))
    if reduction == "example_mean":
        return Weighted(masked / masked.sum(1, keepdim=True).clamp(min=1), float(masked.shape[0]))
    if reduction == "elbo":
        views = masked.shape[0] // noisy.scored.shape[0]
        # t̂ is drawn from [1e-3, 1], whose density is 1/(1 − 1e-3)
        return Weighted(masked * (1 - MIN_LEVEL) / noisy.level, float(noisy.scored.sum()) * views)
    raise ValueError(f"reduction is {reduction!r}, must be masked_mean, example_mean or elbo")


def next_token_targets(x0: Tensor, noisy: Corrupted) -> tuple[Tensor, Tensor]:
    """Next tokens (b, t) of x0 and which of them count (b, t) bool: the scored ones within the same document."""
    document = noisy.layout.document
    counts = torch.zeros_like(noisy.scored)
    counts[:, :-1] = noisy.scored[:, 1:] & (document[:, 1:] == document[:, :-1])
    return x0.roll(-1, dims=1), counts


def loss_sums(
    model: TwoTower,
    x0: Tensor,
    noisy: Corrupted,
    weight: Tensor,
    *,
    with_ar: bool = False,
    recompute: bool = False,
    towers: Callable[..., Hidden] = block_parallel_hidden,
) -> LossSums:
    """Σ weight · cross-entropy of the denoiser (same-position targets), and Σ of the context tower's next-token one.

    Heads run on the rows that count only, `HEAD_ROWS` at a time. `towers` is `block_parallel_hidden` or its compiled
    form.
    """
    hidden = towers(model, x0, noisy.xt, noisy.told, noisy.layout, recompute=recompute, with_context=with_ar)
    targets = x0.repeat(weight.shape[0] // x0.shape[0], 1)[noisy.masked]
    denoising = cross_entropy_sum(model.lm_head, hidden.denoiser[noisy.masked], targets, weight[noisy.masked])
    if hidden.context is None:
        return LossSums(denoising, None)
    following, counts = next_token_targets(x0, noisy)
    rows = hidden.context[counts]
    return LossSums(denoising, cross_entropy_sum(model.context_lm_head, rows, following[counts], None))


def cross_entropy_sum(head: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """Σ weight · cross-entropy of head(rows) against targets: rows (m, d), targets and weight (m,), a scalar in
    float32 or wider. Logits are made again in backward, so (m, o) of them never exist."""
    total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    for start in range(0, max(rows.shape[0], 1), HEAD_ROWS):  # once for no rows: the sum has a gradient, of 0
        part = slice(start, start + HEAD_ROWS)
        total = total + checkpoint(
            _weighted_cross_entropy,
            head,
            rows[part],
            targets[part],
            None if weight is None else weight[part],
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total


def _weighted_cross_entropy(
    head: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor, weight: Tensor | None
) -> Tensor:
    logits = head(rows)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if weight is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    return (F.cross_entropy(logits, targets, reduction="none") * weight).sum()
