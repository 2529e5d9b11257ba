"""Mode `auto`: chooses each request's mode from the measured seconds and tokens of earlier steps.

The choice is repeated every few rounds, and at once when the load or the cost of a step changes. A round of the engine
takes a constant time plus, for each mode m that runs with b rows, t_m(b) = fixed_m + b · each_m; it gives row i, in
mode m, y_{i,m} tokens on average. The choice maximises tokens per second. With λ the best rate found so far, the best
choice has the largest Σ y − λ · Σ t (Dinkelbach 1967); for a given set of running modes this splits into one
independent choice per row.

The mean tokens per step of a mode are estimated, and the estimate of a mode that no request uses doesn't improve. So
the standard error is added to the mean: between two modes that look alike, the less measured one runs.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Factors by which the weight of earlier steps shrinks at each new step, for costs and for yields: costs drift with the
# load and yields with the text, but a single step's yield says little about the mean.
_KEEP, _KEEP_YIELD = 0.95, 0.9995
# Rounds from one choice to the next; one choice takes as long as a twentieth of a round.
_PERIOD = 8
# Choose at once if a step takes _SURPRISE times the estimate, or if the load changes by 1/_LOAD_CHANGE of itself.
_SURPRISE, _LOAD_CHANGE = 3.0, 4
# A mode that no request uses is tried for _TRIAL steps after _RETRY rounds. Each time a trial changes nothing, the wait
# doubles, up to _LONGEST_RETRY. A mode estimated n times slower waits n² times as long: trying it costs more and is
# less likely to change the choice.
_RETRY, _LONGEST_RETRY, _TRIAL = 400, 12800, 8
# A request's own rate starts as if it had taken this many steps at the mean rate of all requests, because requests
# differ less than steps do.
_PRIOR_STEPS = 12
# A new choice must promise this many times the present rate, because changing modes is not free.
_MARGIN = 1.02


class Line(NamedTuple):
    """Seconds of a step: `fixed` plus `each` for every row."""

    fixed: float
    each: float


@dataclasses.dataclass
class Cost:
    """Seconds of a step as a line over the number of rows, fitted by least squares with fading weights.

    Steps are weighted by row count only: weighting by duration biases the line low when steps of one size differ, as
    drafts of different lengths do. A step delayed by the machine counts as at most `_SURPRISE` times the estimate,
    except where it has far more rows than earlier ones, for which there is no reliable estimate.
    """

    weight: float = 0.0
    rows: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0
    slope: float = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        """Records that a step of `num_rows` rows took `seconds`."""
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
        """The line's estimate of the seconds of a step of `num_rows` rows."""
        line = self.line()
        return line.fixed + num_rows * line.each

    def line(self) -> Line:
        """The fitted line, with neither part below 0.

        While all steps have about the same number of rows, the last measured slope stays in use, 0 at first. Too low a
        slope is corrected by the next larger batch; too high a one would prevent that batch.
        """
        mean_rows, mean_seconds = self.rows / self.weight, self.seconds / self.weight
        each = min(self.slope, mean_seconds / mean_rows)
        return Line(mean_seconds - each * mean_rows, each)


@dataclasses.dataclass
class Yield:
    """Mean tokens per step of one row; each new step multiplies the weight of earlier ones by `keep`."""

    keep: float
    tokens: float = 0.0
    steps: float = 0.0
    deviations: float = 1.0  # sum of squares; starts as if one step had been a token off the mean

    def observe(self, num_tokens: int, num_steps: int) -> None:
        """Records that a row got `num_tokens` tokens in the last of `num_steps` steps, and none in the others."""
        off = num_tokens - num_steps * self.tokens / self.steps if self.steps else 0.0
        kept = self.keep**num_steps
        self.tokens = kept * self.tokens + num_tokens
        self.steps = kept * self.steps + num_steps
        self.deviations = kept * self.deviations + off**2

    def hoped(self) -> float:
        """The mean plus its standard error."""
        return (self.tokens + math.sqrt(self.deviations)) / self.steps

    def per_step(self, before: float) -> float:
        """The mean, counted as if `_PRIOR_STEPS` steps with `before` tokens each had come first."""
        return (self.tokens + _PRIOR_STEPS * before) / (self.steps + _PRIOR_STEPS)


class AutoRow:
    """One request of mode `auto`: the modes it may use, its present and its wanted mode, and its yield in each."""

    def __init__(self, modes: Sequence[str]) -> None:
        self.modes = tuple(modes)
        self.mode = self.wanted = self.modes[0]
        self.trial = 0  # steps left of a trial, during which it keeps its mode
        self.yields = {mode: Yield(_KEEP) for mode in modes}

    def took_step(self) -> None:
        """Counts a step in the present mode towards a trial."""
        if self.mode == self.wanted:
            self.trial = max(self.trial - 1, 0)


class _Plan(NamedTuple):
    """A mode for each row of mode `auto`, and the expected tokens and seconds of a round with them."""

    modes: tuple[str, ...]
    tokens: float
    seconds: float


