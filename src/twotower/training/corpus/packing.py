"""Packing tokenised documents into rows of equal length. Letters: t tokens."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tokenizers

from twotower.config import TwoTowerConfig
from twotower.training.corpus.documents import Document
from twotower.training.corpus.shards import CorpusRows
from twotower.training.corpus.text import TextConfig
from twotower.training.corpus.tokenizing import Tokens, tokenized

# Unfinished rows that a document with a prompt may be put into; more rows leave less padding.
_OPEN_ROWS = 64


class Packed(NamedTuple):
    """A row's arrays (t,), the number of its tokens that are padding, and the number of tokens that were cut off a
    document because they didn't fit into the row."""

    row: CorpusRows
    num_padding: int
    num_lost: int


def pack(
    documents: Iterable[Document], tokenizer: tokenizers.Tokenizer, model: TwoTowerConfig, config: TextConfig
) -> Iterator[Packed]:
    """Packs documents into rows of `config.row_length(model)` tokens.

    - A document is [BOS | prompt | text | EOS], with BOS and EOS where the model's config has them. A prompt or text
      that begins with BOS gets no second one, and a rendered text that has an end token ends with its last one. A
      document whose text has no tokens is left out.
    - BOS, prompt and any mask token are not scored. A text holds a mask token only where the mask is a word of the
      tokenizer's vocabulary that tokenizer.json does not add to it.
    - Documents without a prompt follow each other and are cut where a row ends; the rest of a document begins the next
      row, as a document of its own.
    - A cut would part texts from their questions, so a document with a prompt, and with `config.prompt_field` every
      document, is put whole into a row with room for it. A document longer than a row loses the beginning of its
      prompt, until half a row of prompt is left, and then the end of its text.
    - Rows are filled up with unscored BOS (or token 0).

    A document may be of any length: no more of it than a row is held in memory. Warns, once, where a text spells a
    control token that is tokenised as text.
    """
    length = config.row_length(model)
    cut = _CutRows(model, length)
    whole = _WholeRows(model, length)
    found = tokenized(documents, tokenizer, model.mask_token_id, config.control_tokens)
    for (_, has_prompt, rendered), parts in itertools.groupby(found, key=_document):
        if has_prompt or config.prompt_field is not None:
            yield from whole.add(parts, rendered)
        else:
            yield from cut.add(parts)
    yield from cut.rest()
    yield from whole.rest()


def _document(part: Tokens) -> tuple[int, bool, bool]:
    return part.document, part.has_prompt, part.rendered


class _OpenRow:
    """A row that is being filled."""

    def __init__(self, model: TwoTowerConfig, length: int) -> None:
        padding = 0 if model.bos_token_id is None else model.bos_token_id
        self._ids = np.full(length, padding, np.int32)
        self._scored = np.zeros(length, bool)
        self._document = np.zeros(length, np.int32)
        self._mask_token_id = model.mask_token_id
        self._number = -1
        self.room = length
        self.num_lost = 0

    def begin(self) -> None:
        """Begins a document: what is added from here on is its tokens."""
        self._number += 1

    def add(self, ids: np.ndarray, *, scored: bool) -> np.ndarray:
        """Adds as many of the tokens (t,) as there is room for, and returns the others."""
        here, rest = ids[: self.room], ids[self.room :]
        place = slice(len(self._ids) - self.room, len(self._ids) - self.room + len(here))
        self._ids[place] = here
        self._scored[place] = scored & (here != self._mask_token_id)
        self._document[place] = self._number
        self.room -= len(here)
        return rest

    def packed(self) -> Packed:
        self._document[len(self._ids) - self.room :] = self._number + 1
        return Packed(CorpusRows(self._ids, self._scored, self._document), self.room, self.num_lost)


