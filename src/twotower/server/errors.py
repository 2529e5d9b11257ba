"""Turns every error into a response in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

Where the path is one of Anthropic's protocol, it is in Anthropic's: {"type": "error", "error": {"type", "message"}}.
"""

import asyncio
import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.decoding.params import SamplingParams
from twotower.engine.aio import Draining, EngineFailed, Overloaded, RequestFailed
from twotower.errors import SettingError
from twotower.server.logs import cut

logger = logging.getLogger(__name__)

# What a request sets: the library's names -> the protocol's. Other settings, such as state_bytes, are the server's own.
_NAMES = {field.name: field.name for field in dataclasses.fields(SamplingParams)}
_NAMES |= {"prompt": "prompt", "max_new_tokens": "max_tokens"}
# How long clients of a full server, or of one that stops, are told to wait; a request takes about a second.
_RETRY_SECONDS = "1"
# What requests of Anthropic's protocol have in their path, and its names of errors.
_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
# Where the protocol of a path has other names for fields of chats, as regular expressions.
_OTHER_NAMES = {
    "/v1/responses": (
        ("max_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
        ("messages", "input"),
        (r"(tools\.\d+)\.function\.parameters", r"\1.parameters"),
    ),
    _ANTHROPIC_PATH: (
        ("response_format", "output_config.format"),
        (r"(tools\.\d+)\.function\.parameters", r"\1.input_schema"),
    ),
}
# Most characters of a value that a message shows, of a message, which may name what a client has sent, and of a param.
_SHOWN, _MESSAGE, _PARAM = 200, 2000, 200


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
    param = None if param is None else cut(param, _PARAM)
    return {"error": {"message": cut(message, _MESSAGE), "type": kind, "param": param, "code": code}}


def anthropic_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The error object of a response of Anthropic's protocol, or of an event in a stream."""
    kind = _ANTHROPIC_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    if code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # by these words clients know it
    details = {} if code is None else {"details": {"error_code": code}}
    return {"type": "error", "error": {"type": kind, "message": cut(message, _MESSAGE), **details}}


# What ends a task in order, or the process. Everything else is a failure, panics of Rust code among it, which are no
# Exception.
ENDINGS = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)


class Failure(NamedTuple):
    """Why a request that was right got no answer, or only a part of one."""

    status: int
    message: str
    code: str
    headers: dict[str, str]


def failure_of(error: BaseException, log: dict[str, Any]) -> Failure:
    """What to tell a client whose request ended on an exception, which is noted in the request's line of log.

    What no one expected goes to the log with its traceback; that of a RequestFailed is there already.
    """
    log["error"] = f"{type(error).__name__}: {error}"
    if isinstance(error, Draining):
        return Failure(503, str(error), "shutting_down", {"Retry-After": _RETRY_SECONDS, "Connection": "close"})
    if isinstance(error, EngineFailed):
        return Failure(503, str(error), "engine_failed", {"Retry-After": _RETRY_SECONDS})
    if isinstance(error, RequestFailed):
        kind = type(error.__cause__).__name__
        return Failure(500, f"the server failed on this request ({kind}); try again", "internal_error", {})
    logger.error("a request failed on a defect of the server", exc_info=error)
    return Failure(500, "the server failed on this request", "internal_error", {})


def is_anthropic(path: str) -> bool:
    """Whether a path is one of Anthropic's protocol."""
    return _ANTHROPIC_PATH in path