class Chooser:
    """Measures every mode's costs and yields in one engine, and chooses from them."""

    def __init__(self) -> None:
        self._costs: dict[str, Cost] = {}
        self._beside = Cost()
        self._yields: dict[str, Yield] = {}
        self._seen: dict[str, int] = {}
        self._patience: dict[str, int] = {}
        self._round = self._next = self._num_rows = 0

    def begin(self, rows: Sequence[AutoRow], num_rows: int) -> None:
        """Sets the mode of requests that are about to begin: the fastest one if all `num_rows` requests used it."""
        known = {mode: self._rate(mode, num_rows) for mode in self._costs}
        for row in rows:
            row.mode = row.wanted = max(row.modes, key=lambda mode: known.get(mode, 0.0))

    def observe(self, mode: str, num_rows: int, seconds: float) -> None:
        """Records the seconds of one step of a mode's batch."""
        cost = self._costs.setdefault(mode, Cost())
        if cost.weight and seconds > _SURPRISE * cost.expected(num_rows):
            self._next = self._round
        cost.observe(num_rows, seconds)
        self._seen[mode] = self._round

    def observe_yield(self, mode: str, row: AutoRow | None, num_tokens: int, num_steps: int) -> None:
        """As `Yield.observe`, for a mode and, if it is of mode `auto`, for the request."""
        self._yields.setdefault(mode, Yield(_KEEP_YIELD)).observe(num_tokens, num_steps)
        if row is not None:
            row.yields[mode].observe(num_tokens, num_steps)

    def observe_round(self, num_rows: int, seconds: float) -> None:
        """Records the seconds that a round of `num_rows` rows spent outside its steps."""
        self._beside.observe(num_rows, seconds)

    def due(self, num_rows: int) -> bool:
        """Whether to choose in this round, which has `num_rows` rows; call it once per round."""
        self._round += 1
        changed = abs(num_rows - self._num_rows) * _LOAD_CHANGE >= self._num_rows
        return changed or self._round > self._next

    def choose(self, rows: Sequence[AutoRow], others: Mapping[str, int]) -> None:
        """Sets each row's `wanted` mode, to which it changes at its next block boundary.

        `others` counts, by mode, the rows whose mode is fixed and those that have not begun.
        """
        self._next = self._round + _PERIOD - 1
        self._num_rows = len(rows) + sum(others.values())
        in_use = collections.Counter(others)
        in_use.update(row.wanted for row in rows)
        self._try_one(rows, in_use)
        known = [m for m in dict.fromkeys(m for row in rows for m in row.modes) if m in self._costs]
        if any(row.trial for row in rows) or not all(row.wanted in known for row in rows):
            return  # a trial already pays its mode's fixed cost, so the mode would look too cheap to the other rows
        present = self._plan([row.wanted for row in rows], rows, others)
        best = self._best(rows, others, known, present)
        if best.tokens / best.seconds > _MARGIN * present.tokens / present.seconds:
            for row, mode in zip(rows, best.modes, strict=True):
                row.wanted = mode
        self._patience.update(dict.fromkeys((row.wanted for row in rows), _RETRY))

    def _try_one(self, rows: Sequence[AutoRow], in_use: collections.Counter[str]) -> None:
        """Starts a trial of a mode that was never measured, or not recently; one trial at a time.

        With two rows, both try a mode that was measured before: one row's trial can't correct the estimate for two.
        """
        if any(row.trial for row in rows):
            return
        rates = {mode: self._rate(mode, self._num_rows) for mode in self._costs}
        for row in rows:
            for mode in row.modes:
                if mode == row.wanted or in_use[mode] or not self._is_stale(mode, rates):
                    continue
                known = mode in self._costs
                pair = known and self._num_rows == len(rows) == 2
                for chosen in rows if pair else [row]:
                    if mode in chosen.modes:
                        chosen.wanted, chosen.trial = mode, _TRIAL
                self._seen[mode] = self._round
                if known:
                    self._patience[mode] = min(2 * self._patience.get(mode, _RETRY), _LONGEST_RETRY)
                return

    def _is_stale(self, mode: str, rates: Mapping[str, float]) -> bool:
        """Whether the last step of a mode is so long ago that a trial is due; `rates` are those of measured modes."""
        fastest = max(rates.values(), default=1.0)
        wait = self._patience.get(mode, _RETRY) * (fastest / rates.get(mode, fastest)) ** 2
        return self._round - self._seen.get(mode, -_LONGEST_RETRY) >= min(wait, _LONGEST_RETRY)

    def _best(self, rows: Sequence[AutoRow], staying: Mapping[str, int], known: Sequence[str], plan: _Plan) -> _Plan:
        """The plan with the most tokens per second, by Dinkelbach's iteration from `plan`."""
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
        """The expected tokens and seconds of a round in which the rows use these modes."""
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
        """Tokens per second if all `num_rows` rows use one mode."""
        beside = self._beside.expected(num_rows) if self._beside.weight else 0.0
        return num_rows * self._mode_yield(mode) / (beside + self._costs[mode].expected(num_rows))

    def _row_yield(self, row: AutoRow, mode: str) -> float:
        return row.yields[mode].per_step(self._mode_yield(mode))

    def _mode_yield(self, mode: str) -> float:
        seen = self._yields.get(mode)
        return 1.0 if seen is None else seen.hoped()
