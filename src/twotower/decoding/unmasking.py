"""Commit rules: they decide which positions of a block are fixed after a denoising step. Letters: b rows, s positions.

A rule decides from each row's proposals. `remask` (mask-predict, Ghazvininejad et al. 2019) may mask positions again
that were fixed; the other rules only fix more positions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.backends.protocol import LogitOps
from twotower.decoding.params import CommitRule, SamplingParams
from twotower.decoding.sampling import Proposal
from twotower.ops.transfer import to_device
from twotower.ops.unmask import ranks


class CommitSchedule(NamedTuple):
    """The rows' present step j, 0-based (b,) or one for all rows, their number of steps T (b,) and threshold γ (b,)."""

    step: Tensor | int
    num_steps: Tensor
    threshold: Tensor

    def at(self, step: Tensor | int) -> "CommitSchedule":
        """The schedule at another step."""
        return CommitSchedule(step, self.num_steps, self.threshold)

    def select(self, rows: list[int]) -> "CommitSchedule":
        """The schedule of some rows, at step 0."""
        index = to_device(rows, self.num_steps.device)
        return CommitSchedule(0, self.num_steps[index], self.threshold[index])

    def join(self, others: "CommitSchedule") -> "CommitSchedule":
        """The schedule of both batches' rows, at step 0."""
        return CommitSchedule(
            0, torch.cat((self.num_steps, others.num_steps)), torch.cat((self.threshold, others.threshold))
        )


def rule_and_steps(params: SamplingParams) -> tuple[CommitRule, int]:
    """A request's commit rule and T. Mode `simulated_ar` is rule `leftmost` with one step per position of a block."""
    if params.mode == "simulated_ar":
        assert params.block_size is not None
        return "leftmost", params.block_size
    return params.commit_rule, params.steps_per_block


def schedule(params: tuple[SamplingParams, ...], device: torch.device) -> CommitSchedule:
    """The schedule of a batch, at step 0."""
    steps = [rule_and_steps(p)[1] for p in params]
    # explicit dtype: thresholds given as the integer 1 would make an int64 tensor, and kernels read float32
    thresholds = torch.tensor([p.confidence_threshold for p in params], dtype=torch.float32)
    return CommitSchedule(0, to_device(steps, device), to_device(thresholds, device))


def certainty(rule: str, logits: Tensor, proposal: Proposal) -> Tensor:
    """How sure the denoiser is of each proposal, (b, s) in [0, 1]; rules rank it and compare it with γ.

    `margin`: p of the best minus p of the second best; `entropy`: 1 − H/log v; the others: p of the proposal.
    """
    if rule == "margin":
        best = logits.softmax(-1).topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]
    if rule == "entropy":
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)  # 0·log 0 = 0 for the mask token
        return (1 - entropy / math.log(logits.shape[-1])).clamp_(0, 1)
    return proposal.confidence


def commit(rule: str, sure: Tensor, masked: Tensor, at: CommitSchedule, coins: Tensor | None, ops: LogitOps) -> Tensor:
    """The masked positions (b, s) bool that commit in this step, for every rule except `remask`.

    sure (b, s) from `certainty`; masked (b, s) bool; coins (b, s) are uniforms in [0, 1), which only `posterior` reads.
    """
    left = at.num_steps - at.step  # (b,) steps left, including this one
    if rule == "posterior":
        # q(x_s | x_t, x0) of absorbing diffusion from t = left/T to s = (left−1)/T: unmask with (t − s)/t = 1/left
        assert coins is not None
        return masked & (coins < 1.0 / left.clamp(min=1)[:, None])
    threshold = at.threshold if rule in ("confidence", "margin", "entropy") else None
    return ops.commit(sure, masked, left, threshold, leftmost=rule == "leftmost")


def remask(sure: Tensor, valid: Tensor, at: CommitSchedule) -> Tensor:
    """Mask-predict: the positions (b, s) bool that are fixed after the least certain ones are masked again.

    sure (b, s): certainty of every present token; valid (b, s) bool. After step j, ceil(s·(T−j−1)/T) are masked.
    """
    width = valid.sum(-1)  # (b,)
    left = (at.num_steps - at.step - 1).clamp(min=0)
    keep = width - torch.ceil(width * left / at.num_steps).long()
    keep = keep.clamp(min=1)
    return valid & (ranks(sure.masked_fill(~valid, -torch.inf)) < keep[:, None])
