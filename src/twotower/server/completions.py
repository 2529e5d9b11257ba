"""POST /v1/completions."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from twotower.decoding.output import Generation, TokenScore
from twotower.server.logprobs import completion_logprobs
from twotower.server.protocol import CompletionRequest
from twotower.server.reply import LogprobOptions, ReplyPlan, reply
from twotower.server.service import Service
from twotower.server.token_names import TextOffsets, TokenNames

_Logprobs = dict[str, list[Any] | None]

# New tokens of a request that does not say how many: OpenAI's default.
_MAX_TOKENS = 16


class CompletionFormat:
    """Choices of /v1/completions; a `ReplyFormat`.

    `echoes` are the texts that each choice begins with, its prompt or ""; `num_choices` follow each other for each
    prompt. `with_top` says whether to show the likeliest tokens beside the chosen ones.
    """

    prefix, object, chunk_suffix = "cmpl", "text_completion", ""

    def __init__(self, names: TokenNames, echoes: Sequence[str], num_choices: int, *, with_top: bool) -> None:
        self._names = names
        self._echoes = echoes
        self._num_choices = num_choices
        self._with_top = with_top
        self._offsets: dict[int, TextOffsets] = {}
        self._echoed: dict[int, tuple[_Logprobs, TextOffsets]] = {}  # by prompt, with the offsets behind it

    def choice(
        self,
        index: int,
        result: Generation,
        logprobs: Sequence[TokenScore] | None,
        echoed: Sequence[TokenScore] | None,
    ) -> dict[str, Any]:
        assert result.text is not None
        before = self._begin(index, echoed)
        text = self._echoes[index] + result.text
        shown = self._logprobs(index, logprobs)
        if before is not None and shown is not None:
            shown = {key: None if own is None else (before[key] or []) + own for key, own in shown.items()}
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": result.finish_reason}

    def beginning(self, index: int, echoed: Sequence[TokenScore] | None) -> list[dict[str, Any]]:
        shown, text = self._begin(index, echoed), self._echoes[index]
        return [{"index": index, "text": text, "logprobs": shown, "finish_reason": None}] if text or shown else []

    def chunk(
        self, index: int, text: str, logprobs: Sequence[TokenScore] | None, more: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        shown = self._logprobs(index, logprobs)
        return [{"index": index, "text": text, "logprobs": shown, "finish_reason": None, **more}]

    def end(self, index: int, result: Generation) -> list[dict[str, Any]]:
        return [{"index": index, "text": "", "logprobs": None, "finish_reason": result.finish_reason}]

    def _begin(self, index: int, echoed: Sequence[TokenScore] | None) -> _Logprobs | None:
        """Begins to count characters behind the echo, and returns what to show of its tokens if their scores are given.

        All choices of a prompt share it: it is far larger than what is shown of a short text, and takes longer to make.
        """
        echo, prompt = self._echoes[index], index // self._num_choices
        if echoed is None:
            self._offsets[index] = TextOffsets(self._names, len(echo))
            return None
        if prompt not in self._echoed:
            offsets = TextOffsets(self._names, echo=echo)
            self._echoed[prompt] = completion_logprobs(self._names, echoed, offsets, with_top=self._with_top), offsets
        shown, behind = self._echoed[prompt]
        self._offsets[index] = behind.copy()
        return shown

    def _logprobs(self, index: int, tokens: Sequence[TokenScore] | None) -> _Logprobs | None:
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
        format = CompletionFormat(service.token_names(body.skip_special_tokens), echoes, n, with_top=with_top)
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
