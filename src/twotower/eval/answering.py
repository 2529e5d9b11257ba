"""A decoding mode's answers to the questions of a task, and their scores."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from twotower.decoding.generate import generate
from twotower.decoding.output import Generation, GenerationStats
from twotower.decoding.params import SamplingParams
from twotower.decoding.scoring import score
from twotower.eval.judging import is_degenerate
from twotower.eval.tasks import Example, Task, prompt_ids
from twotower.model.two_tower import TwoTower

# Questions of similar length are answered as one batch of at most so many rows, and so many prompt tokens with padding.
# Every answer is the one that its question would get alone.
_MOST_ROWS, _MOST_TOKENS = 8, 8192


class Question(NamedTuple):
    """The ids of a prompt, and the example that says how long its answer may be and how it is judged."""

    prompt_ids: tuple[int, ...]
    example: Example


@dataclasses.dataclass(frozen=True)
class ScoredAnswer:
    """A reply to one question: its score in [0, 1], what it cost, and at which step each token was committed."""

    text: str
    score: float
    degenerate: bool
    stats: GenerationStats
    commit_steps: Sequence[int]

    @property
    def is_sound(self) -> bool:
        """Whether it is worth reading: neither empty nor degenerate."""
        return bool(self.text.strip()) and not self.degenerate


def request(example: Example, params: SamplingParams, index: int) -> SamplingParams:
    """The settings for question number `index` of a task: with its own length, stop strings and seed."""
    assert params.seed is not None
    return dataclasses.replace(
        params, max_new_tokens=example.max_new_tokens, stop=example.stop, seed=params.seed + index
    )


def answer(model: TwoTower, task: Task, params: SamplingParams) -> list[ScoredAnswer]:
    """The answers to all questions of a task, in its order. `params` must have a seed.

    Raises ValueError for a model without a tokenizer.
    """
    return answer_questions(model, questions(model, task), params)


def questions(model: TwoTower, task: Task) -> list[Question]:
    """The questions of a task, in its order. Raises ValueError for a model without a tokenizer."""
    if model.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json to read tasks with; add one")
    return [Question(tuple(prompt_ids(example, model)), example) for example in task.examples]


def answer_questions(model: TwoTower, asked: Sequence[Question], params: SamplingParams) -> list[ScoredAnswer]:
    """The answers to questions, in their order. `params` must have a seed."""
    answers: dict[int, ScoredAnswer] = {}
    for batch in batches([len(question.prompt_ids) for question in asked]):
        settings = [request(asked[i].example, params, i) for i in batch]
        replies = generate(model, [asked[i].prompt_ids for i in batch], settings)
        answers |= {i: _judged(model, asked[i], done) for i, done in zip(batch, replies, strict=True)}
    return [answers[i] for i in range(len(asked))]


def batches(lengths: list[int]) -> list[list[int]]:
    """The places of prompts of these lengths, shortest first, in batches."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found and len(found[-1]) < _MOST_ROWS and (len(found[-1]) + 1) * lengths[i] <= _MOST_TOKENS:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _judged(model: TwoTower, question: Question, done: Generation) -> ScoredAnswer:
    assert done.text is not None
    example = question.example
    own = (
        likelihood_score(model, question.prompt_ids, done.token_ids, done.text)
        if example.scorer == "likelihood"
        else example.score(done.text)
    )
    return ScoredAnswer(done.text, own, is_degenerate(done.text), done.stats, done.commit_steps)


def likelihood_score(model: TwoTower, prompt: Sequence[int], new: Sequence[int], text: str) -> float:
    """exp(mean log p) of the new tokens under the context tower, 0 for a degenerate or empty text.

    This is the probability per token. The share of `ar`'s that a mode keeps is exp(-nats per token that it loses).
    """
    if is_degenerate(text) or not text.strip():
        return 0.0
    [found] = score(model, [new], [prompt])
    return math.exp(found.total / len(new))


def mean_score(answers: Sequence[ScoredAnswer]) -> float:
    """The mean score of at least one answer."""
    return statistics.mean(a.score for a in answers)
