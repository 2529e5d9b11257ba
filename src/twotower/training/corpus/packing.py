"""Documents to rows of tokens. Letters: t tokens."""

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

# Documents tokenised at a time; the tokenizer spreads a batch over the processor's cores.
_BATCH = 512
# Rows in which a document is looked a place for; more leave less padding.
_OPEN_ROWS = 64


class Packed(NamedTuple):
    """A row's arrays (t,), how many of its tokens are padding, and how many of its document's it has no place for."""

    row: CorpusRows
    num_padding: int
    num_lost: int


def pack(
    documents: Iterable[Document], tokenizer: tokenizers.Tokenizer, model: TwoTowerConfig, config: TextConfig
) -> Iterator[Packed]:
    """Rows of `length` tokens: documents one after the other, cut where a row ends; with a `prompt_field` whole.

    A document is [BOS | prompt | text | EOS], BOS and EOS where the config has them, one BOS even where the prompt
    brings it. BOS and prompt are not scored, nor is a mask, which a text can hold only where tokenizer.json doesn't say
    that it is special. What a row's end cuts off goes on in the next row as a document of its own. With prompts that
    would part texts from their questions, so each document goes where there is room for all of it, and one longer than
    a row loses the beginning of its prompt, but no more than leaves half a row of it, then the end of its text. Rows
    are filled up with unscored BOS (or token 0). Documents without a token are left out. Warns, once, where a text
    spells a control token that is taken as text.
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
    """A document's tokens."""

    bos: list[int]
    prompt: list[int]
    text: list[int]

    def cut(self, length: int) -> "_Parts":
        """At most `length` of the tokens: without the prompt's beginning and the text's end."""
        room = length - len(self.bos)
        kept = max(room // 2, room - len(self.text))
        prompt = self.prompt[max(len(self.prompt) - kept, 0) :]
        return _Parts(self.bos, prompt, self.text[: room - len(prompt)])


def _parts(bos: list[int], prompt: list[int], text: list[int], end: list[int]) -> _Parts:
    # Chat templates write a BOS themselves
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
        """Adds a document whose first tokens are not scored; there must be room for it."""
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
        row.num_lost = sum(map(len, whole)) - len(tokens)  # above 0 for a document that fills a row by itself
        if row.room == 0:
            rows.remove(row)
            yield row
    yield from rows


def _tokens(
    documents: Iterable[Document], tokenizer: tokenizers.Tokenizer, mask_token_id: int, control_tokens: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of each document's prompt and text, of documents whose text has any."""
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
                f"a text spells {found[0]}, learnt as text; --control-tokens makes it the token", stacklevel=2
            )
        prompts = encode(controlled, [document.prompt for document in batch])
        for prompt, text in zip(prompts, encode(controlled if control_tokens else plain, texts), strict=True):
            if text:
                yield prompt, text


def _batches(items: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
