"""The learning rate of each step, and the guard that skips harmful steps."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from twotower.errors import SettingError

# A spike is measured against this many losses of accepted steps, once there are enough of them.
_RECENT = 64
_ENOUGH = 16
# The number of last steps over which skipped ones are counted.
WINDOW = 100

Fault = Literal["not finite", "spike"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """Warm-up, stable, decay: the learning rate rises linearly to `learning_rate` over `warmup_steps`, stays there, and
    over the last `decay_steps` of `steps` falls linearly to `final_learning_rate`."""

    steps: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    decay_steps: int

    def __post_init__(self) -> None:
        if self.final_learning_rate > self.learning_rate:
            rule = f"in [0, {self.learning_rate}], which is learning_rate"
            raise SettingError("final_learning_rate", self.final_learning_rate, rule)
        if self.final_learning_rate > 0 and self.decay_steps == 0:
            rule = "0 without decay_steps, over which the rate falls to it"
            raise SettingError("final_learning_rate", self.final_learning_rate, rule, "give decay_steps too")
        if self.decay_steps > 0 and self.final_learning_rate == self.learning_rate:
            rule = f"0 with final_learning_rate={self.final_learning_rate}, which is learning_rate: nothing falls"
            raise SettingError("decay_steps", self.decay_steps, rule, "lower final_learning_rate")
        if self.decay_steps > self.steps:
            raise SettingError("decay_steps", self.decay_steps, f"in [0, {self.steps}], which is steps")

    def rate(self, step: int) -> float:
        """The learning rate of a 0-based step."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        left = 1.0 if self.decay_steps == 0 else min(1.0, (self.steps - step) / self.decay_steps)
        return warm * (self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * left)


def rise(was: Mapping[str, Any], now: RateSchedule, step: int) -> tuple[float, float] | None:
    """The rates before and after `step`, where the schedule in the record `was` of a run had begun to let it fall and
    `now` raises it again; None elsewhere."""
    names = [field.name for field in dataclasses.fields(RateSchedule)]
    if step == 0 or not was.keys() >= set(names):  # records of older versions say nothing of rates
        return None
    before = RateSchedule(**{name: was[name] for name in names})
    rates = before.rate(step - 1), now.rate(step)
    return rates if step > before.steps - before.decay_steps and rates[1] > rates[0] else None


class Guard:
    """Finds the steps whose gradient would do harm: the loss or the gradient's norm is not finite, or the loss spikes
    above `spike_factor` times the 90th percentile of the recent losses (0: no test for spikes).

    The percentile and not the median, because once most answers are learnt the rows that still hold a hard one have
    several times the median loss, and they are what is left to learn.
    """

    def __init__(self, *, spike_factor: float, skip_limit: int) -> None:
        if not (spike_factor == 0 or spike_factor > 1):
            raise SettingError("spike_factor", spike_factor, "above 1, or 0 to allow any loss")
        self.spike_factor, self.skip_limit = spike_factor, skip_limit
        self.num_skipped = 0
        self._losses: list[float] = []
        self._skipped: list[int] = []

    def judge(self, step: int, loss: float, grad_norm: float) -> Fault | None:
        """The fault of a 0-based step, or None. A step with a fault is counted, and the caller must skip its update.

        Raises ValueError once more than `skip_limit` of the last 100 steps had one.
        """
        fault = self._fault(loss, grad_norm)
        if fault is None:
            self._losses = [*self._losses, loss][-_RECENT:]
            return None
        self.num_skipped += 1
        self._skipped = [s for s in [*self._skipped, step] if s > step - WINDOW]
        if len(self._skipped) > self.skip_limit:
            raise ValueError(
                f"{len(self._skipped)} of the last {WINDOW} steps were skipped, the last for a loss of {loss:.4g} with "
                f"a gradient of norm {grad_norm:.4g} ({fault}), must be at most skip_limit={self.skip_limit}; lower "
                "the learning rate, with --allow-changes, and call again: the last saved state is whole"
            )
        return fault

    def _fault(self, loss: float, grad_norm: float) -> Fault | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "not finite"
        known = self.spike_factor > 0 and len(self._losses) >= _ENOUGH
        return "spike" if known and loss > self.spike_factor * _high(self._losses) else None

    @property
    def recent_loss(self) -> float | None:
        """The mean loss of the last accepted steps, at most 64; None before the first."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    def state(self) -> dict[str, Any]:
        """The guard's memory, for `restored`, as JSON holds it."""
        return {"num_skipped": self.num_skipped, "losses": self._losses, "skipped": self._skipped}

    def restored(self, state: dict[str, Any]) -> Self:
        """This guard with the memory that `state` gave."""
        self.num_skipped, self._losses, self._skipped = state["num_skipped"], state["losses"], state["skipped"]
        return self


def _high(values: Sequence[float]) -> float:
    """The 90th percentile."""
    return sorted(values)[len(values) * 9 // 10]
