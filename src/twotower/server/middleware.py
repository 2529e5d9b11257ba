"""Around every request: its log line, its key, and how large its body may be."""

import hmac
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.server.errors import ApiError, body
from twotower.server.metrics import Metrics
from twotower.server.tracing import record_span

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

# Without a key: whether the server is there, and the page's own files, which ask for the key themselves.
_OPEN_PATHS = ("/", "/health")
_OPEN_FOLDER = "/page/"
# How much more than its limit of a too large body is read, so that the client has sent it and reads the answer.
_DRAINED = 32


class RequestLog:
    """Gives each request an id, counts its response, and logs one line when it has been sent.

    Where there is a tracer, a span is made of each that asks for something.

    Handlers add what they know to `request.state.log`. Prompts and texts are never logged.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: "Tracer | None") -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        log: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = log
        status = 499  # the client left before its answer began
        began = time.perf_counter()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).append("X-Request-Id", request_id)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            route = scope.get("route")
            self._metrics.responses.labels(getattr(route, "path", "other"), status).inc()
            known = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            seconds = time.perf_counter() - began
            logger.info("request", extra={"fields": known | {"seconds": round(seconds, 4)} | log})
            if self._tracer is not None and scope["method"] == "POST":
                record_span(self._tracer, scope, known | log, seconds)


class ApiKeys:
    """Turns requests away that carry none of the keys as a bearer token."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]):
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            sent = given.strip().encode("latin-1")
            if scheme.lower() != "bearer" or not any(hmac.compare_digest(sent, key) for key in self._keys):
                message = "the request needs the header Authorization: Bearer KEY with a key of this server"
                response = JSONResponse(body(401, message, code="invalid_api_key"), 401, {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)


class BodyLimit:
    """Makes reading a body of more than `limit` bytes an ApiError, of which no more than `limit` are ever held."""

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
                raise ApiError(413, f"the body has more than {self._limit} bytes, the limit; send less at once")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)
