"""The reply to a completion or a chat: writes several texts and sends them whole or as a stream of chunks."""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, Self

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from twotower.decoding.output import Generation, Token
from twotower.decoding.scoring import ContextScorer, TokenScore
from twotower.decoding.step import Request as TextRequest
from twotower.engine.aio import Admission
from twotower.server.errors import ApiError
from twotower.server.logprobs import committed, prompt_logprobs
from twotower.server.protocol import StreamOptions
from twotower.server.service import Service
from twotower.server.streaming import EventStream, openai_events, unless_gone

# Tokens scored at once, which bounds the memory of their logits.
_SCORED_TOKENS = 64


class LogprobOptions(NamedTuple):
    """Which log-probabilities to give beside those of the chosen tokens: those of the `num_top` likeliest tokens at
    each place, and with `echo` those of the prompt's tokens too."""

    num_top: int
    echo: bool = False


class ReplyFormat(Protocol):
    """How an endpoint writes its reply."""

    @property
    def prefix(self) -> str: ...

    @property
    def object(self) -> str: ...

    @property
    def chunk_suffix(self) -> str: ...

    def choice(self, index: int, result: Generation, logprobs: Sequence[TokenScore] | None) -> dict[str, Any]:
        """A whole choice."""
        ...

    def beginning(self, index: int, logprobs: Sequence[TokenScore] | None) -> list[dict[str, Any]]:
        """The choices of the chunks that precede the text; `logprobs` are those of an echoed prompt."""
        ...

    def chunk(
        self, index: int, text: str, logprobs: Sequence[TokenScore] | None, more: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """The choices of the chunks that new text makes: none while it may still become something else, but at least
        one where there are log-probabilities or `more`, which are further keys of the first."""
        ...

    def end(self, index: int, result: Generation) -> list[dict[str, Any]]:
        """The choices of the last chunks, of which the last says why the text ended."""
        ...


class Counts(NamedTuple):
    """A text's new tokens, and what is known at its end: the calls of each tower that they took, and the tokens of its
    prompt that were cached."""

    tokens: int = 0
    denoiser_calls: int = 0
    context_calls: int = 0
    cached: int = 0

    @classmethod
    def of(cls, result: Generation) -> Self:
        stats = result.stats
        return cls(stats.num_tokens, stats.denoiser_calls, stats.context_calls, stats.num_cached_tokens)


class ReplyPlan(NamedTuple):
    """What to write, in which format, and what to tell beside the texts.

    `requests` are in the order of the reply's choices: all of the first prompt, then all of the next. Of those of one
    prompt the `num_choices` likeliest are given. `prompt_logprobs` asks for the log-probabilities of the prompt's
    tokens and of so many likeliest ones at each place, `token_ids` for the ids of prompts and texts.
    """

    requests: tuple[TextRequest, ...]
    num_prompts: int
    num_choices: int
    format: ReplyFormat
    logprobs: LogprobOptions | None
    stream_options: StreamOptions | None
    prompt_logprobs: int | None
    token_ids: bool

    def given(self, results: Mapping[int, Generation]) -> list[int]:
        """The places of the texts to give: for each prompt the likeliest by the mean log-probability of a token."""
        written = len(self.requests) // self.num_prompts
        if written == self.num_choices:
            return [*range(len(self.requests))]
        places = [range(k * written, (k + 1) * written) for k in range(self.num_prompts)]
        ranked = (sorted(group, key=lambda i: -_mean_logprob(results[i])) for group in places)
        return [i for group in ranked for i in group[: self.num_choices]]

    def usage(self, counts: Sequence[Counts]) -> dict[str, Any]:
        """Tokens and calls of all texts; a prompt counts once, however many texts continue it."""
        per_prompt = len(self.requests) // self.num_prompts
        prompt = sum(len(request.prompt_ids) for request in self.requests[::per_prompt])
        new, denoiser_calls, context_calls, _ = (sum(column) for column in zip(*counts, strict=True))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            # of the first text of each prompt, which reads it for the others
            "prompt_tokens_details": {"cached_tokens": sum(count.cached for count in counts[::per_prompt])},
            "denoiser_calls": denoiser_calls,
            "context_calls": context_calls,
        }


async def reply(
    service: Service, request: Request, plan: ReplyPlan, stream: bool, admission: Admission, held: ExitStack
) -> Response:
    """The response to a request. A stream takes over what `held` holds, the admission among it, until it ends.

    Raises ApiError for log-probabilities of the prompt in a stream.
    """
    if stream and plan.prompt_logprobs is not None:
        message = "prompt_logprobs are not streamed; leave them out, or don't stream"
        raise ApiError(400, message, param="prompt_logprobs", code="invalid_value")
    head = {
        "id": f"{plan.format.prefix}-{secrets.token_hex(12)}",
        "object": plan.format.object + (plan.format.chunk_suffix if stream else ""),
        "created": int(time.time()),
        "model": service.model_name,
    }
    log = request.state.log
    log |= {"id": head["id"], "mode": plan.requests[0].params.mode, "texts": len(plan.requests)}
    if stream:
        chunks = _chunks(service, plan, admission, head, log)
        return EventStream(chunks, held.pop_all(), openai_events, done="[DONE]")
    return JSONResponse(await unless_gone(request, _whole(service, plan, admission, head, log)))


