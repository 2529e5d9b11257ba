"""POST /v1/completions."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from twotower.decoding.output import Generation
from twotower.decoding.scoring import TokenScore
from twotower.server.logprobs import completion_logprobs
from twotower.server.protocol import CompletionRequest
from twotower.server.reply import LogprobOptions, ReplyPlan, reply
from twotower.server.service import Service
from twotower.server.token_names import TextOffsets, TokenNames

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
        self._offsets: dict[int, TextOffsets] = {}

    def choice(self, index: int, result: Generation, logprobs: Sequence[TokenScore] | None) -> dict[str, Any]:
        assert result.text is not None
        self._begin(index, logprobs is not None)
        text = self._echoes[index] + result.text
        shown = self._logprobs(index, logprobs)
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": result.finish_reason}

    def beginning(self, index: int, logprobs: Sequence[TokenScore] | None) -> list[dict[str, Any]]:
        self._begin(index, logprobs is not None)
        return self.chunk(index, self._echoes[index], logprobs, {}) if self._echoes[index] or logprobs else []

    def chunk(
        self, index: int, text: str, logprobs: Sequence[TokenScore] | None, more: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        shown = self._logprobs(index, logprobs)
        return [{"index": index, "text": text, "logprobs": shown, "finish_reason": None, **more}]

    def end(self, index: int, result: Generation) -> list[dict[str, Any]]:
        return [{"index": index, "text": "", "logprobs": None, "finish_reason": result.finish_reason}]

    def _begin(self, index: int, tokens_of_echo: bool) -> None:
        """Begins to count characters: behind the echo, or with its tokens where these come with the text's."""
        echo = self._echoes[index]
        start = 0 if tokens_of_echo else len(echo)
        self._offsets[index] = TextOffsets(self._names, start, echo=echo if tokens_of_echo else "")

    def _logprobs(self, index: int, tokens: Sequence[TokenScore] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return completion_logprobs(self._names, tokens, self._offsets[index], with_top=self._with_top)


async def complete(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Continues every prompt of a request `n` times. Raises ApiError for what can't be done."""
    service.check_model(body.model)
    request.state.log["user"] = body.user
    prompts, n, written = body.prompts(), body.num_choices, body.num_written
    with ExitStack() as held:
        admission = held.enter_context(service.admit(len(prompts) * written))
        requests, echoes = [], []
        for prompt in prompts:
            special = body.add_special_tokens is not False
            requests += await service.prepare(
                prompt, body, body.max_tokens, _MAX_TOKENS, num_choices=written, special=special
            )
            if isinstance(prompt, str) and body.truncate_prompt_tokens is None:
                given = prompt
            else:
                skip = body.skip_special_tokens is not False
                given = service.tokenizer.decode(requests[-1].prompt_ids, skip_special_tokens=skip)
            echoes += [given if body.echo else ""] * n
        with_top = bool(body.logprobs)
        logprobs = None if body.logprobs is None else LogprobOptions(body.logprobs, bool(body.echo))
        format = CompletionFormat(service.token_names(body.skip_special_tokens), echoes, with_top=with_top)
        plan = ReplyPlan(
            tuple(requests),
            len(prompts),
            n,
            format,
            logprobs,
            body.stream_options,
            body.prompt_logprobs,
            bool(body.return_token_ids),
        )
        return await reply(service, request, plan, bool(body.stream), admission, held)
