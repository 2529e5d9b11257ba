"""The reply to a completion or a chat: writes several texts and sends them whole or as a stream of chunks."""

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, Self

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from twotower.decoding.output import DraftCount, Generation, StepOutput, Token, TokenScore, add_drafts, draft_counts
from twotower.decoding.step import Request as TextRequest
from twotower.engine.aio import Admission
from twotower.server.errors import ApiError
from twotower.server.logprobs import committed, prompt_logprobs
from twotower.server.protocol import StreamOptions
from twotower.server.service import Service
from twotower.server.streaming import EventStream, openai_events, unless_gone


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

    def choice(
        self,
        index: int,
        result: Generation,
        logprobs: Sequence[TokenScore] | None,
        echoed: Sequence[TokenScore] | None,
    ) -> dict[str, Any]:
        """A whole choice with the log-probabilities of the text's tokens and, if it is echoed, of the prompt's."""
        ...

    def beginning(self, index: int, echoed: Sequence[TokenScore] | None) -> list[dict[str, Any]]:
        """The choices of the chunks that precede the text, with the log-probabilities of the tokens of an echoed
        prompt."""
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
    """A text's new tokens, and what is known at its end: the calls of each tower that they took, the tokens of its
    prompt that were cached, and what drafts gave."""

    tokens: int = 0
    denoiser_calls: int = 0
    context_calls: int = 0
    cached: int = 0
    drafts: tuple[DraftCount, ...] = ()

    @classmethod
    def of(cls, result: Generation) -> Self:
        stats = result.stats
        return cls(stats.num_tokens, stats.denoiser_calls, stats.context_calls, stats.num_cached_tokens, stats.drafts)

    @property
    def calls(self) -> dict[str, Any]:
        """The calls, and where there were drafts the drafted and the accepted tokens of each drafter, as usage has
        them."""
        told = {"drafts": draft_counts(self.drafts)} if self.drafts else {}
        return {"denoiser_calls": self.denoiser_calls, "context_calls": self.context_calls} | told


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

    @property
    def num_written(self) -> int:
        """The texts of each prompt."""
        return len(self.requests) // self.num_prompts

    @property
    def echo_top(self) -> int | None:
        """How many likeliest tokens to give at each place of an echoed prompt; None for no log-probabilities there."""
        return self.logprobs.num_top if self.logprobs is not None and self.logprobs.echo else None

    def to_run(self) -> tuple[TextRequest, ...]:
        """The requests for the engine: the first of each prompt gives the prompt's log-probabilities for all others."""
        num_top = max((num for num in (self.echo_top, self.prompt_logprobs) if num is not None), default=None)
        places = enumerate(self.requests)
        return tuple(r if i % self.num_written else r._replace(prompt_logprobs=num_top) for i, r in places)

    def given(self, results: Mapping[int, Generation]) -> list[int]:
        """The places of the texts to give: for each prompt the likeliest by the mean log-probability of a token."""
        written = self.num_written
        if written == self.num_choices:
            return [*range(len(self.requests))]
        places = [range(k * written, (k + 1) * written) for k in range(self.num_prompts)]
        ranked = (sorted(group, key=lambda i: -_mean_logprob(results[i])) for group in places)
        return [i for group in ranked for i in group[: self.num_choices]]

    def usage(self, counts: Sequence[Counts]) -> dict[str, Any]:
        """Tokens and calls of all texts; a prompt counts once, however many texts continue it."""
        per_prompt = self.num_written
        prompt = sum(len(request.prompt_ids) for request in self.requests[::per_prompt])
        new, denoiser_calls, context_calls = (sum(column) for column in zip(*(c[:3] for c in counts), strict=True))
        drafts = add_drafts((), (draft for count in counts for draft in count.drafts))
        whole = Counts(new, denoiser_calls, context_calls, drafts=drafts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            # of the first text of each prompt, which reads it for the others
            "prompt_tokens_details": {"cached_tokens": sum(count.cached for count in counts[::per_prompt])},
            **whole.calls,
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
    echoed: dict[int, list[TokenScore]] = {}  # by prompt, as the next
    of_prompts: dict[int, list[dict[str, Any] | None]] = {}
    async with service.run(plan.to_run(), admission, log) as outputs:
        async for index, output in outputs:
            tokens[index] += output.tokens
            if output.result is not None:
                results[index] = output.result
            if output.prompt_scores and plan.echo_top is not None:
                echoed[index // plan.num_written] = _with_top(output.prompt_scores, plan.echo_top)
            if output.prompt_scores and plan.prompt_logprobs is not None:
                scores = _with_top(output.prompt_scores, plan.prompt_logprobs)
                of_prompts[index // plan.num_written] = prompt_logprobs(service.names, scores)
    choices = []
    for place, i in enumerate(plan.given(results)):
        prompt = i // plan.num_written
        logprobs = None if plan.logprobs is None else committed(tokens[i])
        choice = plan.format.choice(place, results[i], logprobs, echoed.get(prompt))
        if plan.token_ids:
            choice |= {"token_ids": results[i].token_ids, "prompt_token_ids": plan.requests[i].prompt_ids}
        if plan.prompt_logprobs is not None:
            choice["prompt_logprobs"] = of_prompts[prompt]
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

    def beginnings(first: int, count: int, echoed: Sequence[TokenScore] | None) -> list[dict[str, Any]]:
        made = []
        for i in range(first, first + count):
            ids = {"prompt_token_ids": plan.requests[i].prompt_ids} if plan.token_ids else {}
            made += [chunk(beginning | ids) for beginning in plan.format.beginning(i, echoed)]
        return made

    begun = False
    async with service.run(plan.to_run(), admission, log) as running:
        outputs = running if plan.echo_top is None else _behind_scores(running, plan.num_written)
        async for index, output in outputs:
            # only now, for texts that the engine never takes up have no beginning
            if plan.echo_top is None and not begun:
                begun = True
                for made in beginnings(0, len(plan.requests), None):
                    yield made
            if output.prompt_scores:
                echoed = _with_top(output.prompt_scores, plan.echo_top or 0)
                for made in beginnings(index - index % plan.num_written, plan.num_written, echoed):
                    yield made
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


async def _behind_scores(
    outputs: AsyncIterator[tuple[int, StepOutput]], per_prompt: int
) -> AsyncIterator[tuple[int, StepOutput]]:
    """The outputs, of which those of a prompt's texts wait for the one that has the scores of the prompt: a text whose
    prompt was cached may be ahead of the one that reads all of it."""
    held: dict[int, list[tuple[int, StepOutput]]] = {}
    known = set()
    async for index, output in outputs:
        prompt = index // per_prompt
        if output.prompt_scores:
            known.add(prompt)
        if prompt not in known:
            held.setdefault(prompt, []).append((index, output))
            continue
        yield index, output
        for one in held.pop(prompt, ()):
            yield one


def _with_top(scores: Sequence[TokenScore], num_top: int) -> list[TokenScore]:
    """Scores with so many of the likeliest tokens."""
    return [score._replace(top=score.top[:num_top]) for score in scores]
