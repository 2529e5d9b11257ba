"""Losses as weighted sums over positions, which a step divides by its denominators once all parts are added up.

Letters: b batch, v views (noisy versions of one row), t tokens, d width, m rows of hidden states, o vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twotower.errors import SettingError
from twotower.model.head import Head
from twotower.model.two_tower import TwoTower
from twotower.training.config import Reduction
from twotower.training.forward.block_parallel import Hidden, block_parallel_hidden
from twotower.training.masks.noise import MIN_LEVEL, Corrupted

# The number of rows whose logits are in memory at once: 128 MB of float32 at a vocabulary of 131,072.
HEAD_ROWS = 256


class Weighted(NamedTuple):
    """`weight` (v·b, t) float32 is each position's weight in the loss, 0 where it is not masked; `denominator` divides
    their weighted sum. A step's loss is Σ sums / Σ denominators over all its parts, however the step is cut."""

    weight: Tensor
    denominator: float


class LossSums(NamedTuple):
    """Weighted sums (scalars): the denoiser's cross-entropies, its divergences from the context tower, and the context
    tower's next-token cross-entropies; None where not asked for."""

    denoising: Tensor
    distil: Tensor | None
    ar: Tensor | None


class Teacher(NamedTuple):
    """A distribution to learn at each of m positions besides the token there: the softmax of head(rows), with rows
    (m, d) and a weight (m,) per position."""

    head: Head
    rows: Tensor
    weight: Tensor


class TokenSums(NamedTuple):
    """`hard` is Σ weight · cross-entropy, `soft` is Σ weight · KL(teacher ‖ model), 0 without a teacher."""

    hard: Tensor
    soft: Tensor


def weigh(noisy: Corrupted, reduction: Reduction) -> Weighted:
    """The weight of each position under a reduction.

    - `masked_mean`: the mean over all masked positions.
    - `example_mean`: each row's mean over its masked positions (0 for a row without any), then the mean over rows. This
      is the loss of code that averages over micro-batches of one row.
    - `elbo`: 1/t̂ per masked position, divided by the number of scored positions. Its expectation is an upper bound on
      the negative log-likelihood in nats per token (MDLM, arXiv 2406.07524), but for levels below 1e-3, which are never
      drawn. Requires t̂ to be uniform.
    """
    masked = noisy.masked.float()
    if reduction == "masked_mean":
        return Weighted(masked, float(noisy.masked.sum()))
    if reduction == "example_mean":
        return Weighted(masked / masked.sum(1, keepdim=True).clamp(min=1), float(masked.shape[0]))
    if reduction == "elbo":
        views = masked.shape[0] // noisy.scored.shape[0]
        # t̂ is uniform on [1e-3, 1], whose density is 1/(1 − 1e-3).
        return Weighted(masked * (1 - MIN_LEVEL) / noisy.level, float(noisy.scored.sum()) * views)
    raise SettingError("reduction", reduction, f"one of {', '.join(get_args(Reduction))}")


def next_token_targets(x0: Tensor, scored: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
    """The token after each token of x0 (b, t), and (b, t) bool: whether it is learnt, being scored and in the same
    document."""
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
    """The sums of one forward pass over rows x0 (b, t) and their noisy versions, weighted by `weight` (v·b, t).

    - `denoising`: Σ weight · cross-entropy of the denoiser at masked positions, whose target is the token in x0 there.
    - `distil`: Σ weight · KL(p ‖ q) at masked positions, where q is the denoiser's distribution of the token and p the
      context tower's, given all clean tokens before it. p gets no gradient. A document's first token has no p and is
      left out.
    - `ar`: Σ cross-entropy of the context tower's next-token predictions.

    Heads run on these positions only, `HEAD_ROWS` at a time. `towers` is `block_parallel_hidden` or its compiled form,
    `recompute` is explained there.
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
    head: Head,
    rows: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    teacher: Teacher | None = None,
) -> TokenSums:
    """Weighted sums over hidden states `rows` (m, d) with targets (m,) and weight (m,), in float32 or wider.

    `weight` None is 1 for each row. No target is the mask token, whose probability is 0. Logits are recomputed in
    backward, so that all (m, o) of them are never in memory.
    """
    hard = soft = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    for start in range(0, max(rows.shape[0], 1), HEAD_ROWS):  # once even without rows, so that the sum has a gradient
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


def _part_sums(head: Head, rows: Tensor, targets: Tensor, weight: Tensor | None, teacher: Teacher | None) -> TokenSums:
    log_q = head(rows).log_softmax(-1)
    losses = F.nll_loss(log_q, targets, reduction="none")
    hard = losses.sum() if weight is None else (losses * weight).sum()
    if teacher is None:
        return TokenSums(hard, torch.zeros_like(hard))
    with torch.no_grad():
        log_p = teacher.head(teacher.rows).log_softmax(-1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    # 0 · (log 0 − log 0) is nan; the gradient, which is 0, passes autograd by as it does in `Head`
    divergence.detach().select(-1, head.mask_token_id).zero_()
    return TokenSums(hard, (divergence.sum(-1) * teacher.weight).sum())
