"""Clock readings of requests, and their figures: percentiles of waiting, throughput and goodput."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from twotower.cli.load_test.plan import Shot


@dataclasses.dataclass
class LoadReading:
    """One request: seconds since the run began. `due` is when it should have been sent.

    `chunks` are the times at which text came. `error` is None for a complete answer, otherwise the reason: an
    HTTP status such as "429", "stream" for an error event, "cut" for a stream without [DONE], or an exception's name.
    """

    shot: Shot
    due: float
    sent: float
    chunks: list[float] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int | None = None
    tokens: int | None = None
    error: str | None = None

    @property
    def first_token_seconds(self) -> float | None:
        """Seconds from when the request was due, so that waiting for a slow client or server counts."""
        return self.chunks[0] - self.due if self.chunks else None

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds from the first chunk to the last for each token after the first.

        None if the usage is unknown, or if all text came in one chunk, as the tokens of a block may.
        """
        if self.tokens is None or self.tokens < 2 or len(self.chunks) < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.tokens - 1)


class Goal(NamedTuple):
    """Seconds that a request may take to its first token, and for each token after it, to count as good."""

    first_token: float
    per_token: float

    def met(self, reading: LoadReading) -> bool:
        """Whether the answer is complete and came fast enough; an answer of one token has no time per token."""
        first, each = reading.first_token_seconds, reading.seconds_per_token
        if reading.error is not None or first is None:
            return False
        return first <= self.first_token and (each is None or each <= self.per_token)


def report(readings: Sequence[LoadReading], goal: Goal) -> dict[str, Any]:
    """The figures of one run, and of each of its modes if it has several."""
    figures = _figures(readings, goal, max((r.ended for r in readings), default=0.0))
    modes = sorted({r.shot.mode for r in readings if r.shot.mode is not None})
    if len(modes) > 1:
        seconds = figures["seconds"]
        figures["modes"] = {m: _figures([r for r in readings if r.shot.mode == m], goal, seconds) for m in modes}
    return figures


def _figures(readings: Sequence[LoadReading], goal: Goal, seconds: float) -> dict[str, Any]:
    whole = [r for r in readings if r.error is None]
    good = sum(goal.met(r) for r in readings)
    tokens = [r.tokens for r in whole if r.tokens is not None]
    prompts = [r.prompt_tokens for r in whole if r.prompt_tokens is not None]
    gaps = [b - a for r in whole for a, b in zip(r.chunks, r.chunks[1:], strict=False)]
    per_second = 1 / seconds if seconds else 0.0
    return {
        "requests": len(readings),
        "completed": len(whole),
        "errors": dict(Counter(r.error for r in readings if r.error is not None)),
        "seconds": seconds,
        "requests_per_second": len(whole) * per_second,
        "tokens_per_second": sum(tokens) * per_second if len(tokens) == len(whole) else None,
        "prompt_tokens": sum(prompts) if len(prompts) == len(whole) else None,
        "ttft_ms": _percentiles([r.first_token_seconds for r in whole]),
        "tpot_ms": _percentiles([r.seconds_per_token for r in whole]),
        "chunk_gap_ms": _percentiles(gaps),
        "latency_ms": _percentiles([r.ended - r.due for r in whole]),
        "goodput": {
            "ttft_ms": 1e3 * goal.first_token,
            "tpot_ms": 1e3 * goal.per_token,
            "share": good / len(readings) if readings else 0.0,
            "requests_per_second": good * per_second,
        },
    }


def _percentiles(seconds: Sequence[float | None]) -> dict[str, float] | None:
    known = [1e3 * s for s in seconds if s is not None]
    if not known:
        return None
    p50, p95, p99 = (float(v) for v in np.percentile(known, (50, 95, 99)))
    return {"mean": float(np.mean(known)), "p50": p50, "p95": p95, "p99": p99, "max": max(known)}


def row(reading: LoadReading) -> dict[str, Any]:
    """One request as a JSON object."""
    found = dataclasses.asdict(reading)
    found |= {"prompt_words": len(reading.shot.prompt.split()), "new_tokens": reading.shot.new_tokens}
    found |= {"mode": reading.shot.mode, "ttft": reading.first_token_seconds, "tpot": reading.seconds_per_token}
    del found["shot"]
    return found
