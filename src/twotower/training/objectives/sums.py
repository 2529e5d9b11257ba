"""Losses as weighted sums over positions, which a step divides by its denominators once all parts are added up.

Letters: b batch, v views (noisy versions of one row), t tokens, d width, m rows of hidden states, o vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twotower.errors import SettingError
from twotower.model.head import Head
from twotower.model.two_tower import TwoTower
from twotower.training.config import Reduction
from twotower.training.forward.block_parallel import Hidden, block_parallel_hidden
from twotower.training.masks.noise import MIN_LEVEL, Corrupted
from twotower.training.objectives.acceptance import acceptance
from twotower.training.objectives.certainty import certainty
from twotower.training.objectives.consistency import compared
from twotower.training.objectives.cross_entropy import cross_entropy
from twotower.training.objectives.distillation import divergence, taught

# The number of rows whose logits are in memory at once: 128 MB of float32 at a vocabulary of 131,072.
HEAD_ROWS = 256


class Weighted(NamedTuple):
    """`weight` (v·b, t) float32 is each position's weight in the loss, 0 where it is not masked; `denominator` divides
    their weighted sum. A step's loss is Σ sums / Σ denominators over all its parts, however the step is cut."""

    weight: Tensor
    denominator: float


class LossSums(NamedTuple):
    """Weighted sums (scalars): of each loss of the denoiser's, by name, and of the context tower's next-token
    cross-entropies, None where not asked for."""

    losses: dict[str, Tensor]
    ar: Tensor | None


class Teacher(NamedTuple):
    """A distribution to learn at each of m positions: the softmax of head(rows), with rows (m, d), where `counts` (m,)
    bool."""

    head: Head
    rows: Tensor
    counts: Tensor


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
    losses: Sequence[str] = ("cross_entropy",),
    with_ar: bool = False,
    recompute: bool = False,
    towers: Callable[..., Hidden] = block_parallel_hidden,
) -> LossSums:
    """The sums of one forward pass over rows x0 (b, t) and their noisy versions: of each of `losses` Σ weight · loss
    over masked positions, with `weight` (v·b, t), and Σ cross-entropy of the context tower's next-token predictions.

    The losses are explained by the files of their names. Heads run on these positions only, `HEAD_ROWS` at a time.
    `towers` is `block_parallel_hidden` or its compiled form, `recompute` is explained there.
    """
    with_context = with_ar or "distillation" in losses
    hidden = towers(model, x0, noisy.xt, noisy.told, noisy.layout, recompute=recompute, with_context=with_context)
    row, place = noisy.masked.nonzero(as_tuple=True)  # (m,)
    clean = row % x0.shape[0]
    teachers = {}
    if "distillation" in losses:
        assert hidden.context is not None
        before = hidden.context.detach()[clean, (place - 1).clamp(min=0)]
        counts = taught(x0, noisy, model.config.eos_token_ids)[row, place]
        teachers["distillation"] = Teacher(model.context_lm_head, before, counts)
    if "consistency" in losses:
        afterwards = hidden.denoiser.detach()[clean + x0.shape[0], place]
        teachers["consistency"] = Teacher(model.lm_head, afterwards, compared(noisy.masked)[row, place])
    names = tuple(name for name in losses if name not in ("cross_entropy", "acceptance"))
    found = token_losses(model.lm_head, hidden.denoiser[row, place], x0[clean, place], names, teachers)
    if "acceptance" in losses:
        log_right = (
            found["cross_entropy"].new_zeros(noisy.masked.shape).index_put((row, place), -found["cross_entropy"])
        )
        found["acceptance"] = acceptance(log_right, x0, noisy, model.config.eos_token_ids)[row, place]
    sums = {name: (found[name] * weight[row, place]).sum() for name in losses}
    ar = None
    if with_ar:
        assert hidden.context is not None
        following, counts = next_token_targets(x0, noisy.scored, noisy.layout.document)
        ar = token_losses(model.context_lm_head, hidden.context[counts], following[counts])["cross_entropy"].sum()
    return LossSums(sums, ar)


def token_losses(
    head: Head,
    rows: Tensor,
    targets: Tensor,
    names: tuple[str, ...] = (),
    teachers: Mapping[str, Teacher] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """The cross-entropy (m,) of hidden states `rows` (m, d) with targets (m,), and the losses `names`, in float32 or
    wider; those that learn from a distribution need their teacher.

    No target is the mask token, whose probability is 0. Logits are recomputed in backward, so that all (m, o) of them
    are never in memory.
    """
    columns = []
    for start in range(0, max(rows.shape[0], 1), HEAD_ROWS):  # once even without rows, so that the sum has a gradient
        part = slice(start, start + HEAD_ROWS)
        own = {n: Teacher(t.head, t.rows[part], t.counts[part]) for n, t in teachers.items()}
        columns.append(
            checkpoint(
                _part, head, rows[part], targets[part], names, own, use_reentrant=False, preserve_rng_state=False
            )
        )
    return dict(zip(("cross_entropy", *names), map(torch.cat, zip(*columns, strict=True)), strict=True))


def _part(
    head: Head, rows: Tensor, targets: Tensor, names: tuple[str, ...], teachers: Mapping[str, Teacher]
) -> tuple[Tensor, ...]:
    log_q = head(rows).log_softmax(-1)
    found = [cross_entropy(log_q, targets)]
    for name in names:
        if name == "certainty":
            found.append(certainty(log_q, targets, head.mask_token_id))
        else:
            teacher = teachers[name]
            with torch.no_grad():
                log_p = teacher.head(teacher.rows).log_softmax(-1)
            found.append(divergence(log_q, log_p, head.mask_token_id) * teacher.counts)
    return tuple(found)
