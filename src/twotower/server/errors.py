"""Turns every error into a response in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from twotower.decoding.params import SamplingParams
from twotower.engine.aio import EngineFailed, Overloaded
from twotower.errors import SettingError

logger = logging.getLogger(__name__)

# What a request sets: the library's names -> the protocol's. Other settings, such as state_bytes, are the server's own.
_NAMES = {field.name: field.name for field in dataclasses.fields(SamplingParams)}
_NAMES |= {"prompt": "prompt", "max_new_tokens": "max_tokens"}
# How long clients of a full server are told to wait; a request takes about a second.
_RETRY_SECONDS = "1"
# Most characters of a value that a message shows.
_SHOWN = 200


class ApiError(HTTPException):
    """An error response: HTTP status, message, the request's field that caused it (`param`), and OpenAI's `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object of a response or of an event in a stream."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install(app: FastAPI) -> None:
    """Installs a handler for every exception that a request can raise."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(SettingError, _setting)
    app.add_exception_handler(Overloaded, _full)
    app.add_exception_handler(EngineFailed, _failed)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(Exception, _defect)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    """Names the first invalid field; where it is a union, what the branch that leads furthest into it says."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    field = found[0]["loc"][1:2]
    places = [(_path(e, error.body), e) for e in found if e["loc"][1:2] == field]
    parts = max((parts for parts, _ in places), key=len)  # the first of the longest
    here = [e for other, e in places if other == parts]
    param, first = ".".join(map(str, parts)) or None, here[0]
    if param is None:
        message = "the body must be a JSON object, sent with the header Content-Type: application/json"
        return JSONResponse(body(400, message, code="invalid_json"), 400)
    if first["type"] == "extra_forbidden":
        message = f"{param} is not supported by this server; leave it out"
        return JSONResponse(body(400, message, param, "unsupported_parameter"), 400)
    if first["type"] in ("missing", "union_tag_not_found"):
        param += ".type" if first["type"] == "union_tag_not_found" else ""
        return JSONResponse(body(400, f"{param} is missing", param, "missing_required_parameter"), 400)
    rules = dict.fromkeys(map(_rule, here))
    message = f"{param} is {_shown(first['input'])}, must be {' or '.join(rules)}"
    return JSONResponse(body(400, message, param, "invalid_value"), 400)


def _path(error: Mapping[str, Any], sent: Any) -> tuple[int | str, ...]:
    """The place of an error in the body.

    pydantic adds the branches of a union to its places, which clients don't know: what doesn't lead further into the
    body that was sent is left out, unless it is what is missing there.
    """
    parts = []
    *way, last = error["loc"]
    for part in (*way[1:], last) if way else ():
        leads_on = part in sent if isinstance(sent, dict) else isinstance(sent, list) and part in range(len(sent))
        if leads_on:
            sent = sent[part]
        if leads_on or (error["type"] == "missing" and part is last):
            parts.append(part)
    return tuple(parts)


def _rule(error: Mapping[str, Any]) -> str:
    """What an error of pydantic says that a value must be, in words of JSON."""
    context = error.get("ctx", {})
    return {
        "string_type": "a text",
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "bool_type": "true or false",
        "list_type": "a list",
        "dict_type": "an object",
        "model_type": "an object",
        "model_attributes_type": "an object",
        "value_error": str(context.get("error", "")),
        "literal_error": "one of " + str(context.get("expected", "")).replace("'", '"').replace(" or ", ", "),
        "union_tag_invalid": "of type " + str(context.get("expected_tags", "")).replace("'", '"'),
        "too_short": f"a list of at least {context.get('min_length')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than_equal": f"at most {context.get('le')}",
    }.get(error["type"], error["msg"])


def _shown(value: object) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        response = body(error.status_code, error.detail, error.param, error.code)
    else:
        response = body(error.status_code, _no_route(request, error))
    return JSONResponse(response, error.status_code, error.headers)


def _no_route(request: Request, error: HTTPException) -> str:
    """What is wrong with a path or method that the application doesn't have. A client with a wrong base URL gets it."""
    path = request.url.path
    if error.status_code == 404:
        return f"there is nothing at {path}; base URLs of clients end in /v1, and /openapi.json has all paths"
    if error.status_code == 405:
        return f"{request.method} is not answered at {path}; OPTIONS says which methods are"
    return error.detail


async def _setting(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SettingError)
    name, bracket, place = error.name.partition("[")  # prompt[3] is an entry of prompt
    param = _NAMES.get(name)
    message = in_json((param or name) + bracket + place, error.value, error)
    return JSONResponse(body(400, message, param, "invalid_value"), 400)


def in_json(name: str, value: object, error: SettingError) -> str:
    """The message of an error in the words of JSON, which the client has written, instead of Python's."""
    message = f"{name} is {_shown(value)}, must be {_without_python(error.rule)}"
    return message + (f"; {_without_python(error.fix)}" if error.fix else "")


def _without_python(text: str) -> str:
    text = re.sub(r"'(\w*)'", r'"\1"', text.replace("leave it None", "leave it out"))
    for python, json_word in (("None", "null"), ("True", "true"), ("False", "false"), ("max_new_tokens", "max_tokens")):
        text = re.sub(rf"\b{python}\b", json_word, text)
    return text


async def _full(_: Request, error: Exception) -> JSONResponse:
    error_body = body(429, f"the server is full: {error}", code="rate_limit_exceeded")
    return JSONResponse(error_body, 429, {"Retry-After": _RETRY_SECONDS})


async def _failed(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(body(503, str(error), code="engine_failed"), 503)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the log does


async def _defect(_: Request, error: Exception) -> JSONResponse:
    logger.error("a request failed on a defect of the server", exc_info=error)
    return JSONResponse(body(500, "the server failed on this request", code="internal_error"), 500)
