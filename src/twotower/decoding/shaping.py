"""Settings that change the logits of a place by the text before it: biases, allowed tokens, bad words, least lengths,
penalties and constraints. `SamplingParams` has the equations.

Only rows with such settings are copied and changed. Letters: b rows, r of them with such settings, s places, u tokens
that occur, v vocabulary.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor

from twotower.decoding.bad_words import finishing, word_sequences
from twotower.decoding.constraint import Guides, guides
from twotower.decoding.params import SamplingParams
from twotower.decoding.sampling import Shaped
from twotower.decoding.step import Request
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device


@dataclasses.dataclass(frozen=True)
class Edit:
    """One request's settings that change logits, and what they need of its text.

    Of the settings, tensors on the logits' device: the `allowed` ids, the `biased` ids with their biases, and the ids
    that are `banned` everywhere; `words` are the bad words of several tokens and `ends` the tokens that `min_tokens`
    keeps away. Of the text before the next place: `counts` of each token in what was written, 0 for one that only the
    prompt has, which counts for `repetition_penalty` alone; `tail`, as many of its last tokens as a bad word has
    before its last one; and `num_written`. `block` has the ids of a block in progress, None at masked places, and is
    empty before its first step.
    """

    params: SamplingParams
    allowed: Tensor | None
    biased: tuple[Tensor, Tensor] | None
    banned: Tensor | None
    words: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    counts: dict[int, int]
    tail: tuple[int, ...]
    num_written: int = 0
    block: tuple[int | None, ...] = ()

    @property
    def penalises(self) -> bool:
        """Whether tokens count that occur before a place."""
        return _penalises(self.params)

    def after(self, ids: Sequence[int]) -> Self:
        """The same after these tokens of the text, and before the next block."""
        counts = self.counts
        if self.penalises:
            counts = dict(counts)
            for i in ids:
                counts[i] = counts.get(i, 0) + 1
        tail = (*self.tail, *ids)
        num_kept = max((len(word) - 1 for word in self.words), default=0)
        return dataclasses.replace(
            self,
            counts=counts,
            tail=tail[max(len(tail) - num_kept, 0) :],
            num_written=self.num_written + len(ids),
            block=(),
        )

    def shape_(self, logits: Tensor, draft: Sequence[int]) -> None:
        """Changes logits (s, v) in place; place k follows the text and the first k tokens of a draft."""
        self._shape_everywhere_(logits)
        self._penalise_(logits, [(i, k + 1) for k, i in enumerate(draft[: len(logits) - 1])])
        if self.words:
            for k in range(min(len(logits), len(draft) + 1)):
                tokens = (*self.tail, *draft[:k], None)
                for _, token in finishing(self.words, tokens, len(tokens) - 1):
                    logits[k, token] = -torch.inf

    def shape_block_(self, logits: Tensor) -> None:
        """Changes the logits (s, v) of a block in place; every place sees what is committed anywhere in it."""
        block = self.block or (None,) * len(logits)
        self._shape_everywhere_(logits)
        self._penalise_(logits, [(i, 0) for i in block if i is not None])
        if self.words:
            before = len(self.tail)
            for place, token in finishing(self.words, (*self.tail, *block), before):
                logits[place - before, token] = -torch.inf

    def _shape_everywhere_(self, logits: Tensor) -> None:
        """What doesn't depend on which tokens the text has."""
        if self.allowed is not None:
            kept = logits[:, self.allowed]
            logits.fill_(-torch.inf)
            logits[:, self.allowed] = kept
        if self.biased is not None:
            ids, biases = self.biased
            logits[:, ids] += biases
        if self.banned is not None:
            logits[:, self.banned] = -torch.inf
        if self.ends and self.num_written < self.params.min_tokens:
            logits[: self.params.min_tokens - self.num_written, to_device(self.ends, logits.device)] = -torch.inf

    def _penalise_(self, logits: Tensor, added: Sequence[tuple[int, int]]) -> None:
        """The penalties, where each token of `added` occurs once more from a place on."""
        if not self.penalises or not (self.counts or added):
            return
        counts = self.counts | {i: 0 for i, _ in added if i not in self.counts}
        ids = to_device(list(counts), logits.device)  # (u)
        table = torch.tensor([list(counts.values())], dtype=torch.float32)  # (1 or s, u)
        if added:
            column = {i: n for n, i in enumerate(counts)}
            table = table.repeat(len(logits), 1)
            for i, place in added:
                table[place:, column[i]] += 1
        table = to_device(table, logits.device)
        found = logits[:, ids]  # (s, u)
        there = table > 0
        repetition = self.params.repetition_penalty
        if repetition not in (None, 1):
            known = there.clone()
            known[:, : len(self.counts)] = True  # what only the prompt has occurs too
            found = torch.where(known, torch.where(found > 0, found / repetition, found * repetition), found)
        found = found - self.params.frequency_penalty * table - self.params.presence_penalty * there
        logits[:, ids] = found


