"""Log-probabilities of tokens, as the two endpoints show them."""

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers
import torch

from twotower.decoding.step import Token
from twotower.model.two_tower import TwoTower

# Positions scored at a time: bounds the (t, v) logits.
_CHUNK = 64
# What stands for log 0, which JSON lacks.
_LEAST = -9999.0


class Scored(NamedTuple):
    """A token with its log-probability, None for a text's first, and the likeliest tokens at its place, best first."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Cancelled(Exception):
    """Nobody waits for the scores any more."""


def committed(tokens: Sequence[Token]) -> list[Scored]:
    """Tokens with the log-probability that they had when they were committed."""
    return [Scored(t.id, math.log(t.confidence) if t.confidence > 0 else _LEAST) for t in tokens]


def score(model: TwoTower, ids: Sequence[int], num_top: int, cancelled: threading.Event) -> list[Scored]:
    """The context tower's log-probability of each of ids given those before it, and its `num_top` likeliest tokens.

    Raises Cancelled soon after the event is set.
    """
    scored = [Scored(ids[0], None)]
    tower = model.context_tower
    with torch.inference_mode():
        state = tower.initial_state(1, len(ids))
        for first in range(0, len(ids) - 1, _CHUNK):
            if cancelled.is_set():
                raise Cancelled
            chunk = torch.tensor([ids[first : min(first + _CHUNK, len(ids) - 1)]], device=model.context_device)
            passed = tower.causal(chunk, state)
            log_p = model.scored_logits(passed)[0].log_softmax(-1)  # (t, v)
            after = list(ids[first + 1 : first + 1 + chunk.shape[1]])
            own = log_p.gather(-1, torch.tensor(after, device=log_p.device)[:, None])[:, 0].tolist()
            best = log_p.topk(min(num_top, log_p.shape[-1]), dim=-1)
            for i, (token, value) in enumerate(zip(after, own, strict=True)):
                pairs = zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True)
                scored.append(Scored(token, max(value, _LEAST), tuple((t, max(v, _LEAST)) for t, v in pairs)))
            state = tower.commit(passed, (chunk.shape[1],), None)
    return scored


class TokenNames:
    """Single tokens as text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Some decoders drop the first space of a text: tokens are decoded after this.
        self._anchor = tokenizer.encode("a", add_special_tokens=False).ids
        self._alone = len(tokenizer.decode(self._anchor))

    def text(self, token: int) -> str | None:
        """The token's own text; None for control tokens, and for a part of a character."""
        piece = self._tokenizer.decode([*self._anchor, token])[self._alone :]
        return piece if piece and "\ufffd" not in piece else None

    def width(self, token: int, *, first: bool) -> int:
        """How many characters the token adds to a text, where it may be the first."""
        return len(self._tokenizer.decode([token]) if first else self.text(token) or "")

    def name(self, token: int) -> str:
        """The token's text, or what the vocabulary calls it."""
        return self.text(token) or self._tokenizer.id_to_token(token) or f"<{token}>"


def completion_logprobs(
    names: TokenNames, tokens: Sequence[Scored], offset: int, *, at_start: bool, with_top: bool
) -> dict[str, list[Any] | None]:
    """The object of /v1/completions; `offset` is the number of characters before the tokens.

    `at_start` where the tokens begin a text, and none is before them.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += names.width(token.id, first=at_start and offset == 0)
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        top: dict[str, float] = {}
        for i, value in token.top:
            top.setdefault(names.name(i), value)  # the first of two tokens with one text is the likelier
        tops.append(None if token.logprob is None else top)
    return {
        "tokens": [names.name(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if with_top else None,
        "text_offset": offsets,
    }


def chat_logprobs(names: TokenNames, tokens: Sequence[Scored]) -> dict[str, Any]:
    """The object of /v1/chat/completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = names.text(token)
        return {
            "token": names.name(token),
            "logprob": logprob,
            "bytes": None if text is None else list(text.encode()),
        }

    content = [entry(t.id, t.logprob) | {"top_logprobs": [entry(i, value) for i, value in t.top]} for t in tokens]
    return {"content": content, "refusal": None}
