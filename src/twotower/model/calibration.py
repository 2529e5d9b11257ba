"""Commit rules whose loss against `ar` was measured. Letters: S positions of a block."""

import dataclasses
import functools
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedRule:
    """Commits a token whose probability is above the threshold of its place and of the number of masks then.

    `thresholds[m - 1][i]` is that of place i of a block in which m places are masked, S of S each, put where a token is
    wrong with the chance `risk`. `shown` is the share of `ar`'s score that this rule, and every one before it, was
    shown to keep. `tokens_per_nfe` is its speed. `held_out` is the share that it kept on questions which had no part in
    that, with the ends of its 95 % interval, None where undefined.
    """

    risk: float
    thresholds: tuple[tuple[float, ...], ...]
    shown: float
    tokens_per_nfe: float
    held_out: tuple[float | None, float | None, float | None]

    @functools.cached_property
    def table(self) -> Tensor:
        """The thresholds as a tensor (S, S) float32."""
        return torch.tensor(self.thresholds, dtype=torch.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """A checkpoint's calibrated commit rules, from the safest to the boldest, for blocks of `block_size` places and at
    most `steps_per_block` steps.

    Each rule keeps what it was `shown` to with a chance of `confidence`, on questions like those of `prompts`, of which
    there were `num_prompts`. `fingerprint` is that of the weights that were measured.
    """

    block_size: int
    steps_per_block: int
    confidence: float
    prompts: str
    num_prompts: int
    fingerprint: str
    rules: tuple[CalibratedRule, ...]

    @property
    def most(self) -> float:
        """The largest share of `ar`'s score that a rule was shown to keep."""
        return max((rule.shown for rule in self.rules), default=0.0)

    @property
    def most_told(self) -> str:
        """`most` in four digits, rounded down: whoever asks for that is not refused."""
        return f"{math.floor(self.most * 1e4) / 1e4:g}"

    def fastest(self, target: float) -> CalibratedRule | None:
        """Of the rules that were shown to keep the share `target` of `ar`'s score the fastest; None where none was."""
        kept = [rule for rule in self.rules if rule.shown >= target]
        return max(kept, key=lambda rule: rule.tokens_per_nfe, default=None)
