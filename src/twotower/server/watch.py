"""POST /twotower/watch: one text as a stream with an event for every step, which the page draws."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from typing import Any, Literal, get_args, get_origin

from fastapi import Request
from fastapi.responses import Response

from twotower.decoding.modes import AUTO_SUMMARY, MODES, DecodingMode
from twotower.decoding.output import BlockView, Generation, StepOutput, Token
from twotower.decoding.params import DEFAULT_THRESHOLD, SamplingParams
from twotower.options import is_tuple, options_of, value_type
from twotower.server.chat import render
from twotower.server.errors import ApiError
from twotower.server.protocol import WatchRequest
from twotower.server.reply import Counts
from twotower.server.service import Service
from twotower.server.streaming import EventStream, openai_events

# New tokens of a request that does not say how many; fewer if the context has room for fewer.
_MAX_TOKENS = 128


def about(service: Service) -> dict[str, Any]:
    """What the page needs to know before it asks for texts. `most_target_retention` is None where none may be asked."""
    model, config = service.engine.model, service.config
    return {
        "model": service.model_name,
        "modes": [*map(_mode, MODES.values()), {"name": "auto", "summary": AUTO_SUMMARY, "fills_blocks": False}],
        "default_mode": config.default_mode,
        "default_drafter": config.default_drafter or model.sampling.drafter or "denoiser",
        "most_target_retention": None if model.calibration is None else model.calibration.most or None,
        "block_size": model.config.block_size,
        "max_context": service.max_context,
        "has_chat_template": service.template is not None,
        "settings": list(_settings(service)),
    }


def _mode(mode: DecodingMode) -> dict[str, Any]:
    return {"name": mode.name, "summary": mode.summary, "fills_blocks": mode.fills_blocks}


def _settings(service: Service) -> Iterator[dict[str, Any]]:
    """The settings that a request may have beside its mode: name, kind, default, range and choices, and help."""
    model, target = service.engine.model, service.config.target_retention
    calibrated = {} if model.calibration is None else {"target_retention": model.calibration.most}
    unsaid = {
        "temperature": 1.0,
        "block_size": model.config.block_size,
        "confidence_threshold": DEFAULT_THRESHOLD if target is None else None,
        "target_retention": target,
    }
    for name, (field, what) in options_of(SamplingParams).items():
        kind = value_type(field.type)
        is_choice = get_origin(kind) is Literal
        # The protocol has its own name for the length.
        spelled = "max_tokens" if name == "max_new_tokens" else name
        is_single = not is_tuple(field.type) and (is_choice or kind in (bool, int, float))
        if name == "mode" or not is_single or what.parse is not None or spelled not in WatchRequest.model_fields:
            continue
        own = getattr(model.sampling, name, None)
        yield {
            "name": spelled,
            "kind": "choice" if is_choice else kind.__name__,
            "choices": get_args(kind),
            "default": unsaid.get(name, field.default) if own is None else own,
            "least": what.least if what.above is None else what.above,
            "most": calibrated.get(name, what.most if what.below is None else what.below),
            "help": what.help,
        }


async def watch(service: Service, body: WatchRequest, request: Request) -> Response:
    """Streams the steps of one text. Raises ApiError for what can't be done."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either a prompt or messages", param="prompt", code="invalid_value")
    with ExitStack() as held:
        admission = held.enter_context(service.admit(1))
        if body.messages is None:
            [prepared] = await service.prepare(body.prompt or "", body, body.max_tokens, _MAX_TOKENS)
        else:
            prompt = render(service, body.messages, body)
            [prepared] = await service.prepare(prompt, body, body.max_tokens, special=False)
        log = request.state.log
        log |= {"mode": prepared.params.mode, "prompt_tokens": len(prepared.prompt_ids)}
        began = time.perf_counter()
        run = service.run([prepared], admission, log, watch=True)
        return EventStream(_steps(service, run, len(prepared.prompt_ids), began), held.pop_all(), openai_events)


async def _steps(
    service: Service,
    run: AbstractAsyncContextManager[AsyncIterator[tuple[int, StepOutput]]],
    num_prompt: int,
    began: float,
) -> AsyncGenerator[dict[str, Any], None]:
    """An event per step: seconds since `began`, the text that it made certain, the tokens that it committed, and the
    block if it is unfinished."""
    async with run as outputs:
        async for _, output in outputs:
            step: dict[str, Any] = {
                "seconds": round(time.perf_counter() - began, 4),
                "text": output.text,
                "tokens": _tokens(service, output.tokens),
                # a finished block is in `tokens`
                "block": None if output.tokens or output.block is None else _block(service, output.block),
            }
            if output.result is not None:
                step["result"] = {"prompt_tokens": num_prompt} | _result(output.result)
            yield step


def _tokens(service: Service, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [{"text": service.names.text(t.id), "step": t.step, "confidence": round(t.confidence, 4)} for t in tokens]


def _block(service: Service, block: BlockView) -> dict[str, Any]:
    """The token at each place with the probability that it had when it was committed; None where it is masked."""
    mask = service.engine.model.config.mask_token_id
    places = [
        None if i == mask else {"text": service.names.text(i), "confidence": round(c, 4)}
        for i, c in zip(block.ids, block.confidences, strict=True)
    ]
    return {"step": block.step, "places": places}


def _result(result: Generation) -> dict[str, Any]:
    stats = result.stats
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "num_tokens": stats.num_tokens,
        **Counts.of(result).calls,
        "seconds_to_first_token": round(stats.seconds_to_first_token, 4),
        "seconds_total": round(stats.seconds_total, 4),
    }
