"""One task over a grid of settings, each condition against `ar` under the same condition."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from twotower.decoding.modes import Mode
from twotower.decoding.params import SamplingParams
from twotower.eval.evaluate import SpeedConfig, TaskResult, evaluate, timed_work
from twotower.eval.quality import Answer, Interval, mean_score
from twotower.eval.report import gain_counts, task_retention, tokens_per_call
from twotower.eval.tasks import Task, at_distance, prompt_ids
from twotower.eval.throughput import PHASES, Quartiles, Speed, phase_seconds
from twotower.model.two_tower import TwoTower

# Modes whose tokens come in whole blocks, each token with the step that committed it.
BLOCKWISE = ("diffusion", "simulated_ar")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The grid: every mode with every value it reads (γ and T only `diffusion`, S all but `mock_ar`).

    `distances` are tokens of filler that the prompts get; empty leaves the prompts as they are.
    """

    modes: tuple[str, ...] = ("diffusion",)
    thresholds: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9, 0.95)
    block_sizes: tuple[int, ...] = (16,)
    steps_per_block: tuple[int, ...] = (16,)
    temperatures: tuple[float, ...] = (0.0,)
    distances: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        empty = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) == () and f.name != "distances"]
        if empty:
            raise ValueError(f"{', '.join(empty)} of the sweep are empty, must have at least one value")
        if any(distance < 0 for distance in self.distances):
            raise ValueError(f"distances are {self.distances}, must be 0 or more")
        for temperature in self.temperatures:
            grid(self, temperature)


class Point(NamedTuple):
    """One setting under one condition: how good, how fast, and what its tokens cost.

    `speed` is None and `phases` are empty where nothing was timed; `gain_counts` says whether the score is worth it.
    `phases` are seconds of one run over the timed prompts. `commits[step][place]` counts the tokens that were committed
    at a step of their block, by place in the block; only blockwise modes have it.
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
    def condition(self) -> str:
        """What the setting shares with the ar that it is held against."""
        values = {"temperature": self.params.temperature, "batch": self.batch_size, "distance": self.distance}
        return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)

    def row(self) -> dict[str, Any]:
        """One flat line of a table; None is what a mode doesn't read or what wasn't measured."""
        p, speed = self.params, self.speed
        line: dict[str, Any] = {
            "task": self.task,
            "mode": p.mode,
            "confidence_threshold": p.confidence_threshold if p.mode == "diffusion" else None,
            "block_size": p.block_size if p.mode not in ("ar", "mock_ar") else None,
            "steps_per_block": p.steps_per_block if p.mode == "diffusion" else None,
            "temperature": p.temperature,
        }
        names = ("batch_size", "distance", "prompt_tokens", "examples", "score", "degenerate")
        line |= {name: getattr(self, name) for name in names}
        line |= dict(zip(("retention", "retention_low", "retention_high"), self.retention, strict=True))
        line["timed_prompts"] = self.timed_prompts
        for name in Speed._fields:
            for part in Quartiles._fields:
                line[f"{name}_{part}"] = None if speed is None else getattr(getattr(speed, name), part)
        line["gain_counts"] = self.gain_counts
        line |= {"tokens_per_nfe": self.tokens_per_nfe, "tokens_per_context_call": self.tokens_per_context_call}
        return line | {f"{phase}_phase_seconds": self.phases.get(phase) for phase in PHASES}


def sweep(
    model: TwoTower,
    task: Task,
    config: SweepConfig,
    timing: SpeedConfig,
    advance: Callable[[str], None] = lambda what: None,
) -> Iterator[list[Point]]:
    """Points of one temperature and distance after another: of ar and every setting, at every batch size."""
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
    base = SamplingParams(mode="ar", temperature=temperature, seed=config.seed)
    found = {"ar": base}
    for name in config.modes:
        mode = dataclasses.replace(base, mode=cast(Mode, name))
        if name == "diffusion":
            for s, t, γ in itertools.product(config.block_sizes, config.steps_per_block, config.thresholds):
                found[f"diffusion γ {γ} S {s} T {t}"] = dataclasses.replace(
                    mode, block_size=s, steps_per_block=t, confidence_threshold=γ
                )
        elif name in ("ar", "mock_ar"):
            found[name] = mode
        else:
            found |= {f"{name} S {s}": dataclasses.replace(mode, block_size=s) for s in config.block_sizes}
    return found


def commits(answers: Sequence[Answer], block_size: int) -> list[list[int]]:
    """Tokens of sound answers by the step that committed them and their place in the block, (steps, block_size)."""
    pairs = [(step, i % block_size) for a in answers if not a.degenerate for i, step in enumerate(a.commit_steps)]
    table = [[0] * block_size for _ in range(max((step for step, _ in pairs), default=-1) + 1)]
    for step, place in pairs:
        table[step][place] += 1
    return table


def points(
    model: TwoTower, result: TaskResult, settings: Mapping[str, SamplingParams], distance: int | None
) -> list[Point]:
    """A result as points, with one more run of every timed setting for its phases."""
    assert model.tokenizer is not None
    lengths = [len(prompt_ids(example, model.tokenizer)) for example in result.task.examples]
    found = []
    for size, (label, params) in itertools.product(result.timed or (None,), settings.items()):
        answers = result.answers[label]
        per_nfe, per_context_call = tokens_per_call(answers)
        examples = result.timed[size] if size else []
        speed = result.speeds[size].get(label) if size and examples else None
        phases = {}
        if size and speed:
            work = timed_work(model, result.task, {label: params}, examples)
            phases = phase_seconds(model, work._replace(batch_size=size), label)
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
            commits=commits(answers, params.block_size) if params.mode in BLOCKWISE else [],
        )
        found.append(point)
    return found