@dataclasses.dataclass(frozen=True)
class Shaping:
    """Each row's constraint and edit, None for a row without such settings (b)."""

    guides: Guides
    edits: tuple[Edit | None, ...]

    @property
    def rows(self) -> list[int]:
        """The rows whose logits are changed."""
        pairs = zip(self.edits, self.guides.rows, strict=True)
        return [row for row, pair in enumerate(pairs) if pair != (None, None)]

    @property
    def reads_drafts(self) -> bool:
        """Whether what is changed depends on which tokens a draft has."""
        return self.guides.any or any(e is not None and (e.penalises or e.words) for e in self.edits)

    def select(self, rows: list[int]) -> Self:
        """The settings of some rows."""
        return dataclasses.replace(self, guides=self.guides.select(rows), edits=tuple(self.edits[r] for r in rows))

    def join(self, others: Self) -> Self:
        """The settings of both batches' rows."""
        return dataclasses.replace(self, guides=self.guides.join(others.guides), edits=self.edits + others.edits)

    def after(self, tokens: Sequence[Sequence[int]]) -> Self:
        """The same after each row has also produced these tokens."""
        if not self.rows:
            return self
        edits = (None if edit is None else edit.after(ids) for edit, ids in zip(self.edits, tokens, strict=True))
        return dataclasses.replace(self, guides=self.guides.after(tokens), edits=tuple(edits))

    def apply(self, logits: Tensor, drafts: Sequence[Sequence[int]], first: int = 0) -> Shaped | None:
        """The changed rows of logits (b, s, v), where place `first` + k follows the first k tokens of a row's draft;
        None if there is no such row."""
        shaped = self._copied(logits, first)
        if shaped is None:
            return None
        for row, own in zip(shaped.rows, shaped.logits, strict=True):
            edit = self.edits[row]
            if edit is not None:
                edit.shape_(own, drafts[row])
            self.guides.mask_(own, row, drafts[row])
        return shaped

    def apply_to_blocks(self, logits: Tensor, first: int = 0, opens: Sequence[int] = ()) -> Shaped | None:
        """The changed rows of logits (b, s, v) of blocks that begin at place `first`; None if there is no such row.

        Constraints hold only from left to right: they are applied to each row's first open place of the block, where
        `opens` (b) says it, and to no other."""
        shaped = self._copied(logits, first)
        for row, own in () if shaped is None else zip(shaped.rows, shaped.logits, strict=True):
            edit = self.edits[row]
            if edit is not None:
                edit.shape_block_(own)
            if opens:
                self.guides.mask_(own[opens[row] :], row, ())
        return shaped

    def within(self, blocks: Sequence[Sequence[int | None]]) -> Self:
        """The same with each row's block as it is after a step."""
        pairs = zip(self.edits, blocks, strict=True)
        edits = (None if edit is None else dataclasses.replace(edit, block=tuple(block)) for edit, block in pairs)
        return dataclasses.replace(self, edits=tuple(edits))

    def past_blocks(self, finished: Iterable[int]) -> Self:
        """The same where the blocks of these rows belong to the text."""
        edits = list(self.edits)
        for row in finished:
            edit = edits[row]
            if edit is not None:
                edits[row] = edit.after([i for i in edit.block if i is not None])
        return dataclasses.replace(self, edits=tuple(edits))

    def _copied(self, logits: Tensor, first: int) -> Shaped | None:
        rows = self.rows
        if not rows or logits.shape[1] == first:
            return None
        index = to_device(rows, logits.device)
        return Shaped(rows, index, first, logits[index, first:])


def shaping(model: TwoTower, requests: Sequence[Request], device: torch.device) -> Shaping:
    """The settings of requests that have produced some tokens already, for logits on a device."""
    held = guides(model, [r.params for r in requests], [r.produced for r in requests])
    return Shaping(held, tuple(_edit(model, r, device) for r in requests))


def _edit(model: TwoTower, request: Request, device: torch.device) -> Edit | None:
    p = request.params
    if not (p.allowed_token_ids or p.logit_bias or p.bad_words or p.min_tokens or _penalises(p)):
        return None
    words = word_sequences(model, p.bad_words)
    banned = [word[0] for word in words if len(word) == 1]
    biases = dict(p.logit_bias)
    longest = max(map(len, words), default=1)
    edit = Edit(
        params=p,
        allowed=None if p.allowed_token_ids is None else to_device(p.allowed_token_ids, device),
        biased=(to_device(list(biases), device), to_device(list(biases.values()), device)) if biases else None,
        banned=to_device(banned, device) if banned else None,
        words=tuple(word for word in words if len(word) > 1),
        ends=(*model.config.eos_token_ids, *p.stop_token_ids) if p.min_tokens else (),
        counts={} if p.repetition_penalty in (None, 1) else dict.fromkeys(request.prompt_ids, 0),
        tail=request.prompt_ids[len(request.prompt_ids) - longest + 1 :] if longest > 1 else (),
    )
    return edit.after(request.produced)


def _penalises(params: SamplingParams) -> bool:
    repeats = params.repetition_penalty not in (None, 1)
    return repeats or params.presence_penalty != 0 or params.frequency_penalty != 0
