"""What a request gives: one `StepOutput` per decoding step, and one `Generation` at its end."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length"]


class Token(NamedTuple):
    """One committed token: its `id`, the denoising `step` of its block at which it was committed (0 in modes without
    blocks), and its `confidence`, the probability that it had then.

    `top` are the tokens that were likeliest at its place then, best first, each an id and its log-probability, as many
    as `SamplingParams.logprobs` asks for. `rank` says how many tokens were at least as likely as this one, itself
    among them; it is 0 where `logprobs` asks for none.
    """

    id: int
    step: int
    confidence: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0

    @property
    def logprob(self) -> float:
        """The natural logarithm of `confidence`, as it stands in `top` if it does; −∞ for 0."""
        known = dict(self.top).get(self.id)
        if known is not None:
            return known
        return math.log(self.confidence) if self.confidence > 0 else -math.inf


class TokenScore(NamedTuple):
    """A token and its log-probability given all tokens before it, None for a first token that nothing stands before.

    `is_greedy` says whether it is the likeliest token at its place; `top` are the likeliest tokens there with their
    log-probabilities, best first, as many as were asked for.
    """

    id: int
    logprob: float | None = None
    is_greedy: bool = False
    top: tuple[tuple[int, float], ...] = ()


class BlockView(NamedTuple):
    """One row's block after a denoising step: its `ids` (s), mask tokens included, and `confidences` (s), the
    probability of each fixed token.

    `step` is the number of steps that the block has seen, `t` the fraction of it that is still masked.
    """

    ids: tuple[int, ...]
    confidences: tuple[float, ...]
    step: int
    t: float


class DraftCount(NamedTuple):
    """Drafts of one `drafter`: of the tokens that it `drafted`, so many were `accepted`."""

    drafter: str
    drafted: int
    accepted: int
    rounds: int = 1


def add_drafts(counts: Sequence[DraftCount], more: Iterable[DraftCount]) -> tuple[DraftCount, ...]:
    """The counts of each drafter, with more added to them."""
    sums = {count.drafter: count for count in counts}
    for new in more:
        old = sums.get(new.drafter, DraftCount(new.drafter, 0, 0, 0))
        sums[new.drafter] = DraftCount(new.drafter, *(a + b for a, b in zip(old[1:], new[1:], strict=True)))
    return tuple(sums.values())


def draft_counts(counts: Iterable[DraftCount]) -> dict[str, dict[str, int]]:
    """The drafted and the accepted tokens of each drafter, as reports have them."""
    return {count.drafter: {"drafted": count.drafted, "accepted": count.accepted} for count in counts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What a generation cost: `denoiser_calls` (NFEs) and `context_calls`, of which prefill is one,
    `seconds_to_first_token` and `seconds_total` since the request arrived, for `num_tokens` new tokens.
    `num_cached_tokens` of the prompt were in an engine's prefix cache when the request was taken up. `drafts` has for
    each drafter that ran in mode `verified` in how many rounds it did, and the tokens that it drafted and those of
    them that were accepted."""

    denoiser_calls: int
    context_calls: int
    seconds_to_first_token: float
    seconds_total: float
    num_tokens: int
    num_cached_tokens: int = 0
    drafts: tuple[DraftCount, ...] = ()

    @property
    def tokens_per_denoiser_call(self) -> float:
        """New tokens per NFE; 0.0 in mode `ar`, which has none."""
        return self.num_tokens / self.denoiser_calls if self.denoiser_calls else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per pass of either tower after the prompt's, about 1 in mode `ar`; 0.0 without such passes."""
        passes = self.denoiser_calls + self.context_calls - 1
        return self.num_tokens / passes if passes > 0 else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One request's result.

    `token_ids` are the new tokens, the end token included; `text` is their text up to a stop string, None without a
    tokenizer. `commit_steps` and `confidences` go with `token_ids`: the denoising step of its block at which each
    token was committed (0 in modes without blocks) and the probability that it had then; `top` has for each the tokens
    that were likeliest there, each an id and its log-probability, as many as `SamplingParams.logprobs` asks for.
    `finish_reason` is "stop" after an end token, a stop string or the end of a format, and "length" after
    `max_new_tokens`; `stop_string` is the stop string that ended it, if one did. `stats` say what it cost.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    stop_string: str | None
    stats: GenerationStats
    commit_steps: list[int]
    confidences: list[float]
    top: list[tuple[tuple[int, float], ...]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What one decoding step gave one request; `str()` of it is its text.

    `text` is the text that became certain, `tokens` are the new tokens. `prompt_scores` are those of the prompt's own
    tokens, in one output before the first token, where the request asks an engine for them. `block` shows the block in
    progress, where the caller asked for every step and the mode fills blocks. `result` is there in a request's last
    output only. The last output of a request of an engine that failed has in its place the `error`, the exception on
    which it failed. `request_id` is the one that the engine knows the request by, empty outside an engine, and
    `seconds_queued` is how long the request waited until the engine took it up.
    """

    request_id: str
    text: str
    tokens: tuple[Token, ...]
    block: BlockView | None
    result: Generation | None
    seconds_queued: float
    error: BaseException | None = None
    prompt_scores: tuple[TokenScore, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether the request has ended."""
        return self.result is not None or self.error is not None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of `tokens`."""
        return tuple(token.id for token in self.tokens)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it goes on."""
        return None if self.result is None else self.result.finish_reason

    def __str__(self) -> str:
        return self.text
