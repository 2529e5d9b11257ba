"""Errors as OpenAI's clients expect them."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse


class ApiError(Exception):
    """A request that can't be answered: an HTTP status, what was wrong, and the field at fault where it is one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        types = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = types.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def from_validation(error: ValidationError, unsupported: Sequence[str]) -> ApiError:
    """The first thing that is wrong with a body; `unsupported` are fields that OpenAI's API has and ours has not."""
    problems = error.errors(include_input=False, include_url=False, include_context=False)
    first = problems[0]
    if not first["loc"]:
        return ApiError(400, f"the body is not a JSON object that we can read: {first['msg']}", code="invalid_json")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        if len(first["loc"]) > 1:
            where = _path(first["loc"])
            return ApiError(400, f"{where} is not supported; leave it out", param=where, code="unsupported_parameter")
        if name in unsupported:
            message = f"{name} is not supported by this server; leave it out"
            return ApiError(400, message, param=name, code="unsupported_parameter")
        return ApiError(400, f"{name} is not a known parameter; leave it out", param=name, code="unknown_parameter")
    if first["type"] == "missing":
        where = _path(first["loc"])
        return ApiError(400, f"{where} is missing", param=where, code="missing_required_parameter")
    said = dict.fromkeys(p["msg"] for p in problems if p["loc"] and p["loc"][0] == name)
    return ApiError(400, f"{name}: {'; or: '.join(said)}", param=name, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """A place in the body as its author would write it; the names of our own union members are left out."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if _is_own(part)]
    return "".join(parts).removeprefix(".")


def _is_own(part: int | str) -> bool:
    return isinstance(part, int) or (part.islower() and part.isidentifier())
