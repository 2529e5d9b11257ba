"""Commit rules: they decide which positions of a block are fixed after a denoising step. Letters: b rows, s positions.

A rule decides from each row's proposals. `remask` (mask-predict, Ghazvininejad et al. 2019) may mask positions again
that were fixed; the other rules only fix more positions.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.backends.protocol import LogitOps
from twotower.decoding.params import CommitRule, SamplingParams
from twotower.decoding.sampling import Proposal
from twotower.errors import SettingError
from twotower.model.calibration import CalibratedRule, Calibration
from twotower.ops.transfer import to_device
from twotower.ops.unmask import ranks


class CommitSchedule(NamedTuple):
    """The rows' present step j, 0-based (b,) or one for all rows, their number of steps T (b,), threshold γ (b,) and
    bound on the entropy of a step (b,); and for calibrated rows the tables of their rules, (S, S) or None each."""

    step: Tensor | int
    num_steps: Tensor
    threshold: Tensor
    bound: Tensor
    tables: tuple[Tensor | None, ...]

    def at(self, step: Tensor | int) -> "CommitSchedule":
        """The schedule at another step."""
        return self._replace(step=step)

    def select(self, rows: list[int]) -> "CommitSchedule":
        """The schedule of some rows, at step 0."""
        index = to_device(rows, self.num_steps.device)
        tables = tuple(self.tables[row] for row in rows)
        return CommitSchedule(0, self.num_steps[index], self.threshold[index], self.bound[index], tables)

    def join(self, others: "CommitSchedule") -> "CommitSchedule":
        """The schedule of both batches' rows, at step 0."""
        pairs = ((getattr(self, n), getattr(others, n)) for n in ("num_steps", "threshold", "bound"))
        num_steps, threshold, bound = (torch.cat(pair) for pair in pairs)
        return CommitSchedule(0, num_steps, threshold, bound, self.tables + others.tables)


def rule_and_steps(params: SamplingParams) -> tuple[CommitRule | Literal["calibrated"], int]:
    """A request's commit rule and T. Mode `simulated_ar` is rule `leftmost` with one step per position of a block, and
    a target is rule `calibrated`."""
    if params.mode == "simulated_ar":
        assert params.block_size is not None
        return "leftmost", params.block_size
    if params.target_retention is not None:
        return "calibrated", params.steps_per_block
    return params.commit_rule, params.steps_per_block


def schedule(
    params: tuple[SamplingParams, ...], device: torch.device, calibration: Calibration | None = None
) -> CommitSchedule:
    """The schedule of a batch of settled params, at step 0, for a checkpoint with this calibration."""
    steps = [rule_and_steps(p)[1] for p in params]
    # explicit dtype: thresholds given as the integer 1 would make an int64 tensor, and kernels read float32
    limits = [[p.confidence_threshold or 0.0 for p in params], [p.entropy_bound or 0.0 for p in params]]
    thresholds, bounds = to_device(torch.tensor(limits, dtype=torch.float32), device).unbind()
    rules = [None if p.target_retention is None else chosen_rule(calibration, p) for p in params]
    tables = tuple(None if rule is None else rule.table.to(device) for rule in rules)
    return CommitSchedule(0, to_device(steps, device), thresholds, bounds, tables)


def chosen_rule(calibration: Calibration | None, params: SamplingParams) -> CalibratedRule:
    """The fastest rule of a checkpoint's calibration that keeps what settled params ask for. Raises SettingError where
    there is none."""
    target = params.target_retention
    assert target is not None
    if calibration is None:
        rule = "left out: the checkpoint has no calibration"
        raise SettingError("target_retention", target, rule, "make one with: twotower calibrate CHECKPOINT PROMPTS")
    for name in ("block_size", "steps_per_block"):
        given, own = getattr(params, name), getattr(calibration, name)
        if given != own:
            fix = "it was calibrated with that; leave it out, or calibrate with another one"
            raise SettingError(name, given, f"{own} beside target_retention", fix)
    found = calibration.fastest(target)
    if found is None:
        fix = (
            "'verified' keeps all of it; calibrating with more prompts may show that diffusion keeps more"
            if calibration.most > 0
            else "use 'verified', which keeps all of it"
        )
        rule = f"at most {calibration.most_told}: no rule was shown to keep more"
        raise SettingError("target_retention", target, rule, fix)
    return found


def table_thresholds(tables: Sequence[Tensor | None], left: Sequence[int], like: Tensor) -> Tensor:
    """Each place's threshold (b, s), of a block (b, s) of which `left` (b) places are masked; 0 without a table."""
    size = like.shape[1]
    found = []
    for table, masked in zip(tables, left, strict=True):
        own = torch.zeros(size, device=like.device) if table is None else table[masked - 1]
        found.append(F.pad(own, (0, size - own.shape[0])))
    return torch.stack(found)


def certainty(rule: str, logits: Tensor, proposal: Proposal, ops: LogitOps) -> Tensor:
    """How sure the denoiser is of each proposal, (b, s); rules rank it and compare it with γ.

    `margin`: p of the best minus p of the second best; `entropy`: 1 − H/log v; `entropy_bound`: −H; the others: p of
    the proposal.
    """
    if rule == "margin":
        best = logits.softmax(-1).topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]
    if rule == "entropy":
        return (1 - ops.entropy(logits) / math.log(logits.shape[-1])).clamp_(0, 1)
    if rule == "entropy_bound":
        return -ops.entropy(logits)
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
    threshold = at.threshold if rule in ("confidence", "margin", "entropy", "calibrated") else None
    # EB-Sampler (Ben-Hamu et al. 2025): with Σ H − max H ≤ bound, the tokens of a step share at most so many nats
    bound = at.bound if rule == "entropy_bound" else None
    return ops.commit(sure, masked, left, threshold, bound, leftmost=rule == "leftmost")


def remask(sure: Tensor, valid: Tensor, at: CommitSchedule) -> Tensor:
    """Mask-predict: the positions (b, s) bool that are fixed after the least certain ones are masked again.

    sure (b, s): certainty of every present token; valid (b, s) bool. After step j, ceil(s·(T−j−1)/T) are masked.
    """
    width = valid.sum(-1)  # (b,)
    left = (at.num_steps - at.step - 1).clamp(min=0)
    keep = width - torch.ceil(width * left / at.num_steps).long()
    keep = keep.clamp(min=1)
    return valid & (ranks(sure.masked_fill(~valid, -torch.inf)) < keep[:, None])