def error_response(
    path: str,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error of a request to `path`."""
    names = next((names for part, names in _OTHER_NAMES.items() if part in path), ())
    for name, other in names:
        # what was refused by its name has that name
        if re.fullmatch(name, param or "") and code != "unsupported_parameter":
            message, param = re.sub(rf"\b{name}\b", other, message, count=1), re.sub(name, other, param or "")
            break
    made = anthropic_body(status, message, code) if is_anthropic(path) else body(status, message, param, code)
    return JSONResponse(made, status, headers)


def install(app: Starlette) -> None:
    """Installs a handler for every exception that a request can raise."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(SettingError, _setting)
    app.add_exception_handler(Overloaded, _full)
    for kind in (Draining, EngineFailed, RequestFailed):
        app.add_exception_handler(kind, _ended)
    app.add_exception_handler(ClientGone, _gone)
    app.add_middleware(_Defects)


class _Defects:
    """Answers 500 where an exception that has no handler strikes before the response has begun, and 503 where the
    server stops before it has.

    A handler of Exception would stand around all other layers, so that the request's line of log had no status.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:  # only a server that stops cancels a request, here one outside the engine
            if not begun and scope["type"] == "http":
                late = Draining("the server is shutting down and did not finish this request")
                await _failed(Request(scope, receive), late)(scope, receive, send)
            raise
        except ENDINGS:
            raise
        except BaseException as error:  # of any kind: the client must be answered
            if begun or scope["type"] != "http":
                raise
            await _failed(Request(scope, receive), error)(scope, receive, send)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Names the first invalid field; where it is a union, what the branch that leads furthest into it says."""
    assert isinstance(error, RequestValidationError)
    found, path = error.errors(), request.url.path
    field = found[0]["loc"][1:2]
    places = [(_path(e, error.body), e) for e in found if e["loc"][1:2] == field]
    # the first of the longest, but a wrong type explains what else is wrong with an object
    parts = max((parts for parts, _ in places), key=lambda parts: (len(parts), parts[-1:] == ("type",)))
    here = [e for other, e in places if other == parts]
    # an empty name can be sent, too
    param, first = ".".join(map(str, parts)) or '""', here[0]
    if not parts:
        message = "the body must be a JSON object, sent with the header Content-Type: application/json"
        return error_response(path, 400, message, code="invalid_json")
    if first["type"] == "extra_forbidden":
        message = f"{param} is not supported by this server; leave it out"
        return error_response(path, 400, message, param=param, code="unsupported_parameter")
    if first["type"] in ("missing", "union_tag_not_found"):
        param += ".type" if first["type"] == "union_tag_not_found" else ""
        return error_response(path, 400, f"{param} is missing", param=param, code="missing_required_parameter")
    rules = dict.fromkeys(map(_rule, here))
    message = f"{param} is {_shown(first['input'])}, must be {' or '.join(rules)}"
    return error_response(path, 400, message, param=param, code="invalid_value")


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
        "string_too_short": f"a text of at least {context.get('min_length')} character",
        "string_too_long": f"a text of at most {context.get('max_length')} characters",
        "too_short": f"a list of at least {context.get('min_length')}",
        "too_long": f"a list of at most {context.get('max_length')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than_equal": f"at most {context.get('le')}",
    }.get(error["type"], error["msg"])


def _shown(value: object) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
    message = error.detail if isinstance(error, ApiError) else _no_route(request, error)
    return error_response(request.url.path, error.status_code, message, param=param, code=code, headers=error.headers)


def _no_route(request: Request, error: HTTPException) -> str:
    """What is wrong with a path or method that the application doesn't have. A client with a wrong base URL gets it."""
    path = request.url.path
    if error.status_code == 404:
        bases = "base URLs end in /v1, for Anthropic's clients before it"
        return f"there is nothing at {path}; {bases}, and /openapi.json has all paths"
    if error.status_code == 405:
        return f"{request.method} is not answered at {path}; OPTIONS says which methods are"
    return error.detail


async def _setting(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SettingError)
    name, bracket, place = error.name.partition("[")  # prompt[3] is an entry of prompt
    param = _NAMES.get(name)
    message = in_json((param or name) + bracket + place, error.value, error)
    return error_response(request.url.path, 400, message, param=param, code="invalid_value")


def in_json(name: str, value: object, error: SettingError) -> str:
    """The message of an error in the words of JSON, which the client has written, instead of Python's."""
    message = f"{name} is {_shown(value)}, must be {_without_python(error.rule)}"
    # some fixes are lines of Python
    return message + (f"; {_without_python(error.fix)}" if error.fix and not error.fix.startswith("write ") else "")


def _without_python(text: str) -> str:
    text = re.sub(r"'(\w*)'", r'"\1"', text.replace("leave it None", "leave it out"))
    for python, json_word in (("None", "null"), ("True", "true"), ("False", "false"), ("max_new_tokens", "max_tokens")):
        text = re.sub(rf"\b{python}\b", json_word, text)
    return text


async def _full(request: Request, error: Exception) -> JSONResponse:
    message, told = f"the server is full: {error}", {"Retry-After": _RETRY_SECONDS}
    return error_response(request.url.path, 429, message, code="rate_limit_exceeded", headers=told)


async def _ended(request: Request, error: Exception) -> JSONResponse:
    return _failed(request, error)


def _failed(request: Request, error: BaseException) -> JSONResponse:
    status, message, code, headers = failure_of(error, request.state.log)
    return error_response(request.url.path, status, message, code=code, headers=headers)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the log does
