"""POST /v1/completions."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from twotower.decoding.output import Generation
from twotower.decoding.scoring import TokenScore
from twotower.server.fields import logged
from twotower.server.logprobs import TokenNames, completion_logprobs
from twotower.server.protocol import CompletionRequest
from twotower.server.reply import LogprobOptions, ReplyPlan, reply
from twotower.server.service import Service

# New tokens of a request that does not say how many: OpenAI's default.
_MAX_TOKENS = 16


class CompletionFormat:
    """Choices of /v1/completions; a `ReplyFormat`.

    `echoes` are the texts that each choice begins with, its prompt or "". `with_top` says whether to show the likeliest
    tokens beside the chosen ones.
    """

    prefix, object, chunk_suffix = "cmpl", "text_completion", ""

    def __init__(self, names: TokenNames, echoes: Sequence[str], *, with_top: bool) -> None:
        self._names = names
        self._echoes = echoes
        self._with_top = with_top
        self._offsets = [len(echo) for echo in echoes]

    def choice(self, index: int, result: Generation, logprobs: Sequence[TokenScore] | None) -> dict[str, Any]:
        assert result.text is not None
        # an echoed prompt's tokens are among `logprobs`, and their text is at the beginning of the choice
        shown = None if logprobs is None else self._logprobs(logprobs, 0)
        text = self._echoes[index] + result.text
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": result.finish_reason}

    def beginning(self, index: int, logprobs: Sequence[TokenScore] | None) -> list[dict[str, Any]]:
        if logprobs is not None:
            self._offsets[index] = 0  # the echoed tokens come first, and each adds its width
        return [self.chunk(index, self._echoes[index], logprobs)] if self._echoes[index] or logprobs else []

    def chunk(self, index: int, text: str, logprobs: Sequence[TokenScore] | None) -> dict[str, Any]:
        shown = None
        if logprobs is not None:
            shown = self._logprobs(logprobs, self._offsets[index])
            for token in logprobs:
                is_first = bool(self._echoes[0]) and self._offsets[index] == 0
                self._offsets[index] += self._names.width(token.id, first=is_first)
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": None}

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": result.finish_reason}

    def _logprobs(self, tokens: Sequence[TokenScore], offset: int) -> dict[str, Any]:
        return completion_logprobs(self._names, tokens, offset, at_start=bool(self._echoes[0]), with_top=self._with_top)


async def complete(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Continues every prompt of a request `n` times. Raises ApiError for what can't be done."""
    service.check_model(body.model)
    request.state.log["user"] = logged(body.user)
    prompts, n = body.prompts(), body.num_choices
    with ExitStack() as held:
        admission = held.enter_context(service.admit(len(prompts) * n))
        requests, echoes = [], []
        for prompt in prompts:
            requests += await service.prepare(prompt, body, body.max_tokens, _MAX_TOKENS, num_choices=n)
            given = prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)
            echoes += [given if body.echo else ""] * n
        with_top = bool(body.logprobs)
        logprobs = None if body.logprobs is None else LogprobOptions(body.logprobs, bool(body.echo))
        format = CompletionFormat(service.names, echoes, with_top=with_top)
        plan = ReplyPlan(tuple(requests), len(prompts), format, logprobs, body.stream_options)
        return await reply(service, request, plan, bool(body.stream), admission, held)
