"""Mode `auto`: which mode each request takes next, from what steps have cost and given so far.

A round costs the sum over its modes of t_m(b) = fixed_m + b · each_m, for b rows, and gives row i the tokens y_{i,m}
that a step of its mode m gives it. The choice maximises tokens per second. With λ the best rate so far, that is the
choice with the largest Σ y − λ · Σ t (Dinkelbach 1967): given which modes run at all, every row chooses for itself.
"""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Weight that an observation keeps when the next one comes: costs and yields drift with the load and the text.
_KEEP = 0.95
# Rounds after which a mode that nobody takes is tried by one request, and for how many of its steps.
_RETRY, _TRIAL = 200, 2
# Steps at the rate of all requests that a request's own rate starts with.
_PRIOR_STEPS = 4
# A choice must promise so much more than the present one: changing over is not free.
_MARGIN = 1.05


class Line(NamedTuple):
    """Seconds of a step without rows, and of each row more."""

    fixed: float
    each: float


@dataclasses.dataclass
class Cost:
    """Seconds of a step as a line over the number of rows: least squares of the relative error, old steps fading."""

    weight: float = 0.0
    rows: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0
    slope: float = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        """One step of `num_rows` rows took so long."""
        w = 1.0 / seconds**2
        self.weight = _KEEP * self.weight + w
        self.rows = _KEEP * self.rows + w * num_rows
        self.squares = _KEEP * self.squares + w * num_rows**2
        self.seconds = _KEEP * self.seconds + w * seconds
        self.products = _KEEP * self.products + w * num_rows * seconds
        mean_rows, mean_seconds = self.rows / self.weight, self.seconds / self.weight
        spread = self.squares / self.weight - mean_rows**2
        if spread > 0.05 * mean_rows**2:
            self.slope = max((self.products / self.weight - mean_rows * mean_seconds) / spread, 0.0)

    def line(self) -> Line:
        """The fit, neither part below 0.

        Where all steps had about as many rows, the slope is the last one that could be told, and at first none: hope is
        put right by the next step of more rows, and despair never would be.
        """
        mean_rows, mean_seconds = self.rows / self.weight, self.seconds / self.weight
        each = min(self.slope, mean_seconds / mean_rows)
        return Line(mean_seconds - each * mean_rows, each)


@dataclasses.dataclass
class Yield:
    """Tokens per step of one row, old steps fading."""

    tokens: float = 0.0
    steps: float = 0.0

    def observe(self, num_tokens: int, num_steps: int = 1) -> None:
        """Steps that gave so many tokens together."""
        self.tokens = _KEEP * self.tokens + num_tokens
        self.steps = _KEEP * self.steps + num_steps

    def per_step(self, before: float) -> float:
        """The rate, as if a few steps at the rate `before` had been seen first."""
        return (self.tokens + _PRIOR_STEPS * before) / (self.steps + _PRIOR_STEPS)


class AutoRow:
    """One request of mode `auto`: the modes it may take, in which it is, and what their steps gave it."""

    def __init__(self, modes: Sequence[str]) -> None:
        self.modes = tuple(modes)
        self.mode = self.modes[0]
        self.trial = 0  # steps for which it stays in a mode to try it
        self.yields = {mode: Yield() for mode in modes}

    def took_step(self, num_tokens: int) -> None:
        """A step of its mode gave it so many tokens."""
        self.trial = max(self.trial - 1, 0)
        self.yields[self.mode].observe(num_tokens)


class _Plan(NamedTuple):
    """Modes of the rows that choose, and what a round then gives and takes."""

    modes: tuple[str, ...]
    tokens: float
    seconds: float


class Chooser:
    """Costs and yields of every mode in one engine, and the choice they lead to."""

    def __init__(self) -> None:
        self._costs: dict[str, Cost] = {}
        self._yields: dict[str, Yield] = {}
        self._seen: dict[str, int] = {}
        self._round = 0

    def observe(self, mode: str, num_rows: int, seconds: float, num_tokens: int) -> None:
        """One step of a mode's batch."""
        self._costs.setdefault(mode, Cost()).observe(num_rows, seconds)
        self._yields.setdefault(mode, Yield()).observe(num_tokens, num_rows)
        self._seen[mode] = self._round

    def choose(self, rows: Sequence[AutoRow], others: Mapping[str, int]) -> None:
        """Sets the mode of rows that are between two steps; `others` counts the rows that stay in each mode."""
        self._round += 1
        staying = collections.Counter(others)
        staying.update(row.mode for row in rows if row.trial)
        free = [row for row in rows if not row.trial]
        if not free:
            return
        self._try_one(free, staying)
        free = [row for row in free if not row.trial]
        known = [m for m in dict.fromkeys(m for row in free for m in row.modes) if m in self._costs]
        if not free or not all(row.mode in known for row in free):
            return
        present = self._plan([row.mode for row in free], free, staying)
        best = self._best(free, staying, known, present)
        if best.tokens / best.seconds > _MARGIN * present.tokens / present.seconds:
            for row, mode in zip(free, best.modes, strict=True):
                row.mode = mode

    def _try_one(self, rows: Sequence[AutoRow], staying: collections.Counter[str]) -> None:
        """Puts one row on trial in a mode that nothing is known of, or nothing recent."""
        for row in rows:
            for mode in row.modes:
                stale = self._round - self._seen.get(mode, -_RETRY) >= _RETRY
                if mode != row.mode and stale and not staying[mode]:
                    row.mode, row.trial = mode, _TRIAL
                    self._seen[mode] = self._round
                    staying[mode] += 1
                    return

    def _best(self, rows: Sequence[AutoRow], staying: Mapping[str, int], known: Sequence[str], plan: _Plan) -> _Plan:
        """The plan of most tokens per second, starting from `plan`."""
        while True:
            rate = plan.tokens / plan.seconds
            plans = [plan]
            for size in range(1, len(known) + 1):
                for subset in itertools.combinations(known, size):
                    if all(set(row.modes) & set(subset) for row in rows):
                        modes = [self._pick(row, subset, rate) for row in rows]
                        plans.append(self._plan(modes, rows, staying))
            better = max(plans, key=lambda p: p.tokens - rate * p.seconds)
            if better.tokens / better.seconds <= rate * (1 + 1e-9):
                return plan
            plan = better

    def _pick(self, row: AutoRow, modes: Sequence[str], rate: float) -> str:
        mine = [m for m in modes if m in row.modes]
        return max(mine, key=lambda m: self._row_yield(row, m) - rate * self._costs[m].line().each)

    def _plan(self, modes: Sequence[str], rows: Sequence[AutoRow], staying: Mapping[str, int]) -> _Plan:
        """What a round gives and takes if the rows take these modes."""
        counts = collections.Counter(modes)
        tokens = sum(self._row_yield(row, mode) for row, mode in zip(rows, modes, strict=True))
        seconds = 0.0
        for mode, cost in self._costs.items():
            line = cost.line()
            tokens += staying.get(mode, 0) * self._mode_yield(mode)
            num_rows = counts[mode] + staying.get(mode, 0)
            seconds += line.fixed + num_rows * line.each if num_rows else 0.0
        return _Plan(tuple(modes), tokens, seconds)

    def _row_yield(self, row: AutoRow, mode: str) -> float:
        return row.yields[mode].per_step(self._mode_yield(mode))

    def _mode_yield(self, mode: str) -> float:
        seen = self._yields.get(mode)
        return 1.0 if seen is None else seen.tokens / seen.steps
