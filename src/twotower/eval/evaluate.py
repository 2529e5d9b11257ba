"""Answers a task under several settings, and times the settings on questions to which all of them write sound text."""

import dataclasses
import random
from collections.abc import Callable, Mapping

from twotower.decoding.params import SamplingParams
from twotower.decoding.record import check_drafter
from twotower.decoding.unmasking import chosen_rule
from twotower.errors import SettingError, check_integer
from twotower.eval.answering import ScoredAnswer, answer, mean_score, request
from twotower.eval.tasks import Task, prompt_ids
from twotower.eval.throughput import Speed, Work, speeds
from twotower.model.two_tower import TwoTower

FEWEST_REPEATS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How to time: at most `prompts` prompts of each task, in `repeats` rounds, at each of `batch_sizes`."""

    prompts: int = 8
    repeats: int = FEWEST_REPEATS
    batch_sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        check_integer("repeats", self.repeats, FEWEST_REPEATS, fix="a median needs that many")
        if not self.batch_sizes or not all(1 <= size <= self.prompts for size in self.batch_sizes):
            rule = f"in [1, {self.prompts}], the number of timed prompts"
            raise SettingError("batch_sizes", self.batch_sizes, rule, "time more prompts for larger ones")


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What was measured on one task; `settings` and `answers` are by setting's name, `speeds` by batch size and name.

    Repetition is easy to predict and would count as speed, so only text worth reading is timed:

    - tasks on which ar scores above 0; for others `timed` and `speeds` are empty,
    - settings with sound answers (neither empty nor degenerate) to at least half of the questions,
    - questions to which every such setting gives a sound answer.

    `timed` has the places of the timed questions in the task, by batch size: a random sample, because files often begin
    with their easiest questions, in whole batches. It is empty for a batch size that too few questions fill, which then
    has no speeds.
    """

    task: Task
    settings: Mapping[str, SamplingParams]
    answers: dict[str, list[ScoredAnswer]]
    speeds: dict[int, dict[str, Speed]]
    timed: dict[int, list[int]]


def evaluate(
    model: TwoTower,
    task: Task,
    settings: Mapping[str, SamplingParams],
    timing: SpeedConfig | None,
    advance: Callable[[str], None] = lambda what: None,
) -> TaskResult:
    """Answers a task under every setting, and times them unless `timing` is None.

    One setting is named "ar", and all have a seed. Raises SettingError for a target that the model's calibration can't
    promise, and for a drafter that the checkpoint lacks. `advance` is called before each part with a line that says
    what it is.
    """
    for params in settings.values():
        settled = params.settled(model.config.block_size, model.sampling)  # before anything runs
        if settled.drafter is not None:
            check_drafter(model, settled.drafter)
        if settled.target_retention is not None:
            chosen_rule(model.calibration, settled)
    answers = {}
    for name, params in settings.items():
        advance(f"{task.name}: answers of {name}")
        answers[name] = answer(model, task, params)
    if timing is None or mean_score(answers["ar"]) == 0:
        return TaskResult(task, settings, answers, {}, {})
    sound = {name: [reply.is_sound for reply in replies] for name, replies in answers.items()}
    readable = {name: p for name, p in settings.items() if name == "ar" or sum(sound[name]) >= len(sound[name]) / 2}
    usable = [i for i in range(len(task.examples)) if all(sound[name][i] for name in readable)]
    drawn = random.Random(settings["ar"].seed).sample(usable, min(timing.prompts, len(usable)))
    timed = {size: sorted(drawn[: len(drawn) // size * size]) for size in timing.batch_sizes}
    found = {}
    for size, examples in timed.items():
        if examples:
            advance(f"{task.name}: speed at batch {size}")
            found[size] = speeds(model, timed_work(model, task, readable, examples, size), timing.repeats)
    return TaskResult(task, settings, answers, found, timed)


def timed_work(
    model: TwoTower, task: Task, settings: Mapping[str, SamplingParams], examples: list[int], batch_size: int
) -> Work:
    """The prompts at these places of a task, with the params of every setting for each."""
    assert model.tokenizer is not None
    prompts = [prompt_ids(task.examples[i], model) for i in examples]
    params = {name: [request(task.examples[i], p, i) for i in examples] for name, p in settings.items()}
    return Work(prompts, params, batch_size)
