"""Turns every error into a response in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import dataclasses
import logging
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
_NAMES |= {"prompt": "prompt", "max_new_tokens": "max_tokens", "json_schema": "response_format"}
# How long clients of a full server are told to wait; a request takes about a second.
_RETRY_SECONDS = "1"
# Pydantic adds these names to an error's location for the branches of a union; clients don't know them.
_BRANCHES = ("str", "int", "float", "bool")


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
    """Names the first invalid field; where it is a union, the message holds the errors of all branches."""
    assert isinstance(error, RequestValidationError)
    first, *others = error.errors()
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"{param} is not supported by this server; leave it out"
        return JSONResponse(body(400, message, param, "unsupported_parameter"), 400)
    if first["type"] == "missing":
        missing = "a body that is a JSON object, with content-type application/json," if param is None else param
        return JSONResponse(body(400, f"{missing} is missing", param, "missing_required_parameter"), 400)
    told = dict.fromkeys(e["msg"] for e in (first, *others) if _path(e["loc"]) == param)
    message = f"{param or 'the body'}: {' or '.join(told)}"
    return JSONResponse(body(400, message, param, "invalid_value"), 400)


def _path(loc: tuple[int | str, ...]) -> str | None:
    """The place of an error in the body, for example messages.0.content."""
    parts: list[str] = []
    for part in loc[1:]:
        if isinstance(part, str) and ("[" in part or part in _BRANCHES):
            break
        parts.append(str(part))
    return ".".join(parts) or None


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
    return JSONResponse(body(error.status_code, error.detail, param, code), error.status_code, error.headers)


async def _setting(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SettingError)
    name, bracket, place = error.name.partition("[")  # prompt[3] is an entry of prompt
    param = _NAMES.get(name)
    return JSONResponse(body(400, error.told((param or name) + bracket + place), param, "invalid_value"), 400)


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
