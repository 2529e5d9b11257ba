"""One task under several settings: what each answers, and how fast it is where all of them write sound text."""

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import NamedTuple

from twotower.decoding.params import SamplingParams
from twotower.eval.quality import Answer, answer, mean_score, request
from twotower.eval.tasks import Task, prompt_ids
from twotower.eval.throughput import Speed, Work, speeds
from twotower.model.two_tower import TwoTower

FEWEST_REPEATS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Timing: a sample of at most `prompts` of each task, in `repeats` rounds, at each of `batch_sizes`."""

    prompts: int = 8
    repeats: int = FEWEST_REPEATS
    batch_sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.repeats < FEWEST_REPEATS:
            raise ValueError(f"repeats is {self.repeats}, must be at least {FEWEST_REPEATS} for a median")
        if not self.batch_sizes or not all(1 <= size <= self.prompts for size in self.batch_sizes):
            raise ValueError(
                f"batch sizes are {self.batch_sizes}, must be in [1, {self.prompts}], the number of timed prompts; "
                "time more prompts for larger ones"
            )


class TaskResult(NamedTuple):
    """Params and answers by setting, speeds by batch size and setting, and the examples timed at each batch size.

    Only what is worth reading is timed, because repetition is easy to predict and would count as speed: tasks where ar
    scores at all (`timed` is empty for others), settings with sound answers to at least half of the questions (neither
    empty nor degenerate), and examples to which every one of those settings gives a sound answer. `timed` are places in
    the task, a sample of those, as files often begin with what is easy, in whole batches; a batch size that too few
    examples fill has none of them and no speeds.
    """

    task: Task
    settings: Mapping[str, SamplingParams]
    answers: dict[str, list[Answer]]
    speeds: dict[int, dict[str, Speed]]
    timed: dict[int, list[int]]


def evaluate(
    model: TwoTower,
    task: Task,
    settings: Mapping[str, SamplingParams],
    timing: SpeedConfig | None,
    advance: Callable[[str], None] = lambda what: None,
) -> TaskResult:
    """Answers a task under every setting, "ar" among them, and times them unless `timing` is None.

    Settings must have a seed. `advance` is told before each part what comes next.
    """
    answers = {}
    for name, params in settings.items():
        advance(f"{task.name}: answers of {name}")
        answers[name] = answer(model, task, params)
    if timing is None or mean_score(answers["ar"]) == 0:
        return TaskResult(task, settings, answers, {}, {})
    sound = {name: [_is_sound(reply) for reply in replies] for name, replies in answers.items()}
    readable = {name: p for name, p in settings.items() if name == "ar" or sum(sound[name]) >= len(sound[name]) / 2}
    usable = [i for i in range(len(task.examples)) if all(sound[name][i] for name in readable)]
    drawn = random.Random(settings["ar"].seed).sample(usable, min(timing.prompts, len(usable)))
    timed = {size: sorted(drawn[: len(drawn) // size * size]) for size in timing.batch_sizes}
    found = {}
    for size, examples in timed.items():
        if examples:
            advance(f"{task.name}: speed at batch {size}")
            work = timed_work(model, task, readable, examples)._replace(batch_size=size)
            found[size] = speeds(model, work, timing.repeats)
    return TaskResult(task, settings, answers, found, timed)


def timed_work(model: TwoTower, task: Task, settings: Mapping[str, SamplingParams], examples: list[int]) -> Work:
    """The prompts of some of a task's examples, with each setting's params for them, one at a time."""
    assert model.tokenizer is not None
    prompts = [prompt_ids(task.examples[i], model.tokenizer) for i in examples]
    params = {name: [request(task.examples[i], p, i) for i in examples] for name, p in settings.items()}
    return Work(prompts, params, 1)


def _is_sound(reply: Answer) -> bool:
    return bool(reply.text.strip()) and not reply.degenerate
