"""POST /v1/completions and POST /v1/chat/completions."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from twotower.checkpoints.chat_template import Turn
from twotower.decoding.output import Generation
from twotower.server.errors import ApiError
from twotower.server.logprobs import ScoredToken, TokenNames, chat_logprobs, completion_logprobs
from twotower.server.protocol import ChatRequest, CompletionRequest
from twotower.server.reply import Order, Wanted, answer
from twotower.server.service import Choice, Service

# OpenAI's default for completions; a chat goes on to the end of the context.
_MAX_TOKENS = 16


class CompletionShape:
    """Choices of /v1/completions. `echoes` are the texts put before each choice's, "" for none."""

    prefix, object, chunk_suffix = "cmpl", "text_completion", ""

    def __init__(self, names: TokenNames, echoes: Sequence[str], *, with_top: bool) -> None:
        self._names = names
        self._echoes = echoes
        self._with_top = with_top
        self._offsets = [len(echo) for echo in echoes]

    def choice(self, index: int, result: Generation, logprobs: Sequence[ScoredToken] | None) -> dict[str, Any]:
        assert result.text is not None
        # echoed tokens have the echoed text's places, from 0 on
        shown = None if logprobs is None else self._logprobs(logprobs, 0)
        text = self._echoes[index] + result.text
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": result.finish_reason}

    def beginning(self, index: int, logprobs: Sequence[ScoredToken] | None) -> list[dict[str, Any]]:
        if logprobs is not None:
            self._offsets[index] = 0  # echoed tokens count on from here
        return [self.chunk(index, self._echoes[index], logprobs)] if self._echoes[index] or logprobs else []

    def chunk(self, index: int, text: str, logprobs: Sequence[ScoredToken] | None) -> dict[str, Any]:
        shown = None
        if logprobs is not None:
            shown = self._logprobs(logprobs, self._offsets[index])
            for token in logprobs:
                is_first = bool(self._echoes[0]) and self._offsets[index] == 0
                self._offsets[index] += self._names.width(token.id, first=is_first)
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": None}

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": result.finish_reason}

    def _logprobs(self, tokens: Sequence[ScoredToken], offset: int) -> dict[str, Any]:
        return completion_logprobs(self._names, tokens, offset, at_start=bool(self._echoes[0]), with_top=self._with_top)


@dataclasses.dataclass(frozen=True)
class ChatShape:
    """Choices of /v1/chat/completions."""

    names: TokenNames
    prefix: str = "chatcmpl"
    object: str = "chat.completion"
    chunk_suffix: str = ".chunk"

    def choice(self, index: int, result: Generation, logprobs: Sequence[ScoredToken] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": result.text, "refusal": None}
        shown = None if logprobs is None else chat_logprobs(self.names, logprobs)
        return {"index": index, "message": message, "logprobs": shown, "finish_reason": result.finish_reason}

    def beginning(self, index: int, logprobs: Sequence[ScoredToken] | None) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def chunk(self, index: int, text: str, logprobs: Sequence[ScoredToken] | None) -> dict[str, Any]:
        shown = None if logprobs is None else chat_logprobs(self.names, logprobs)
        return {"index": index, "delta": {"content": text}, "logprobs": shown, "finish_reason": None}

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": result.finish_reason}


async def complete(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Continues every prompt of a request `n` times. Raises ApiError for what can't be done."""
    service.check_model(body.model)
    prompts, n, includes_usage = body.prompts(), body.num_choices, body.includes_usage
    request.state.log["user"] = body.user
    with ExitStack() as held:
        places = held.enter_context(service.admit(len(prompts) * n))
        choices, echoes = [], []
        for prompt in prompts:
            ids = await service.encode(prompt)
            room = service.room(ids, body.max_tokens, _MAX_TOKENS)
            choices += [Choice(ids, body.sampling(service.config.default_mode, room, k)) for k in range(n)]
            given = prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)
            echoes += [given if body.echo else ""] * n
        with_top = bool(body.logprobs)
        wanted = None if body.logprobs is None else Wanted(body.logprobs, bool(body.echo))
        shape = CompletionShape(service.names, echoes, with_top=with_top)
        order = Order(tuple(choices), len(prompts), shape, wanted, includes_usage)
        return await answer(service, request, order, bool(body.stream), places, held)


async def chat(service: Service, body: ChatRequest, request: Request) -> Response:
    """Writes the next message of a chat `n` times. Raises ApiError for what can't be done."""
    service.check_model(body.model)
    n, includes_usage = body.num_choices, body.includes_usage
    request.state.log["user"] = body.user
    if service.template is None:
        message = f"{service.config.model_name!r} has no chat template; use /v1/completions, or serve a chat model"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    if body.top_logprobs is not None and not body.logprobs:
        message = "top_logprobs needs logprobs: true; set it or leave top_logprobs out"
        raise ApiError(400, message, param="top_logprobs", code="invalid_value")
    with ExitStack() as held:
        places = held.enter_context(service.admit(n))
        try:
            prompt = service.template.render([Turn(m.role, m.text) for m in body.messages])
        except ValueError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        # templates write the control tokens that a prompt begins with
        ids = await service.encode(prompt, special=False)
        room = service.room(ids, body.most_tokens, service.config.max_context - len(ids))
        choices = [Choice(ids, body.sampling(service.config.default_mode, room, k)) for k in range(n)]
        wanted = Wanted(body.top_logprobs or 0) if body.logprobs else None
        order = Order(tuple(choices), 1, ChatShape(service.names), wanted, includes_usage)
        return await answer(service, request, order, bool(body.stream), places, held)
