"""Evaluates a task over a grid of settings, each beside `ar` under the same condition."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from twotower.decoding.modes import MODES, Mode
from twotower.decoding.params import SamplingParams
from twotower.errors import SettingError
from twotower.eval.answering import ScoredAnswer, mean_score
from twotower.eval.evaluate import SpeedConfig, TaskResult, evaluate, timed_work
from twotower.eval.report import gain_counts, task_retention, tokens_per_call, tokens_per_pass
from twotower.eval.retention import Interval
from twotower.eval.tasks import Task, at_distance, prompt_ids
from twotower.eval.throughput import PHASES, Quartiles, Speed, phase_seconds
from twotower.model.two_tower import TwoTower

# The settings that are swept if a mode reads them: their letters in labels, and their values' fields in SweepConfig.
_AXES = {"block_size": ("S", "block_sizes"), "steps_per_block": ("T", "steps_per_block")}
# What decides how boldly a mode commits, where it reads that: one of these at a time.
_DIALS = {
    "confidence_threshold": ("γ", "thresholds"),
    "target_retention": ("target", "target_retentions"),
    "entropy_bound": ("H", "entropy_bounds"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The grid: every mode with every combination of the values that it reads, at every temperature.

    A mode that commits by a threshold also runs with each of the `target_retentions`, by the checkpoint's calibration,
    and of the `entropy_bounds`, by the rule of that name, in place of one, and one that drafts with each of the
    `drafters`, if there are any. `distances` are numbers of tokens of filler
    that the prompts get; if empty, the prompts are as the task has them. Empty `block_sizes` are the checkpoint's own.
    """

    modes: tuple[str, ...] = ("diffusion",)
    thresholds: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9, 0.95)
    target_retentions: tuple[float, ...] = ()
    entropy_bounds: tuple[float, ...] = ()
    block_sizes: tuple[int, ...] = ()
    steps_per_block: tuple[int, ...] = (16,)
    drafters: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (0.0,)
    distances: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == () and field.default != ():
                raise SettingError(field.name, (), "at least one value")
        if any(distance < 0 for distance in self.distances):
            raise SettingError("distances", self.distances, "0 or more")
        for temperature in self.temperatures:
            grid(self, temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One setting under one condition: its score, its speed, and what its tokens cost.

    If nothing was timed, `speed` is None and `phases` is empty; `gain_counts` says whether the score is high enough for
    the gain in speed to count. `phases` are the seconds of one run over the timed prompts. `commits[step][place]`
    counts the tokens at a place of their block that were committed at a step; empty if the mode fills no blocks.
    """

    task: str
    label: str
    params: SamplingParams
    batch_size: int | None
    distance: int | None
    prompt_tokens: float
    examples: int
    score: float
    degenerate: int
    retention: Interval
    timed_prompts: int
    speed: Speed | None
    gain_counts: bool
    tokens_per_nfe: float | None
    tokens_per_context_call: float | None
    phases: dict[str, float]
    commits: list[list[int]]

    @property
    def tokens_per_pass(self) -> float | None:
        """New tokens per pass of either tower after prefill."""
        return tokens_per_pass(self.tokens_per_nfe, self.tokens_per_context_call)

    @property
    def condition(self) -> str:
        """The temperature, batch size and distance, in words, which the setting shares with the ar beside it."""
        values = {"temperature": self.params.temperature, "batch": self.batch_size, "distance": self.distance}
        return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)

    def row(self) -> dict[str, Any]:
        """One flat row of a table; None for a setting that the mode does not read, and for what was not measured."""
        p, speed = self.params, self.speed
        read = MODES[p.mode].settings
        line: dict[str, Any] = {"task": self.task, "mode": p.mode}
        line |= {setting: getattr(p, setting) if setting in read else None for setting in (*_DIALS, *_AXES, "drafter")}
        line["temperature"] = p.temperature
        names = ("batch_size", "distance", "prompt_tokens", "examples", "score", "degenerate")
        line |= {name: getattr(self, name) for name in names}
        line |= dict(zip(("retention", "retention_low", "retention_high"), self.retention, strict=True))
        line["timed_prompts"] = self.timed_prompts
        for name in (field.name for field in dataclasses.fields(Speed)):
            for part in Quartiles._fields:
                line[f"{name}_{part}"] = None if speed is None else getattr(getattr(speed, name), part)
        line["gain_counts"] = self.gain_counts
        line |= {"tokens_per_nfe": self.tokens_per_nfe, "tokens_per_context_call": self.tokens_per_context_call}
        line["tokens_per_pass"] = self.tokens_per_pass
        return line | {f"{phase}_phase_seconds": self.phases.get(phase) for phase in PHASES}


def sweep(
    model: TwoTower,
    task: Task,
    config: SweepConfig,
    timing: SpeedConfig,
    advance: Callable[[str], None] = lambda what: None,
) -> Iterator[list[Point]]:
    """Yields the points of one temperature and distance after another: ar and every setting, at every batch size."""
    if not config.block_sizes:
        config = dataclasses.replace(config, block_sizes=(model.config.block_size,))
    for temperature, distance in itertools.product(config.temperatures, config.distances or (None,)):
        asked = task
        where = f"temperature {temperature}"
        if distance is not None:
            asked = Task(task.name, tuple(at_distance(example, distance) for example in task.examples))
            where += f", distance {distance}"
        advance(where)
        result = evaluate(model, asked, grid(config, temperature), timing, advance)
        yield points(model, result, grid(config, temperature), distance)


def grid(config: SweepConfig, temperature: float) -> dict[str, SamplingParams]:
    """Settings by label, "ar" first."""
    sizes = config.block_sizes or (None,)
    base = SamplingParams(
        mode="ar", temperature=temperature, seed=config.seed, block_size=sizes[0], past_positions=True
    )
    found = {"ar": base}
    for name in config.modes:
        read = [setting for setting in _AXES if setting in MODES[name].settings]
        every = (getattr(config, _AXES[setting][1]) or sizes for setting in read)
        for (dial, fields), *values in itertools.product(_dials(config, name), *every):
            axes = (f"{_AXES[setting][0]} {value}" for setting, value in zip(read, values, strict=True))
            chosen: dict[str, Any] = fields | dict(zip(read, values, strict=True))
            found[" ".join([name, *dial, *axes])] = dataclasses.replace(base, mode=cast(Mode, name), **chosen)
    return found


def _dials(config: SweepConfig, mode: str) -> list[tuple[list[str], dict[str, Any]]]:
    """The ways to commit in a mode, or to draft, each as its part of a label and its settings; one without any in other
    modes."""
    if "drafter" in MODES[mode].settings and config.drafters:
        return [([drafter], {"drafter": drafter}) for drafter in config.drafters]
    if "confidence_threshold" not in MODES[mode].settings:
        return [([], {})]
    return [
        ([f"{letter} {value}"], commits_by(setting, value))
        for setting, (letter, values) in _DIALS.items()
        for value in getattr(config, values)
    ]


def commits_by(setting: str, value: float) -> dict[str, Any]:
    """The settings by which `diffusion` commits, of which one is given: a threshold, a target or a bound."""
    return {setting: value} | ({"commit_rule": "entropy_bound"} if setting == "entropy_bound" else {})


def commits(answers: Sequence[ScoredAnswer], block_size: int) -> list[list[int]]:
    """How many tokens each step committed at each place of a block, (steps, block_size), without degenerate answers."""
    pairs = [(step, i % block_size) for a in answers if not a.degenerate for i, step in enumerate(a.commit_steps)]
    table = [[0] * block_size for _ in range(max((step for step, _ in pairs), default=-1) + 1)]
    for step, place in pairs:
        table[step][place] += 1
    return table


def points(
    model: TwoTower, result: TaskResult, settings: Mapping[str, SamplingParams], distance: int | None
) -> list[Point]:
    """A result as points; runs every timed setting once more for its phases."""
    lengths = [len(prompt_ids(example, model)) for example in result.task.examples]
    found = []
    for size, (label, params) in itertools.product(result.timed or (None,), settings.items()):
        answers = result.answers[label]
        per_nfe, per_context_call = tokens_per_call(answers)
        examples = result.timed[size] if size else []
        speed = result.speeds[size].get(label) if size and examples else None
        phases = {}
        if size and speed:
            phases = phase_seconds(model, timed_work(model, result.task, {label: params}, examples, size), label)
        point = Point(
            task=result.task.name,
            label=label,
            params=params,
            batch_size=size,
            distance=distance,
            prompt_tokens=statistics.mean(lengths),
            examples=len(answers),
            score=mean_score(answers),
            degenerate=sum(a.degenerate for a in answers),
            retention=task_retention(result, label),
            timed_prompts=len(examples) if speed else 0,
            speed=speed,
            gain_counts=gain_counts(result, label),
            tokens_per_nfe=per_nfe,
            tokens_per_context_call=per_context_call,
            phases=phases,
            commits=commits(answers, params.block_size or 1) if MODES[params.mode].fills_blocks else [],
        )
        found.append(point)
    return found
