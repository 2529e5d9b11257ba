"""Log-probabilities of given texts under the context tower. Letters: b rows, n places, d width, v vocabulary, k of the
likeliest tokens."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.decoding.likeliest import top_tokens
from twotower.decoding.output import TokenScore
from twotower.decoding.prompt import Prompt, check_prompts, prompt_ids, text_ids
from twotower.errors import check_integer
from twotower.model.state import ContextState
from twotower.model.two_tower import PREFILL_CHUNK, TwoTower
from twotower.ops.transfer import to_device

# Logits that exist at a time: 8 MiB of float32, 16 places of a vocabulary of 131,072.
_LOGITS = 1 << 21


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
    tokens are given at each place. `batch_size` texts are scored at once: there are states of so many, and those of one
    prompt absorb it once. Raises SettingError for texts or prompts that are not of this model, before anything runs.
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


@torch.inference_mode()
def _score_batch(model: TwoTower, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], num_top: int) -> list[Scores]:
    """The scores of each pair's second part after its first."""
    texts, device = [text for _, text in pairs], model.context_device
    state = _after_prompts(model, pairs)
    found: list[list[TokenScore]] = [[] for _ in pairs]
    rows = [row for row, text in enumerate(texts) if text]
    if rows:
        assert state.next_logits is not None
        firsts = _read(model, state.next_logits[to_device(rows, device)], [texts[row][0] for row in rows], num_top)
        for row, token in zip(rows, firsts.tokens(), strict=True):
            found[row].append(token)
    read = _table([text[:-1] for text in texts])  # nothing comes after a last token
    for first in range(0, read.shape[1], PREFILL_CHUNK):
        chunk = read[:, first : first + PREFILL_CHUNK].to(device)
        counts = tuple(min(max(len(text) - 1 - first, 0), chunk.shape[1]) for text in texts)
        passed = model.score(chunk, state)
        rows = [row for row, n in enumerate(counts) for _ in range(n)]
        places = [row * chunk.shape[1] + i for row, n in enumerate(counts) for i in range(n)]
        ids = [i for text, n in zip(texts, counts, strict=True) for i in text[first + 1 : first + 1 + n]]
        scored = score_places(model, passed.hidden.flatten(0, 1)[to_device(places, device)], ids, num_top)
        for row, token in zip(rows, scored.tokens(), strict=True):
            found[row].append(token)
        state = model.accept(passed, counts)
    return [_scores(tokens) for tokens in found]


def _after_prompts(model: TwoTower, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> ContextState:
    """The state after each pair's first part, with room for its second; parts that are the same are absorbed once."""
    planned = [len(prompt) + len(text) for prompt, text in pairs]
    # a prompt is another one where RoPE turns it otherwise
    keys = [(prompt, model.config.rope_length(n)) for (prompt, _), n in zip(pairs, planned, strict=True)]
    distinct = dict(zip(keys, planned, strict=True))
    order = list(distinct)
    lengths = [len(prompt) for prompt, _ in order]
    # a pass has room for its padding, too
    room = max(planned) + min(PREFILL_CHUNK, max(len(text) for _, text in pairs))
    state = model.prefill(
        _table([prompt for prompt, _ in order]), lengths, capacity=room, planned=list(distinct.values())
    )
    return state if len(order) == len(pairs) else state.select([order.index(key) for key in keys])


def _table(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids as (b, the longest row's length) int64, padded at their ends."""
    table = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for padded, row in zip(table, rows, strict=True):
        padded[: len(row)] = torch.tensor(row, dtype=torch.long)
    return table


def _scores(tokens: Sequence[TokenScore]) -> Scores:
    return Scores(
        token_ids=tuple(token.id for token in tokens),
        logprobs=tuple(token.logprob for token in tokens if token.logprob is not None),
        is_greedy=tuple(token.is_greedy for token in tokens),
        top=tuple(token.top for token in tokens),
    )


class PlaceScores(NamedTuple):
    """The scores of ids (n,) int64 as tensors of (n,), not read on the host yet: their log-probabilities, whether they
    are the likeliest, and the ids and log-probabilities (n, k) of the likeliest."""

    ids: Tensor
    logprobs: Tensor
    is_greedy: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def tokens(self) -> list[TokenScore]:
        """The scores as numbers; waits for the device."""
        columns = zip(*(column.tolist() for column in self), strict=True)
        return [
            TokenScore(i, logprob, is_greedy, tuple(zip(likeliest, their, strict=True)))
            for i, logprob, is_greedy, likeliest, their in columns
        ]


def score_places(model: TwoTower, hidden: Tensor, ids: Sequence[int], num_top: int) -> PlaceScores:
    """Scores ids by the context tower's hidden states (n, d) at the places before them; n is at least 1.

    All logits of a pass would take more memory than the states of its texts, so only some of them exist at a time.
    """
    size = max(_LOGITS // model.config.vocab_size, 1)
    pieces = [
        _read(model, model.context_lm_head(hidden[first : first + size]), ids[first : first + size], num_top)
        for first in range(0, len(ids), size)
    ]
    return PlaceScores(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))


def _read(model: TwoTower, logits: Tensor, ids: Sequence[int], num_top: int) -> PlaceScores:
    """The scores of ids under the logits (n, v) of their places."""
    index = to_device(ids, logits.device)
    best = model.context_tower.logit_ops.best(logits)
    logprobs = logits.gather(-1, index[:, None])[:, 0] - best.log_sum
    top = top_tokens(logits, num_top)
    return PlaceScores(index, logprobs, index == best.tokens, top.ids, top.logits - best.log_sum[:, None])


class PromptScores:
    """The scores of a prompt's own tokens, which come piece by piece with the passes that absorb it, each with the
    `num_top` likeliest tokens at its place."""

    def __init__(self, ids: Sequence[int], num_top: int) -> None:
        self._ids = ids
        self._num_top = num_top
        self._pieces: list[PlaceScores] = []
        self._num_scored = 0  # without the first, which nothing stands before

    @property
    def is_complete(self) -> bool:
        """Whether all tokens are scored."""
        return self._num_scored == len(self._ids) - 1

    def take(self, model: TwoTower, hidden: Tensor, first: int) -> None:
        """Scores what the hidden states (n, d) at the places from `first` on say about the tokens behind them. Takes
        nothing of places that were taken before, in a pass whose states have been dropped."""
        begin, end = self._num_scored, min(first + hidden.shape[0], len(self._ids) - 1)
        assert first <= begin, "places come in order"
        if begin < end:
            ids = self._ids[begin + 1 : end + 1]
            self._pieces.append(score_places(model, hidden[begin - first : end - first], ids, self._num_top))
            self._num_scored = end

    def tokens(self) -> tuple[TokenScore, ...]:
        """The scores of all tokens, the first among them; waits for the device."""
        assert self.is_complete
        return (TokenScore(self._ids[0]), *(token for piece in self._pieces for token in piece.tokens()))