async def _whole(
    service: Service, plan: ReplyPlan, admission: Admission, head: dict[str, Any], log: dict[str, Any]
) -> dict[str, Any]:
    """The body of a reply that is not streamed."""
    results: dict[int, Generation] = {}
    tokens: dict[int, list[Token]] = {i: [] for i in range(len(plan.requests))}
    async with service.run(plan.requests, admission, log) as outputs:
        async for index, output in outputs:
            tokens[index] += output.tokens
            if output.result is not None:
                results[index] = output.result
    choices = []
    for place, i in enumerate(plan.given(results)):
        logprobs = None
        if plan.logprobs is not None:
            logprobs = committed(tokens[i])
            if plan.logprobs.echo:
                logprobs = await _prompt_scores(service, plan.requests[i], plan.logprobs.num_top) + logprobs
        choice = plan.format.choice(place, results[i], logprobs)
        if plan.token_ids:
            choice |= {"token_ids": results[i].token_ids, "prompt_token_ids": plan.requests[i].prompt_ids}
        if plan.prompt_logprobs is not None:
            scores = await _prompt_scores(service, plan.requests[i], plan.prompt_logprobs)
            choice["prompt_logprobs"] = prompt_logprobs(service.names, scores)
        choices.append(choice)
    usage = plan.usage([Counts.of(results[i]) for i in range(len(plan.requests))])
    log |= usage
    return head | {"choices": choices, "usage": usage}


def _mean_logprob(result: Generation) -> float:
    scores = committed([Token(i, 0, c) for i, c in zip(result.token_ids, result.confidences, strict=True)])
    return sum(score.logprob or 0.0 for score in scores) / max(len(scores), 1)


async def _chunks(
    service: Service, plan: ReplyPlan, admission: Admission, head: dict[str, Any], log: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a stream: new text as it comes, why each text ended, and the usage where it is asked for."""
    options = plan.stream_options or StreamOptions()
    counts = [Counts()] * len(plan.requests)

    def chunk(*choices: dict[str, Any]) -> dict[str, Any]:
        made = head | {"choices": list(choices)}
        if options.continuous_usage_stats or (options.include_usage and not choices):
            return made | {"usage": plan.usage(counts)}
        return made | {"usage": None} if options.include_usage else made

    beginnings = []
    for i, text in enumerate(plan.requests):
        echoed = None
        if plan.logprobs is not None and plan.logprobs.echo:
            echoed = await _prompt_scores(service, text, plan.logprobs.num_top)
        for beginning in plan.format.beginning(i, echoed):
            beginnings.append(beginning | ({"prompt_token_ids": text.prompt_ids} if plan.token_ids else {}))
    async with service.run(plan.requests, admission, log) as outputs:
        async for index, output in outputs:
            # only now, for texts that the engine never takes up have no beginning
            for beginning in beginnings:
                yield chunk(beginning)
            beginnings.clear()
            logprobs = None if plan.logprobs is None else committed(output.tokens)
            counts[index] = Counts(counts[index].tokens + len(output.tokens))
            if output.result is not None:
                counts[index] = Counts.of(output.result)
            if output.text or logprobs or (plan.token_ids and output.tokens):
                ids = {"token_ids": output.token_ids} if plan.token_ids else {}
                for choice in plan.format.chunk(index, output.text, logprobs, ids):
                    yield chunk(choice)
            if output.result is not None:
                for choice in plan.format.end(index, output.result):
                    yield chunk(choice)
    log |= plan.usage(counts)
    if options.include_usage:
        yield chunk()


async def _prompt_scores(service: Service, text: TextRequest, num_top: int) -> list[TokenScore]:
    """The log-probabilities of a prompt's tokens under the context tower, and the `num_top` likeliest at each place."""
    model, ids = service.engine.model, text.prompt_ids
    scorer = ContextScorer(model, num_top=min(num_top, model.config.vocab_size), capacity=len(ids))
    return await _score(service, scorer, ids)


async def _score(service: Service, scorer: ContextScorer, ids: Sequence[int]) -> list[TokenScore]:
    """The log-probabilities of a text's tokens.

    Only one text is scored at a time, beside decoding. Cancelling stops it after the chunk that is under way.
    """
    cancelled = threading.Event()

    def push() -> list[TokenScore]:
        scored: list[TokenScore] = []
        for [tokens] in scorer.push([ids], chunk=_SCORED_TOKENS):
            scored += tokens
            if cancelled.is_set():
                break
        return scored

    async with service.scoring:
        try:
            return await asyncio.to_thread(push)
        finally:
            cancelled.set()
