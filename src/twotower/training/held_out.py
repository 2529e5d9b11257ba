"""Measuring held-out rows: the likelihood of their tokens, and how often decoding gives their answers."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from twotower.config import TwoTowerConfig
from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.model.two_tower import TwoTower
from twotower.training.corpus.shards import Corpus, CorpusBatch
from twotower.training.objectives.protocol import Measured
from twotower.training.run.ranks import Ranks

# The number of questions that are answered, and the most tokens of an answer that are compared.
_NUM_QUESTIONS = 16
_ANSWER_LENGTH = 64


def measure(
    corpus: Corpus, rows_at_once: int, ranks: Ranks, objective: Callable[[CorpusBatch], dict[str, Measured]]
) -> dict[str, float]:
    """Nats per token over the corpus, by the names that `objective` gives for `rows_at_once` rows at a time.

    All ranks must make equally many calls of `objective`, so each takes an equal share and the rows left over are not
    measured. Raises ValueError for fewer rows than ranks.
    """
    each = len(corpus) // ranks.size
    if each == 0:
        raise ValueError(f"the held-out corpus has {len(corpus)} rows, must have one for each of {ranks.size} ranks")
    sums: dict[str, list[float]] = {}
    for start in range(0, each, rows_at_once):
        first = ranks.rank * each
        batch = corpus.batch(range(first + start, first + min(start + rows_at_once, each)), 0)
        for name, (total, count) in objective(batch).items():
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0, 0.0]), (total, count), strict=True)]
    found = {}
    for name, values in sums.items():
        total, count = ranks.total(values)
        found[name] = total / max(count, 1)
    return found


class Question(NamedTuple):
    """The token ids of a document's unscored beginning, and of the text to be decoded after it."""

    prompt: list[int]
    answer: list[int]


def answer(model: TwoTower, corpus: Corpus, block_size: int, ranks: Ranks) -> dict[str, float]:
    """Decodes answers to the first 16 questions of a corpus, greedily in mode `diffusion` with its default settings.

    `tokens_per_nfe` is the number of new tokens per pass of the denoiser, `exact_match` the share of answers that equal
    the corpus's token for token. Each rank answers its share. Empty where the corpus has no question.
    """
    every = list(itertools.islice(questions(corpus, model.config), _NUM_QUESTIONS))
    mine = every[ranks.rank :: ranks.size]
    params = [
        SamplingParams(max_new_tokens=len(q.answer), block_size=block_size, past_positions=True, temperature=0.0)
        for q in mine
    ]
    results = generate(model, [q.prompt for q in mine], params) if mine else []
    right = sum(r.token_ids == q.answer for r, q in zip(results, mine, strict=True))
    num_tokens = sum(r.stats.num_tokens for r in results)
    calls = sum(r.stats.denoiser_calls for r in results)
    all_right, all_tokens, all_calls = ranks.total([right, num_tokens, calls])
    return {"tokens_per_nfe": all_tokens / all_calls, "exact_match": all_right / len(every)} if every else {}


def questions(corpus: Corpus, config: TwoTowerConfig) -> Iterator[Question]:
    """The complete question-answer documents of a corpus: an unscored beginning of BOS and a prompt, then a text that
    reaches an end token (any text, where the config has none).

    A row's first and last document may be truncated; these tests skip such documents. An answer is the text up to its
    end token, and at most 64 tokens.
    """
    start = [] if config.bos_token_id is None else [config.bos_token_id]
    for number in range(len(corpus)):
        row = corpus.row(number)
        for document in range(int(row.document[-1]) + 1):
            places = row.document == document
            ids, scored = row.ids[places].tolist(), row.scored[places].tolist()
            num_unscored = scored.index(True) if True in scored else len(ids)
            text = ids[num_unscored:]
            ends = [i for i, token in enumerate(text, 1) if token in config.eos_token_ids]
            whole = bool(ends) if config.eos_token_ids else bool(text)
            if ids[: len(start)] == start and num_unscored > len(start) and whole:
                yield Question(ids[:num_unscored], text[: min([_ANSWER_LENGTH, *ends])])
