"""Log-probabilities of tokens in the formats of /v1/completions and /v1/chat/completions."""

import math
from collections.abc import Sequence
from typing import Any

import tokenizers

from twotower.decoding.output import Token
from twotower.decoding.scoring import TokenScore

# The least log-probability that is shown: JSON has no infinity.
_LEAST = -9999.0


def committed(tokens: Sequence[Token]) -> list[TokenScore]:
    """Tokens with the log-probabilities that they had when they were committed."""
    return [TokenScore(t.id, math.log(t.confidence) if t.confidence > 0 else _LEAST) for t in tokens]


class TokenNames:
    """The texts of single tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Some decoders drop the first space of a text, so a token is decoded behind another one.
        self._anchor = tokenizer.encode("a", add_special_tokens=False).ids
        self._alone = len(tokenizer.decode(self._anchor))

    def text(self, token: int) -> str | None:
        """The token's own text; None for control tokens and for tokens that are only a part of a character."""
        piece = self._tokenizer.decode([*self._anchor, token])[self._alone :]
        return piece if piece and "\ufffd" not in piece else None

    def width(self, token: int, *, first: bool) -> int:
        """How many characters the token adds to a text; `first` says that it begins the text."""
        return len(self._tokenizer.decode([token]) if first else self.text(token) or "")

    def name(self, token: int) -> str:
        """The token's text, or else its name in the vocabulary."""
        return self.text(token) or self._tokenizer.id_to_token(token) or f"<{token}>"


def completion_logprobs(
    names: TokenNames, tokens: Sequence[TokenScore], offset: int, *, at_start: bool, with_top: bool
) -> dict[str, list[Any] | None]:
    """The `logprobs` object of /v1/completions.

    `offset` is the number of characters before the tokens. `at_start` says that the text shown begins with the first of
    all tokens, so that a token at offset 0 is the first. `with_top` says whether to list the likeliest tokens.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += names.width(token.id, first=at_start and offset == 0)
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        top: dict[str, float] = {}
        for i, value in token.top:
            # of two tokens with the same text, the likelier comes first
            top.setdefault(names.name(i), max(value, _LEAST))
        tops.append(None if token.logprob is None else top)
    return {
        "tokens": [names.name(token.id) for token in tokens],
        "token_logprobs": [None if t.logprob is None else max(t.logprob, _LEAST) for t in tokens],
        "top_logprobs": tops if with_top else None,
        "text_offset": offsets,
    }


def chat_logprobs(names: TokenNames, tokens: Sequence[TokenScore]) -> dict[str, Any]:
    """The `logprobs` object of /v1/chat/completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = names.text(token)
        return {
            "token": names.name(token),
            "logprob": None if logprob is None else max(logprob, _LEAST),
            "bytes": None if text is None else list(text.encode()),
        }

    content = [entry(t.id, t.logprob) | {"top_logprobs": [entry(i, value) for i, value in t.top]} for t in tokens]
    return {"content": content, "refusal": None}
