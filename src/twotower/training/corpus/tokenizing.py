"""Documents to token ids, long texts in pieces, so that memory doesn't grow with a document. Letters: t tokens."""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tokenizers

from twotower.decoding.prompt import without_mask
from twotower.training.corpus.documents import Document, LongText

# Characters that are tokenised together, at least: the tokenizer spreads them over the processor's cores, and takes
# about a hundred bytes for each.
_BATCH = 1 << 19
# Characters of a piece of a text that is longer than two of them.
_PIECE = 1 << 14
# Characters on either side of a cut whose tokens must be the same with and without it.
_WINDOW = 128
# Characters before a text that continues a prompt.
_CONTEXT = 64
# Places of each kind that are tried for a cut: before a space between words, at the beginning of a line, behind a word,
# anywhere.
_PLACES = tuple(map(re.compile, (r"(?<=\w)(?= \w)", r"(?<=\n)(?=\S)", r"(?<=\w)(?=\W)", r"(?s)(?=.)")))
_TRIES = 16


class Tokens(NamedTuple):
    """Token ids (t,) int32 of a part of the document with this number: of its text, or else of its prompt."""

    ids: np.ndarray
    document: int
    in_text: bool
    has_prompt: bool
    rendered: bool


class _Piece(NamedTuple):
    """A piece of a text, and the end of what is before it, which is tokenised with it and whose tokens are dropped:
    what a tokenizer does at the beginning of a text, such as to put a space there, is thus not done to the piece."""

    context: str
    text: str
    document: int
    in_text: bool
    has_prompt: bool
    rendered: bool


class Encoder:
    """A tokenizer that takes names of control tokens as text, or else as those tokens; the mask's name is text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, mask_token_id: int, *, control_tokens: bool) -> None:
        self._tokenizer = copy.deepcopy(without_mask(tokenizer, mask_token_id))  # that one is shared
        self._tokenizer.encode_special_tokens = not control_tokens

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def pieces(self, pieces: list[_Piece]) -> list[np.ndarray]:
        """The token ids (t,) int32 of each piece."""
        after = [piece for piece in pieces if piece.context]
        found = self._encode([piece.context + piece.text for piece in pieces] + [piece.context for piece in after])
        contexts = iter(found[len(pieces) :])
        ids = []
        for number, piece in enumerate(pieces):
            own = found[number]
            if piece.context:
                context = next(contexts)
                # Only a text behind a prompt may be other: cuts are where this holds.
                own = own[len(context) :] if own[: len(context)] == context else self._encode([piece.text])[0]
            ids.append(np.array(own, np.int32))
        return ids

    def cut(self, text: str, limit: int) -> int:
        """Where to end a piece of `text` that begins _PIECE before `limit`: at most there, and where what is behind it
        is tokenised as without the cut, judged by _WINDOW characters on both sides.

        Where a text has no such place in sight, as in a word of thousands of letters, it is cut at `limit`.
        """
        for pattern in _PLACES:
            places = [found.start() for found in pattern.finditer(text, limit - _PIECE // 2, limit)]
            for place in reversed(places[-_TRIES:]):
                left, context, right = text[place - _WINDOW : place], text[place - 1], text[place : place + _WINDOW]
                whole, first, rest, dropped = self._encode([left + right, left, context + right, context])
                if rest[: len(dropped)] == dropped and whole == first + rest[len(dropped) :]:
                    return place
        return limit


def tokenized(
    documents: Iterable[Document], tokenizer: tokenizers.Tokenizer, mask_token_id: int, control_tokens: bool
) -> Iterator[Tokens]:
    """The token ids of each document's prompt and text, in order and in parts.

    Names of control tokens are those tokens in prompts and rendered texts, and in others with `control_tokens`;
    elsewhere they are spelled as text, of which a warning tells once. The mask's name is always spelled as text.
    """
    encoders = [Encoder(tokenizer, mask_token_id, control_tokens=known) for known in (False, True)]
    mask = tokenizer.id_to_token(mask_token_id)
    names = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special and t.content != mask]
    watched = None if control_tokens or not names else re.compile("|".join(map(re.escape, names)))
    for batch in _batches(_pieces(documents, encoders, control_tokens)):
        known = [control_tokens or not piece.in_text or piece.rendered for piece in batch]
        found = watched and next(
            filter(None, (watched.search(p.text) for p, k in zip(batch, known, strict=True) if not k)), None
        )
        if found:
            watched = None
            warnings.warn(
                f"a text spells {found[0]}, which is learnt as text; --control-tokens makes it the token", stacklevel=2
            )
        ids = [iter(encoders[k].pieces([p for p, own in zip(batch, known, strict=True) if own == k])) for k in (0, 1)]
        for piece, k in zip(batch, known, strict=True):
            yield Tokens(next(ids[k]), *piece[2:])


def _pieces(documents: Iterable[Document], encoders: list[Encoder], control_tokens: bool) -> Iterator[_Piece]:
    for number, (prompt, text, rendered) in enumerate(documents):
        for in_text, part in ((False, prompt), (True, text)):
            encoder = encoders[control_tokens or not in_text or rendered]
            context = prompt[-_CONTEXT:] if rendered and in_text and isinstance(prompt, str) else ""
            for chunk in _cut(part, context, encoder):
                yield _Piece(*chunk, number, in_text, bool(prompt), rendered)


def _cut(text: str | LongText, context: str, encoder: Encoder) -> Iterator[tuple[str, str]]:
    """A text in pieces, each behind its context."""
    rest = ""
    for chunk in [text] if isinstance(text, str) else text.chunks():
        rest += chunk
        start = 0
        while len(rest) - start > 2 * _PIECE:
            end = encoder.cut(rest, start + _PIECE)
            yield context, rest[start:end]
            context, start = rest[end - 1], end
        rest = rest[start:]
    yield context, rest


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = list[_Piece](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + _CONTEXT
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    yield batch
