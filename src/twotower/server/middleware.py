"""Middleware around every request: its log line, the check of its API key, the limit of its body's size."""

import hmac
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.server.errors import ApiError, error_response
from twotower.server.logs import cut_fields
from twotower.server.tracing import record_span

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer
    from prometheus_client import Counter

logger = logging.getLogger(__name__)

# Open to all, even where keys are set: the health checks, and the files of the pages, which ask their user for the key.
OPEN_PATHS = frozenset(("/", "/watch", "/health", "/ping"))
_OPEN_FOLDER = "/page/"
# Read up to 32 times the limit of a too large body, so that the client finishes sending and reads the 413.
_DRAINED = 32


class RequestLog:
    """Gives each request an id, counts its response in `responses`, and logs one line when the response has been sent.

    The id is `request.state.request_id`. One that is there already has been given, and told to the client, by what
    stands in front.

    Each POST also becomes a span if there is a tracer. Handlers add fields to the line through `request.state.log`.
    Prompts and texts are never logged.
    """

    def __init__(self, app: ASGIApp, responses: "Counter", tracer: "Tracer | None") -> None:
        self._app = app
        self._responses = responses
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        is_own = "request_id" not in state
        request_id = state.setdefault("request_id", secrets.token_hex(8))
        log: dict[str, Any] = {}
        state["log"] = log
        status = 499  # stays if the client leaves before the response begins
        began = time.perf_counter()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if is_own:
                    MutableHeaders(scope=message).append("X-Request-Id", request_id)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            route = scope.get("route")
            self._responses.labels(getattr(route, "path", "other"), status).inc()
            known = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            seconds = time.perf_counter() - began
            logger.info("request", extra={"fields": known | {"seconds": round(seconds, 4)} | log})
            if self._tracer is not None and scope["method"] == "POST":
                record_span(self._tracer, scope, cut_fields(known | log), seconds)


class RootPath:
    """Says at which path a proxy shows the application, and puts it before paths that the proxy has taken it from, for
    ASGI's paths have it."""

    def __init__(self, app: ASGIApp, root: str) -> None:
        self._app = app
        self._root = root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            root = scope["root_path"] = self._root
            if scope["path"] != root and not scope["path"].startswith(f"{root}/"):
                scope["path"] = root + scope["path"]
        await self._app(scope, receive, send)


class ApiKeys:
    """Answers 401 to requests that have none of the keys as a bearer token or, as Anthropic's clients, in x-api-key."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"].removeprefix(scope.get("root_path", "")) or "/"):
            headers = Headers(scope=scope)
            scheme, _, given = headers.get("authorization", "").partition(" ")
            sent = [headers.get("x-api-key", ""), given.strip() if scheme.lower() == "bearer" else ""]
            if not any(hmac.compare_digest(one.encode("latin-1"), key) for one in sent for key in self._keys):
                message = "the request needs the header Authorization: Bearer KEY with a key of this server"
                told = {"WWW-Authenticate": "Bearer"}
                response = error_response(scope["path"], 401, message, code="invalid_api_key", headers=told)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(_OPEN_FOLDER)


class HeadAndOptions:
    """Answers HEAD as GET without the body, and OPTIONS with the methods that a path has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"] if scope["type"] == "http" else ""
        if method == "OPTIONS" and (allowed := _methods(scope)):
            headers = {"Allow": ", ".join(sorted(allowed | {"OPTIONS"}))}
            await Response(status_code=204, headers=headers)(scope, receive, send)
        elif method == "HEAD":
            # The scope is shared with the log, which says HEAD.
            inner = {**scope, "method": "GET"}
            await self._app(inner, receive, _without_body(send))
            scope["route"] = inner.get("route")
        else:
            await self._app(scope, receive, send)


def _methods(scope: Scope) -> set[str]:
    """The methods that the routes of a path answer, none where there is no route."""
    found: set[str] = set()
    for route in scope["app"].routes:
        if route.matches(scope)[0] != Match.NONE:
            methods = getattr(route, "methods", None) or {"GET"}
            found |= methods | ({"HEAD"} if "GET" in methods else set())
    return found


def _without_body(send: Send) -> Send:
    async def headers_only(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return headers_only


class BodyLimit:
    """Raises ApiError 413 while a body of more than `limit` bytes is read; no more than `limit` bytes are held."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                while message.get("more_body") and size <= _DRAINED * self._limit:
                    message = await receive()
                    size += len(message.get("body", b""))
                raise ApiError(413, f"the body has more than {self._limit} bytes, the limit; send a smaller request")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)
