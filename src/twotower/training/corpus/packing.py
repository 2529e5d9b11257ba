"""Tokenising documents and packing them into rows of equal length. Letters: t tokens."""

import copy
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tokenizers

from twotower.config import TwoTowerConfig
from twotower.training.corpus.shards import CorpusRows
from twotower.training.corpus.text import Document, TextConfig

# Documents tokenised together; the tokenizer spreads a batch over the processor's cores.
_BATCH = 512
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
    """Packs documents into rows of `config.length` tokens.

    - A document is [BOS | prompt | text | EOS], with BOS and EOS where the model's config has them. A prompt or text
      that begins with BOS gets no second one. A document whose text has no tokens is left out.
    - BOS, prompt and any mask token are not scored. A text holds a mask token only where tokenizer.json does not mark
      the mask as special.
    - Without `config.prompt_field`, documents follow each other and are cut where a row ends; the rest of a document
      begins the next row, as a document of its own.
    - With it, a cut would part texts from their questions, so each document is put whole into a row with room for it. A
      document longer than a row loses the beginning of its prompt, until half a row of prompt is left, and then the end
      of its text.
    - Rows are filled up with unscored BOS (or token 0).

    Warns, once, where a text spells a control token that is tokenised as text.
    """
    bos = [] if model.bos_token_id is None else [model.bos_token_id]
    end = list(model.eos_token_ids[:1])
    found = _tokens(documents, tokenizer, model.mask_token_id, config.control_tokens)
    parts = (_parts(bos, prompt, text, end) for prompt, text in found)
    if config.prompt_field is None:
        rows = _cut_rows(parts, config.length, model.mask_token_id)
    else:
        rows = _whole_rows(parts, config.length, model.mask_token_id)
    for row in rows:
        yield row.packed((bos or [0])[0])


class _Parts(NamedTuple):
    """The token ids of a document: BOS or nothing, its prompt, and its text with EOS."""

    bos: list[int]
    prompt: list[int]
    text: list[int]

    def cut(self, length: int) -> "_Parts":
        """At most `length` of the tokens, without the beginning of the prompt and the end of the text."""
        room = length - len(self.bos)
        kept = max(room // 2, room - len(self.text))
        prompt = self.prompt[max(len(self.prompt) - kept, 0) :]
        return _Parts(self.bos, prompt, self.text[: room - len(prompt)])


def _parts(bos: list[int], prompt: list[int], text: list[int], end: list[int]) -> _Parts:
    # A chat template may have written a BOS already.
    if prompt:
        prompt = prompt[len(bos) :] if prompt[: len(bos)] == bos else prompt
    else:
        text = text[len(bos) :] if text[: len(bos)] == bos else text
    return _Parts(bos, prompt, text + end)


class _OpenRow:
    """A row that is being filled."""

    def __init__(self, length: int, mask_token_id: int) -> None:
        self._mask_token_id = mask_token_id
        self._ids: list[int] = []
        self._scored: list[bool] = []
        self._document: list[int] = []
        self.room = length
        self.num_lost = 0

    def add(self, ids: list[int], num_unscored: int) -> None:
        """Adds a document whose first `num_unscored` tokens are not scored. There must be room for it."""
        number = self._document[-1] + 1 if self._document else 0
        self._ids += ids
        self._scored += [n >= num_unscored and i != self._mask_token_id for n, i in enumerate(ids)]
        self._document += [number] * len(ids)
        self.room -= len(ids)

    def packed(self, padding: int) -> Packed:
        ids = self._ids + [padding] * self.room
        scored = self._scored + [False] * self.room
        document = self._document + [self._document[-1] + 1] * self.room
        row = CorpusRows(np.array(ids, np.int32), np.array(scored, bool), np.array(document, np.int32))
        return Packed(row, self.room, self.num_lost)


def _cut_rows(documents: Iterable[_Parts], length: int, mask_token_id: int) -> Iterator[_OpenRow]:
    """Documents one after the other, cut where a row ends."""
    row = _OpenRow(length, mask_token_id)
    for bos, prompt, text in documents:
        tokens = bos + prompt + text
        at = 0
        while at < len(tokens):
            piece = tokens[at : at + row.room]
            row.add(piece, len(bos) + len(prompt) - at)
            at += len(piece)
            if row.room == 0:
                yield row
                row = _OpenRow(length, mask_token_id)
    if row.room < length:
        yield row


def _whole_rows(documents: Iterable[_Parts], length: int, mask_token_id: int) -> Iterator[_OpenRow]:
    """Each document whole in the first open row with room for it; the fullest row is closed when too many are open."""
    rows: list[_OpenRow] = []
    for whole in documents:
        document = whole.cut(length)
        tokens = document.bos + document.prompt + document.text
        row = next((row for row in rows if row.room >= len(tokens)), None)
        if row is None:
            if len(rows) == _OPEN_ROWS:
                yield rows.pop(min(range(len(rows)), key=lambda n: rows[n].room))
            row = _OpenRow(length, mask_token_id)
            rows.append(row)
        row.add(tokens, len(document.bos) + len(document.prompt))
        row.num_lost = sum(map(len, whole)) - len(tokens)  # above 0 only for a document longer than a row
        if row.room == 0:
            rows.remove(row)
            yield row
    yield from rows


def _tokens(
    documents: Iterable[Document], tokenizer: tokenizers.Tokenizer, mask_token_id: int, control_tokens: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """The token ids of each document's prompt and text, except documents whose text has none.

    Names of control tokens are those tokens in prompts, and in texts with `control_tokens`; elsewhere they are spelled
    as text. The mask's name is always spelled as text.
    """
    plain, controlled = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    plain.encode_special_tokens, controlled.encode_special_tokens = True, False
    mask = tokenizer.id_to_token(mask_token_id)
    spelled = [] if mask is None else plain.encode(mask, add_special_tokens=False).ids

    def encode(how: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
        found = [encoding.ids for encoding in how.encode_batch(texts, add_special_tokens=False)]
        return [
            [part for i in ids for part in (spelled if i == mask_token_id else [i])] if mask_token_id in ids else ids
            for ids in found
        ]

    names = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special and t.content != mask]
    watched = None if control_tokens or not names else re.compile("|".join(map(re.escape, names)))
    for batch in _batches(documents, _BATCH):
        texts = [document.text for document in batch]
        found = next(filter(None, map(watched.search, texts)), None) if watched else None
        if found:
            watched = None
            warnings.warn(
                f"a text spells {found[0]}, which is learnt as text; --control-tokens makes it the token", stacklevel=2
            )
        prompts = encode(controlled, [document.prompt for document in batch])
        for prompt, text in zip(prompts, encode(controlled if control_tokens else plain, texts), strict=True):
            if text:
                yield prompt, text


def _batches(items: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
