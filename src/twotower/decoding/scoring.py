"""Log-probabilities of given texts under the context tower. Letters: b rows, t tokens, c tokens of a chunk,
v vocabulary."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.decoding.likeliest import top_tokens
from twotower.decoding.prompt import Prompt, check_prompts, prompt_ids, text_ids
from twotower.errors import check_integer
from twotower.model.two_tower import PREFILL_CHUNK, TwoTower


class TokenScore(NamedTuple):
    """A token and its log-probability given all tokens before it, None for a first token that nothing stands before.

    `is_greedy` says whether it is the likeliest token at its place; `top` are the likeliest tokens there with their
    log-probabilities, best first, as many as were asked for.
    """

    id: int
    logprob: float | None = None
    is_greedy: bool = False
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one text under the context tower.

    With each of `token_ids` go its natural log-probability in `logprobs`, in `is_greedy` whether it is the likeliest
    token at its place, and in `top` the likeliest tokens there with their log-probabilities, best first, as many as
    were asked for. A mask token, which only ids can name, never comes: its log-probability is −∞.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: tuple[bool, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def total(self) -> float:
        """The log-probability of the whole text, 0 for an empty one."""
        return sum(self.logprobs)


def score(
    model: TwoTower,
    texts: Sequence[Prompt],
    prompts: Sequence[Prompt] | None = None,
    *,
    num_top: int = 0,
    batch_size: int = 8,
) -> list[Scores]:
    """How likely the context tower finds each text, a string or token ids, after its prompt; by default after BOS.

    Strings are tokenized apart, a prompt with the tokenizer's special tokens and a text without. `num_top` likeliest
    tokens are given at each place. `batch_size` texts are scored at once: their logits take batch_size × 256 × v
    float32. Raises SettingError for texts or prompts that are not of this model, before anything runs.
    """
    check_integer("num_top", num_top, 0, model.config.vocab_size)
    check_integer("batch_size", batch_size, 1)
    check_prompts(texts, "texts")
    before: Sequence[Prompt] = [()] * len(texts) if prompts is None else prompts
    check_prompts(before)
    if len(before) != len(texts):
        raise ValueError(f"there are {len(before)} prompts for {len(texts)} texts; give one per text, or none")
    pairs = [
        (prompt_ids(model, prompt, f"prompts[{i}]"), text_ids(model, text, f"texts[{i}]"))
        for i, (prompt, text) in enumerate(zip(before, texts, strict=True))
    ]
    found = []
    for first in range(0, len(pairs), batch_size):
        found += _score_batch(model, pairs[first : first + batch_size], num_top)
    return found


def _score_batch(model: TwoTower, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], num_top: int) -> list[Scores]:
    """The scores of each pair's second part after its first."""
    longest = max(len(prompt) + len(text) for prompt, text in pairs)
    table = torch.zeros(len(pairs), longest, dtype=torch.long)  # padding comes after everything that a row reads
    for row, (prompt, text) in zip(table, pairs, strict=True):
        row[: len(prompt) + len(text)] = torch.tensor(prompt + text)
    skip = min(len(prompt) for prompt, _ in pairs)
    scored: list[list[TokenScore]] = [[] for _ in pairs]
    planned = [len(prompt) + len(text) for prompt, text in pairs]
    scorer = ContextScorer(model, len(pairs), num_top=num_top, capacity=longest, planned=planned)
    for chunk in scorer.push(table, skip=skip):
        for row, tokens in zip(scored, chunk, strict=True):
            row += tokens
    found = []
    for row, (prompt, text) in zip(scored, pairs, strict=True):
        own = row[len(prompt) - skip : len(prompt) - skip + len(text)]
        logprobs = tuple(token.logprob for token in own if token.logprob is not None)
        tops = tuple(token.top for token in own)
        found.append(
            Scores(token_ids=text, logprobs=logprobs, is_greedy=tuple(token.is_greedy for token in own), top=tops)
        )
    return found


class ContextScorer:
    """Scores rows of tokens that may come piece by piece: each token given all before it in its row.

    `num_top` likeliest tokens are given at each place; `capacity` is how many tokens a row is expected to have, and
    `planned` how many each will, as in `TwoTower.prefill`.
    """

    def __init__(
        self,
        model: TwoTower,
        num_rows: int = 1,
        *,
        num_top: int = 0,
        capacity: int = 0,
        planned: Sequence[int] | None = None,
    ) -> None:
        self._model = model
        self._num_top = num_top
        self._state = model.context_tower.initial_state(num_rows, capacity, planned)
        self._logits: Tensor | None = None  # (b, 1, v) after the last token taken

    def push(
        self, ids: Tensor | Sequence[Sequence[int]], *, skip: int = 0, chunk: int = PREFILL_CHUNK
    ) -> Iterator[list[list[TokenScore]]]:
        """Takes the rows' next ids (b, t) and yields each row's scores, `chunk` tokens at a time.

        The first `skip` ids are read but not scored. A caller that stops between two chunks has lost the rest: the
        scorer can't go on.
        """
        table = torch.as_tensor(ids, dtype=torch.long).to(self._model.context_device)
        for first in range(0, table.shape[1], chunk):
            yield self._take(table[:, first : first + chunk], max(skip - first, 0))

    @torch.inference_mode()
    def _take(self, ids: Tensor, skip: int) -> list[list[TokenScore]]:
        """The scores of ids (b, c) from place `skip` on."""
        b, c = ids.shape
        passed = self._model.score(ids, self._state)
        self._state = self._model.accept(passed, (c,) * b)
        start = min(max(skip - 1, 0), c - 1)  # the logits at place i are of the token at i + 1
        after = self._model.scored_logits(passed._replace(hidden=passed.hidden[:, start:]))
        logits, before = after[:, :-1], self._logits
        self._logits = after[:, -1:]
        if skip == 0 and before is not None:
            logits = torch.cat((before, logits), dim=1)
        found = self._read(ids[:, c - logits.shape[1] :], logits)
        if skip == 0 and before is None:
            found = [[TokenScore(first), *row] for first, row in zip(ids[:, 0].tolist(), found, strict=True)]
        return found

    def _read(self, ids: Tensor, logits: Tensor) -> list[list[TokenScore]]:
        """The scores of ids (b, c) under the logits of their places (b, c, v)."""
        if ids.shape[1] == 0:
            return [[] for _ in ids]
        best = self._model.context_tower.logit_ops.best(logits)
        logprobs = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - best.log_sum
        top = top_tokens(logits, self._num_top)
        tops = top.logits - best.log_sum.unsqueeze(-1)
        columns = (ids, logprobs, ids == best.tokens, top.ids, tops)
        return [
            [
                TokenScore(i, logprob, is_greedy, tuple(zip(likeliest, their, strict=True)))
                for i, logprob, is_greedy, likeliest, their in zip(*row, strict=True)
            ]
            for row in zip(*(column.tolist() for column in columns), strict=True)
        ]
