"""The losses as sums over weighted positions. Letters: b batch, v views, t tokens, d width, m rows, o vocabulary."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twotower.model.two_tower import TwoTower
from twotower.training.corruption import MIN_LEVEL, Corrupted
from twotower.training.forward.block_parallel import Hidden, block_parallel_hidden

Reduction = Literal["masked_mean", "example_mean", "elbo"]

# Rows whose logits exist together: 128 MB of float32 at a vocabulary of 131,072.
HEAD_ROWS = 256


class Weighted(NamedTuple):
    """`weight` (v·b, t) float32 of each position's cross-entropy, 0 where it is not masked, and what their sum is
    divided by. The gradient of a step is that of Σ sums / Σ denominators over all its parts, however it is cut."""

    weight: Tensor
    denominator: float


class LossSums(NamedTuple):
    """Weighted sums, to be divided by the step's denominators: the denoiser's cross-entropies and, where asked for, its
    divergences from the context tower, and the context tower's own cross-entropies."""

    denoising: Tensor
    distil: Tensor | None
    ar: Tensor | None


class LossPart(NamedTuple):
    """What some rows add to a step: to its loss, and to how many tokens each expert of each `E` layer got (l, e), where
    experts are to be balanced."""

    loss: Tensor
    loads: Tensor | None


class Teacher(NamedTuple):
    """Whose distribution at each of m positions is learnt besides the token there: head(rows), rows (m, d), `weight`
    (m,)."""

    head: Callable[[Tensor], Tensor]
    rows: Tensor
    weight: Tensor


class TokenSums(NamedTuple):
    """Σ weight · cross-entropy, and Σ weight · divergence from a teacher, 0 without one."""

    hard: Tensor
    soft: Tensor


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


def next_token_targets(x0: Tensor, scored: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens (b, t) of x0 and which of them count (b, t) bool: the scored ones within the same document."""
    counts = torch.zeros_like(scored)
    counts[:, :-1] = scored[:, 1:] & (document[:, 1:] == document[:, :-1])
    return x0.roll(-1, dims=1), counts


def loss_sums(
    model: TwoTower,
    x0: Tensor,
    noisy: Corrupted,
    weight: Tensor,
    *,
    with_ar: bool = False,
    with_distil: bool = False,
    recompute: bool = False,
    towers: Callable[..., Hidden] = block_parallel_hidden,
) -> LossSums:
    """Σ weight · cross-entropy of the denoiser (same-position targets); Σ weight · KL(context tower ‖ denoiser), the
    context tower's distribution being that of the same token given all clean ones before it; and Σ of the context
    tower's next-token cross-entropy.

    Heads run on the rows that count only, `HEAD_ROWS` at a time. The first token of a document has no distribution to
    learn from. The context tower gets no gradient from its pupil. `towers` is `block_parallel_hidden` or its compiled
    form.
    """
    with_context = with_ar or with_distil
    hidden = towers(model, x0, noisy.xt, noisy.told, noisy.layout, recompute=recompute, with_context=with_context)
    row, place = noisy.masked.nonzero(as_tuple=True)  # (m,)
    clean = row % x0.shape[0]
    weight, teacher = weight[row, place], None
    if with_distil:
        assert hidden.context is not None
        first = place == noisy.layout.document_start.expand_as(x0)[clean, place]
        before = hidden.context.detach()[clean, (place - 1).clamp(min=0)]
        teacher = Teacher(model.context_lm_head, before, weight.masked_fill(first, 0.0))
    found = token_sums(model.lm_head, hidden.denoiser[row, place], x0[clean, place], weight, teacher)
    ar = None
    if with_ar:
        assert hidden.context is not None
        following, counts = next_token_targets(x0, noisy.scored, noisy.layout.document)
        ar = token_sums(model.context_lm_head, hidden.context[counts], following[counts], None).hard
    return LossSums(found.hard, found.soft if with_distil else None, ar)


def token_sums(
    head: Callable[[Tensor], Tensor],
    rows: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    teacher: Teacher | None = None,
) -> TokenSums:
    """Sums over rows (m, d) with targets and weight (m,), in float32 or wider; weight None counts each row once.

    Logits are made again in backward, so (m, o) of them never exist.
    """
    hard = soft = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    for start in range(0, max(rows.shape[0], 1), HEAD_ROWS):  # once for no rows: the sum has a gradient, of 0
        part = slice(start, start + HEAD_ROWS)
        pieces = checkpoint(
            _part_sums,
            head,
            rows[part],
            targets[part],
            None if weight is None else weight[part],
            None if teacher is None else teacher._replace(rows=teacher.rows[part], weight=teacher.weight[part]),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        hard, soft = hard + pieces.hard, soft + pieces.soft
    return TokenSums(hard, soft)


def _part_sums(
    head: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor, weight: Tensor | None, teacher: Teacher | None
) -> TokenSums:
    log_q = _log_probabilities(head, rows)
    losses = F.nll_loss(log_q, targets, reduction="none")
    hard = losses.sum() if weight is None else (losses * weight).sum()
    if teacher is None:
        return TokenSums(hard, torch.zeros_like(hard))
    with torch.no_grad():
        log_p = _log_probabilities(teacher.head, teacher.rows)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return TokenSums(hard, (divergence * teacher.weight).sum())


def _log_probabilities(head: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    logits = head(rows)
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
