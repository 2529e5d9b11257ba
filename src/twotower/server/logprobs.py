"""Log-probabilities of tokens in the formats of /v1/completions and /v1/chat/completions."""

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers
import torch
from torch import Tensor

from twotower.decoding.output import Token
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower

# Positions scored at a time: bounds the (t, v) logits.
_CHUNK = 64
# Shown for log 0: JSON has no infinity.
_LEAST = -9999.0


class ScoredToken(NamedTuple):
    """A token, its log-probability (None for a text's first), and the likeliest tokens at its place, best first."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Cancelled(Exception):
    """Nobody waits for the scores any more."""


def committed(tokens: Sequence[Token]) -> list[ScoredToken]:
    """Tokens with the log-probabilities that they had when they were committed."""
    return [ScoredToken(t.id, math.log(t.confidence) if t.confidence > 0 else _LEAST) for t in tokens]


class Scorer:
    """The context tower's log-probabilities of a text that comes piece by piece: of each token, given those before it,
    and of the `num_top` likeliest at its place. `length` is how many tokens are expected."""

    def __init__(self, model: TwoTower, num_top: int, length: int) -> None:
        self._model = model
        self._num_top = num_top
        self._length = length
        self._state: ContextState | None = None
        self._next: Tensor | None = None  # (1, v) log-probabilities of the token after those taken

    def push(self, ids: Sequence[int], cancelled: threading.Event) -> list[ScoredToken]:
        """The scores of the text's next tokens. Raises Cancelled soon after the event is set."""
        scored: list[ScoredToken] = []
        tower = self._model.context_tower
        with torch.inference_mode():
            for first in range(0, len(ids), _CHUNK):
                if cancelled.is_set():
                    raise Cancelled
                chunk = list(ids[first : first + _CHUNK])
                state = tower.initial_state(1, self._length) if self._state is None else self._state
                passed = tower.causal(torch.tensor([chunk], device=self._model.context_device), state)
                log_p = self._model.scored_logits(passed)[0].log_softmax(-1)  # (t, v): row i is of token i + 1
                self._state = passed.commit((len(chunk),), None)
                if self._next is None:
                    scored.append(ScoredToken(chunk[0], None))
                    scored += self._read(chunk[1:], log_p[:-1])
                else:
                    scored += self._read(chunk, torch.cat((self._next, log_p[:-1])))
                self._next = log_p[-1:]
        return scored

    def _read(self, ids: Sequence[int], log_p: Tensor) -> list[ScoredToken]:
        """The scores of ids under log_p (t, v), a row for each."""
        own = log_p.gather(-1, torch.tensor(ids, dtype=torch.long, device=log_p.device)[:, None])[:, 0].tolist()
        best = log_p.topk(min(self._num_top, log_p.shape[-1]), dim=-1)
        tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            ScoredToken(i, max(value, _LEAST), tuple((t, max(v, _LEAST)) for t, v in zip(*top, strict=True)))
            for i, value, top in zip(ids, own, tops, strict=True)
        ]


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
    names: TokenNames, tokens: Sequence[ScoredToken], offset: int, *, at_start: bool, with_top: bool
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
            top.setdefault(names.name(i), value)  # of two tokens with the same text, the likelier comes first
        tops.append(None if token.logprob is None else top)
    return {
        "tokens": [names.name(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if with_top else None,
        "text_offset": offsets,
    }


def chat_logprobs(names: TokenNames, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """The `logprobs` object of /v1/chat/completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = names.text(token)
        return {
            "token": names.name(token),
            "logprob": logprob,
            "bytes": None if text is None else list(text.encode()),
        }

    content = [entry(t.id, t.logprob) | {"top_logprobs": [entry(i, value) for i, value in t.top]} for t in tokens]
    return {"content": content, "refusal": None}
