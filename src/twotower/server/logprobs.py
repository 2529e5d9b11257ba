"""Log-probabilities of tokens in the formats of /v1/completions and /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from twotower.decoding.output import Token, TokenScore
from twotower.server.token_names import TextOffsets, TokenNames

# The least log-probability that is shown: JSON has no infinity.
_LEAST = -9999.0


def committed(tokens: Sequence[Token]) -> list[TokenScore]:
    """Tokens with the log-probabilities that they had when they were committed."""
    return [TokenScore(t.id, max(t.logprob, _LEAST), top=t.top) for t in tokens]


def completion_logprobs(
    names: TokenNames, tokens: Sequence[TokenScore], offsets: TextOffsets, *, with_top: bool
) -> dict[str, list[Any] | None]:
    """The `logprobs` object of /v1/completions.

    `offsets` has seen the tokens before these. `with_top` says whether to list the likeliest tokens; the chosen one is
    among them, as one more where it isn't one of them.
    """
    tops: list[dict[str, float] | None] = []
    shown, places = [], []
    for token in tokens:
        first = offsets.at_start
        places.append(offsets.push(token.id))
        shown.append(names.name(token.id, first=first))
        top: dict[str, float] = {}
        for i, value in token.top:
            # of two tokens with the same text, the likelier comes first
            top.setdefault(names.name(i, first=first), max(value, _LEAST))
        if token.logprob is not None:
            top.setdefault(shown[-1], max(token.logprob, _LEAST))
        tops.append(None if token.logprob is None else top)
    return {
        "tokens": shown,
        "token_logprobs": [None if t.logprob is None else max(t.logprob, _LEAST) for t in tokens],
        "top_logprobs": tops if with_top else None,
        "text_offset": places,
    }


def chat_logprobs(names: TokenNames, tokens: Sequence[TokenScore]) -> dict[str, Any]:
    """The `logprobs` object of /v1/chat/completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        own = names.bytes(token)
        return {
            "token": names.name(token),
            "logprob": None if logprob is None else max(logprob, _LEAST),
            "bytes": list(own) if own else None,
        }

    content = [entry(t.id, t.logprob) | {"top_logprobs": [entry(i, value) for i, value in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def prompt_logprobs(names: TokenNames, tokens: Sequence[TokenScore]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token of a prompt an object with its id and those of the likeliest tokens as
    keys; null for the first token, which nothing stands before. The rank of a token is null where it isn't known."""

    def entry(token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": names.name(token)}

    found: list[dict[str, Any] | None] = []
    for token in tokens:
        if token.logprob is None:
            found.append(None)
            continue
        tops = {str(i): entry(i, value, rank) for rank, (i, value) in enumerate(token.top, 1)}
        found.append({str(token.id): entry(token.id, token.logprob, 1 if token.is_greedy else None)} | tops)
    return found
