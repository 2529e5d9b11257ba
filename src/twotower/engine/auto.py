"""Mode `auto`: which mode each request takes next, from what steps have cost and given so far.

The choice is made anew every few rounds, and where the load or the cost of a step is another than it was. A round costs
what it costs whatever runs, and the sum over its modes of t_m(b) = fixed_m + b · each_m, for b rows; it gives row i the
tokens y_{i,m} that a step of its mode m gives it. The choice maximises tokens per second. With λ the best rate so far,
that is the choice with the largest Σ y − λ · Σ t (Dinkelbach 1967): given which modes run at all, every row chooses for
itself.

What a mode gives is known up to chance, and a mode that nobody takes is never known better. So a standard error is
added to the mean: where two modes can't be told apart, the less known one runs and becomes known.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Weight that a step's cost keeps when the next one comes, and a row's yield: costs drift with the load, yields with the
# text, and one step's says little of a mean.
_KEEP, _KEEP_YIELD = 0.95, 0.9995
# Rounds from one choice to the next; making it costs as much as a twentieth of a round.
_PERIOD = 8
# Reasons to choose at once: a step that takes so many times what was expected; a load that has changed by one row in so
# many.
_SURPRISE, _LOAD_CHANGE = 3.0, 4
# Rounds after which a mode that nobody takes is tried, at first and, where trials change nothing, at most; and for
# how many of its steps. A mode that is n times slower by what is known waits n² times as long: a trial of it costs
# more, and is less likely to change anything.
_RETRY, _LONGEST_RETRY, _TRIAL = 400, 12800, 8
# Steps at the rate of all requests that a request's own rate starts with: requests differ less than steps do.
_PRIOR_STEPS = 12
# A choice must promise so much more than the present one: changing over is not free.
_MARGIN = 1.02


class Line(NamedTuple):
    """Seconds of a step without rows, and of each row more."""

    fixed: float
    each: float


@dataclasses.dataclass
class Cost:
    """Seconds of a step as a line over the number of rows: weighted least squares, old steps fading.

    The weights know nothing of the seconds, or the line would lie below the mean where steps differ, as drafts of
    different lengths do. A step that the machine held up counts as `_SURPRISE` times what was expected, unless it has
    many more rows than those before it, of which nothing can be expected.
    """

    weight: float = 0.0
    rows: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0
    slope: float = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        """One step of `num_rows` rows took so long."""
        if num_rows * self.weight < 1.5 * self.rows:
            seconds = min(seconds, _SURPRISE * self.expected(num_rows))
        w = 1.0 / num_rows
        self.weight = _KEEP * self.weight + w
        self.rows = _KEEP * self.rows + w * num_rows
        self.squares = _KEEP * self.squares + w * num_rows**2
        self.seconds = _KEEP * self.seconds + w * seconds
        self.products = _KEEP * self.products + w * num_rows * seconds
        mean_rows, mean_seconds = self.rows / self.weight, self.seconds / self.weight
        spread = self.squares / self.weight - mean_rows**2
        if spread > 0.05 * mean_rows**2:
            self.slope = max((self.products / self.weight - mean_rows * mean_seconds) / spread, 0.0)

    def expected(self, num_rows: int) -> float:
        """Seconds of a step of so many rows by the line."""
        line = self.line()
        return line.fixed + num_rows * line.each

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
    """Tokens per step of one row, old steps fading; `keep` is the weight that a step keeps when the next one comes."""

    keep: float
    tokens: float = 0.0
    steps: float = 0.0
    deviations: float = 1.0  # squared, of tokens from the mean; at first as if a step had been a token off

    def observe(self, num_tokens: int, num_steps: int) -> None:
        """A row got so many tokens after so many steps, and none in between."""
        off = num_tokens - num_steps * self.tokens / self.steps if self.steps else 0.0
        kept = self.keep**num_steps
        self.tokens = kept * self.tokens + num_tokens
        self.steps = kept * self.steps + num_steps
        self.deviations = kept * self.deviations + off**2

    def hoped(self) -> float:
        """The mean and its standard error."""
        return (self.tokens + math.sqrt(self.deviations)) / self.steps

    def per_step(self, before: float) -> float:
        """The rate, as if some steps at the rate `before` had been seen first."""
        return (self.tokens + _PRIOR_STEPS * before) / (self.steps + _PRIOR_STEPS)


class AutoRow:
    """One request of mode `auto`: the modes it may take, in which it is and in which it should be, and what their steps
    gave it."""

    def __init__(self, modes: Sequence[str]) -> None:
        self.modes = tuple(modes)
        self.mode = self.wanted = self.modes[0]
        self.trial = 0  # steps for which it stays in a mode to try it
        self.yields = {mode: Yield(_KEEP) for mode in modes}

    def took_step(self) -> None:
        if self.mode == self.wanted:
            self.trial = max(self.trial - 1, 0)


class _Plan(NamedTuple):
    """Modes of the rows that choose, and what a round then gives and takes."""

    modes: tuple[str, ...]
    tokens: float
    seconds: float


class Chooser:
    """Costs and yields of every mode in one engine, and the choice they lead to."""

    def __init__(self) -> None:
        self._costs: dict[str, Cost] = {}
        self._beside = Cost()
        self._yields: dict[str, Yield] = {}
        self._seen: dict[str, int] = {}
        self._patience: dict[str, int] = {}
        self._round = self._next = self._num_rows = 0

    def begin(self, rows: Sequence[AutoRow], num_rows: int) -> None:
        """Sets the mode of requests that are about to begin: the one that is best where all of `num_rows` are in it."""
        known = {mode: self._rate(mode, num_rows) for mode in self._costs}
        for row in rows:
            row.mode = row.wanted = max(row.modes, key=lambda mode: known.get(mode, 0.0))

    def observe(self, mode: str, num_rows: int, seconds: float) -> None:
        """One step of a mode's batch."""
        cost = self._costs.setdefault(mode, Cost())
        if cost.weight and seconds > _SURPRISE * cost.expected(num_rows):
            self._next = self._round
        cost.observe(num_rows, seconds)
        self._seen[mode] = self._round

    def observe_yield(self, mode: str, row: AutoRow | None, num_tokens: int, num_steps: int) -> None:
        """A request got so many tokens after so many steps of a mode, and none in between."""
        self._yields.setdefault(mode, Yield(_KEEP_YIELD)).observe(num_tokens, num_steps)
        if row is not None:
            row.yields[mode].observe(num_tokens, num_steps)

    def observe_round(self, num_rows: int, seconds: float) -> None:
        """What a round of so many rows took beside its steps."""
        self._beside.observe(num_rows, seconds)

    def due(self, num_rows: int) -> bool:
        """Whether to choose in this round, of so many rows in all; asked once in each."""
        self._round += 1
        changed = abs(num_rows - self._num_rows) * _LOAD_CHANGE >= self._num_rows
        return changed or self._round > self._next

    def choose(self, rows: Sequence[AutoRow], others: Mapping[str, int]) -> None:
        """Says which mode each row should be in, once it rests.

        `others` counts by mode the rows that have no choice, or have not begun.
        """
        self._next = self._round + _PERIOD - 1
        self._num_rows = len(rows) + sum(others.values())
        staying = collections.Counter(others)
        staying.update(row.wanted for row in rows)
        self._try_one(rows, staying)
        known = [m for m in dict.fromkeys(m for row in rows for m in row.modes) if m in self._costs]
        if any(row.trial for row in rows) or not all(row.wanted in known for row in rows):
            return  # beside one that tries a mode, the others would find that mode's fixed cost paid
        present = self._plan([row.wanted for row in rows], rows, others)
        best = self._best(rows, others, known, present)
        if best.tokens / best.seconds > _MARGIN * present.tokens / present.seconds:
            for row, mode in zip(rows, best.modes, strict=True):
                row.wanted = mode
        self._patience.update(dict.fromkeys((row.wanted for row in rows), _RETRY))

    def _try_one(self, rows: Sequence[AutoRow], staying: collections.Counter[str]) -> None:
        """Puts a row on trial in a mode that nothing is known of, or nothing recent; one trial at a time.

        Both rows where there are two and something is known: that costs less than a step of each mode, and no trial of
        one would put right what is wrongly thought of a step of two.
        """
        rates = {mode: self._rate(mode, self._num_rows) for mode in self._costs}
        fastest = max(rates.values(), default=1.0)
        for row in () if any(row.trial for row in rows) else rows:
            for mode in row.modes:
                patience = self._patience.get(mode, _RETRY)
                wait = min(patience * (fastest / rates.get(mode, fastest)) ** 2, _LONGEST_RETRY)
                stale = self._round - self._seen.get(mode, -_LONGEST_RETRY) >= wait
                if mode != row.wanted and stale and not staying[mode]:
                    both = mode in self._costs and self._num_rows == len(rows) == 2
                    for one in rows if both else [row]:
                        if mode in one.modes:
                            one.wanted, one.trial = mode, _TRIAL
                    self._seen[mode] = self._round
                    if mode in self._costs:
                        self._patience[mode] = min(2 * patience, _LONGEST_RETRY)
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
        if self._beside.weight:
            seconds = self._beside.expected(len(rows) + sum(staying.values()))
        for mode, cost in self._costs.items():
            line = cost.line()
            tokens += staying.get(mode, 0) * self._mode_yield(mode)
            num_rows = counts[mode] + staying.get(mode, 0)
            seconds += line.fixed + num_rows * line.each if num_rows else 0.0
        return _Plan(tuple(modes), tokens, seconds)

    def _rate(self, mode: str, num_rows: int) -> float:
        """Tokens per second of rows that are all in one mode."""
        beside = self._beside.expected(num_rows) if self._beside.weight else 0.0
        return num_rows * self._mode_yield(mode) / (beside + self._costs[mode].expected(num_rows))

    def _row_yield(self, row: AutoRow, mode: str) -> float:
        return row.yields[mode].per_step(self._mode_yield(mode))

    def _mode_yield(self, mode: str) -> float:
        seen = self._yields.get(mode)
        return 1.0 if seen is None else seen.hoped()
