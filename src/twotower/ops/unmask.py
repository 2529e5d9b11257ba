"""From logits to the next state of a block: what decoding calls at every step. Letters: b rows, s positions,
v vocabulary."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LOG2_E = math.log2(math.e)


class Best(NamedTuple):
    """Of logits (…, v): the first token with the largest int64, its probability, and log Σ exp(logits), (…) each."""

    tokens: Tensor
    probability: Tensor
    log_sum: Tensor


class BlockPlaces(NamedTuple):
    """A block's ids (b, s) int64, the mask token among them; which places are masked (b, s) bool; and the probability
    and the step with which each other place was committed, (b, s) float32 and int64."""

    xt: Tensor
    masked: Tensor
    confidence: Tensor
    committed_at: Tensor


def best(logits: Tensor) -> Best:
    """The greedy tokens of logits (…, v) float32, p(token) = exp(its logit - log Σ exp(logits)), and that log."""
    values, tokens = logits.max(-1)
    log_sum = logits.logsumexp(-1)
    return Best(tokens, from_log(values - log_sum), log_sum)


def from_log(log_p: Tensor) -> Tensor:
    """exp of few numbers, none of them large. Not torch.exp: on a CPU it wakes the threads of a library for however few
    numbers, and these then hold a core for milliseconds that the next pass needs."""
    return torch.exp2(log_p * _LOG2_E)


def argmax(logits: Tensor) -> Tensor:
    """The tokens of `best` alone."""
    return logits.argmax(-1)


def entropy(logits: Tensor) -> Tensor:
    """The entropy -Σ p·log p of softmax(logits) (…, v) float32, in nats, (…); NaN where no logit is finite."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1).clamp(max=0.0)  # 0·log 0 = 0 for the mask token


def commit(
    sure: Tensor,
    masked: Tensor,
    left: Tensor,
    threshold: Tensor | None,
    bound: Tensor | None = None,
    *,
    leftmost: bool,
) -> Tensor:
    """The masked places (b, s) bool that commit when `left` (b,) int64 steps are left, this one included.

    At least an equal share of the masked places, and all in the last step; with a threshold (b,) at least as many as
    have `sure` (b, s) above it; with a bound (b,) at least the k surest, for the largest k such that the sum of their
    doubts -sure, but for the largest of them, is no larger. If `leftmost` they are the first ones, else the surest, the
    earlier of equal ones.
    """
    remaining = masked.sum(-1)  # (b,)
    share = left.clamp(min=1)
    wanted = (remaining + share - 1) // share
    if threshold is not None:
        wanted = torch.maximum(wanted, (masked & (sure > threshold[:, None])).sum(-1))
    if bound is not None:
        doubts = -sure.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True).values.double()
        # of k places in ascending doubt, the sum without the largest is that of the first k - 1
        before = F.pad(doubts.cumsum(-1), (1, -1))
        counted = masked.sum(-1, keepdim=True) > torch.arange(masked.shape[1], device=masked.device)
        wanted = torch.maximum(wanted, ((before <= bound.double()[:, None]) & counted).sum(-1))
    wanted = torch.where(left <= 1, remaining, wanted.clamp(min=1))
    order = masked.cumsum(-1) - 1 if leftmost else ranks(sure.masked_fill(~masked, -torch.inf))
    return masked & (order < wanted[:, None])


def ranks(values: Tensor) -> Tensor:
    """Each value's place in its row's descending order, (b, s) int64; equal values keep their order."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def fix(
    places: BlockPlaces,
    valid: Tensor,
    fixed: Tensor,
    tokens: Tensor,
    confidence: Tensor,
    step: Tensor,
    mask_token_id: int,
) -> BlockPlaces:
    """The block after `step` (b,) int64, in which the places `fixed` (b, s) bool have a token and the others, but for
    padding where `valid` (b, s) is false, are masked. A place that was masked takes its token and confidence (b, s)."""
    new = fixed & places.masked
    masked = valid & ~fixed
    return BlockPlaces(
        torch.where(fixed, torch.where(places.masked, tokens, places.xt), mask_token_id),
        masked,
        torch.where(new, confidence, places.confidence).masked_fill(masked, 0.0),
        torch.where(new, step[:, None], places.committed_at),
    )