class _CutRows:
    """Rows of documents one after the other, cut where a row ends."""

    def __init__(self, model: TwoTowerConfig, length: int) -> None:
        self._model, self._length = model, length
        self._bos, self._end = _ends(model)
        self._row: _OpenRow | None = None

    def add(self, parts: Iterable[Tokens]) -> Iterator[Packed]:
        """Adds a document without a prompt, and yields the rows that it fills."""
        begun = False
        for ids, *_ in parts:
            if begun or not len(ids):
                yield from self._put(ids, scored=True)
                continue
            begun = True
            if self._row is not None:
                self._row.begin()
            yield from self._put(self._bos, scored=False)
            yield from self._put(_without_beginning(ids, self._bos), scored=True)
        if begun:
            yield from self._put(self._end, scored=True)

    def _put(self, ids: np.ndarray, *, scored: bool) -> Iterator[Packed]:
        while len(ids):
            if self._row is None:
                self._row = _OpenRow(self._model, self._length)
                self._row.begin()
            ids = self._row.add(ids, scored=scored)
            if self._row.room == 0:
                yield self._row.packed()
                self._row = None

    def rest(self) -> Iterator[Packed]:
        """The row that isn't full."""
        if self._row is not None:
            yield self._row.packed()


class _WholeRows:
    """Rows of documents, each whole in the first open row with room for it; the fullest row is closed when too many are
    open."""

    def __init__(self, model: TwoTowerConfig, length: int) -> None:
        self._model, self._length = model, length
        self._bos, self._end = _ends(model)
        self._rows: list[_OpenRow] = []

    def add(self, parts: Iterable[Tokens], rendered: bool) -> Iterator[Packed]:
        """Adds a document, and yields the rows that it fills or closes."""
        found = self._fitted(parts, rendered)
        if found is None:
            return
        prompt, text, num_lost = found
        size = len(self._bos) + len(prompt) + len(text)
        row = next((row for row in self._rows if row.room >= size), None)
        if row is None:
            if len(self._rows) == _OPEN_ROWS:
                yield self._rows.pop(min(range(len(self._rows)), key=lambda n: self._rows[n].room)).packed()
            row = _OpenRow(self._model, self._length)
            self._rows.append(row)
        row.begin()
        for ids, scored in ((self._bos, False), (prompt, False), (text, True)):
            row.add(ids, scored=scored)
        row.num_lost = num_lost  # above 0 only for a document longer than a row
        if row.room == 0:
            self._rows.remove(row)
            yield row.packed()

    def rest(self) -> Iterator[Packed]:
        """The rows that aren't full."""
        for row in self._rows:
            yield row.packed()

    def _fitted(self, parts: Iterable[Tokens], rendered: bool) -> tuple[np.ndarray, np.ndarray, int] | None:
        """The prompt and the text of a document, as much of them as fits into a row behind BOS, and the number of
        tokens that don't; None for a text without tokens."""
        prompt = text = np.empty(0, np.int32)
        num_prompt = num_text = num_bos = 0
        for ids, _, in_text, *_ in parts:
            own = ids if num_prompt or num_text else _without_beginning(ids, self._bos)
            if in_text:
                num_text += len(ids)
                num_bos += len(ids) - len(own)
                text = np.concatenate([text, own[: self._length - len(text)]])
            else:
                num_prompt += len(own)
                prompt = np.concatenate([prompt, own])[-self._length :]
        if num_text == 0:
            return None
        num_beyond = num_prompt + num_text - num_bos - len(prompt) - len(text)
        ended = np.flatnonzero(np.isin(text, self._model.eos_token_ids))
        text = text[: ended[-1] + 1] if rendered and len(ended) else np.concatenate([text, self._end])
        num_held = len(prompt) + len(text)
        room = self._length - len(self._bos)
        kept = max(room // 2, room - len(text))
        prompt = prompt[max(len(prompt) - kept, 0) :]
        text = text[: room - len(prompt)]
        return prompt, text, num_beyond + num_held - len(prompt) - len(text)


def _ends(model: TwoTowerConfig) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that are put before and behind each document, one or none."""
    bos = [] if model.bos_token_id is None else [model.bos_token_id]
    return np.array(bos, np.int32), np.array(model.eos_token_ids[:1], np.int32)


def _without_beginning(ids: np.ndarray, bos: np.ndarray) -> np.ndarray:
    """The tokens without the BOS that a chat template may have written."""
    return ids[len(bos) :] if np.array_equal(ids[: len(bos)], bos) else ids
