"""POST /tokenize and POST /detokenize, with vLLM's bodies."""

from typing import Any

from twotower.server.chat import render
from twotower.server.errors import ApiError
from twotower.server.protocol import DetokenizeRequest, TokenizeRequest
from twotower.server.service import Service


async def tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    """The token ids that a prompt or messages have for the model, and with `return_token_strs` their names in the
    vocabulary. Raises ApiError for what can't be read."""
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either a prompt or messages", param="prompt", code="invalid_value")
    # Templates write the control tokens themselves.
    special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    text = (body.prompt or "") if body.messages is None else render(service, body.messages, body)
    ids = await service.tokens(text, special=special)
    names = [service.tokenizer.id_to_token(i) for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.max_context, "tokens": ids, "token_strs": names}


def detokenize(service: Service, body: DetokenizeRequest) -> dict[str, str]:
    """The text of token ids, with the names of control tokens. Raises ApiError for an id that is none."""
    service.check_model(body.model)
    last = service.engine.model.config.vocab_size - 1
    wrong = next(((place, i) for place, i in enumerate(body.tokens) if not 0 <= i <= last), None)
    if wrong is not None:
        message = f"tokens[{wrong[0]}] is {wrong[1]}, must be a token id in [0, {last}]"
        raise ApiError(400, message, param="tokens", code="invalid_value")
    return {"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)}
