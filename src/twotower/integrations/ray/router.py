"""The application in front of replicas: it chooses one for each request, tries another where that fails, and relays.

A replica is a whole server, and what it answers reaches the client as it is.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from yarl import URL

from twotower.engine.aio import Overloaded
from twotower.integrations.ray.choice import Fleet, Member, affinity
from twotower.integrations.ray.exposition import with_replicas
from twotower.integrations.ray.trust import IDLE_SECONDS, REQUEST_ID, SECRET
from twotower.server.app import METRICS_TYPE, add_layers
from twotower.server.config import ServerConfig
from twotower.server.errors import anthropic_body, body, error_response, install, is_anthropic
from twotower.server.streaming import unless_gone

logger = logging.getLogger(__name__)

# Headers that belong to one connection, or that each side writes itself.
_OWN_HEADERS = frozenset(
    "connection keep-alive proxy-authenticate proxy-connection te trailer transfer-encoding upgrade expect "
    f"date server {SECRET} {REQUEST_ID}".encode().split()
)
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# A request may be what its replica died of: it doesn't get a third.
_MAX_LOST = 2
# How many replicas that say they are full a request asks. Usually the router knows before.
_MAX_FULL = 3
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_CONNECT = 5.0
# Less than Prometheus waits by default, 10: a replica that hangs costs its own metrics, not the others'
_SECONDS_FOR_METRICS = 5.0
# Less than the seconds after which a replica closes a connection, so that none is used just then
_SECONDS_KEPT_ALIVE = IDLE_SECONDS / 2
# What clients are told whose requests end early
_LOST_CODE = "replica_failed"
_STOPPED, _STOPPED_CODE = "the server is shutting down and did not finish this request", "shutting_down"

# Finds the replicas; None where that fails, and those known before are kept
Look = Callable[[], Awaitable[list[Member] | None]]


class Relay:
    """Sends requests to the replicas of a fleet and gives back what they answer."""

    def __init__(self, fleet: Fleet, secret: str) -> None:
        self.fleet = fleet
        self._secret = secret
        self._session: aiohttp.ClientSession | None = None
        self._streams: set[aiohttp.ClientResponse] = set()
        self._is_abandoned = False
        self._abandoning: asyncio.Task[None] | None = None
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "twotower_router_responses", "HTTP responses.", ("path", "status"), registry=self.registry
        )
        self._tries = Counter(
            "twotower_router_tries",
            "Requests sent to a replica, by what came of it.",
            ("replica", "outcome"),
            registry=self.registry,
        )
        known = Gauge("twotower_router_replicas", "Replicas that answer.", registry=self.registry)
        known.set_function(lambda: len(fleet.members))

    async def open(self) -> None:
        """Opens the connections' pool in the loop that runs."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_SECONDS_KEPT_ALIVE),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_SECONDS_TO_CONNECT),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def close(self) -> None:
        """Closes the connections."""
        assert self._session is not None, "open comes first"
        await self._session.close()

    def abandon(self) -> None:
        """Ends all requests, streams with an error event and others with 503. Called in the loop that runs."""
        self._is_abandoned = True
        assert self._session is not None, "open comes first"
        for reply in self._streams:
            reply.close()
        self._abandoning = asyncio.create_task(self._session.close())

    async def answer(self, request: Request, sent: bytes) -> Response:
        """The answer of the first replica that gives one to a request with that body.

        A replica that is gone, or that goes before its answer has begun, is forgotten and another one tried; one that
        is full is asked only once. Raises Overloaded if all are full.
        """
        key = affinity(request.headers, sent) if request.method == "POST" else None
        order = self.fleet.order(key)
        if not order and self.fleet.members:
            raise Overloaded(
                f"all {len(self.fleet.members)} replicas have as many requests as they take; try again later"
            )
        lost, refused = 0, []
        for member in order:
            if self._is_abandoned:
                break
            try:
                response = await self._try(request, sent, member)
            except aiohttp.ClientError as error:
                if self._is_abandoned:  # which has closed the connection
                    break
                self._lose(member, error)
                lost += not isinstance(error, aiohttp.ClientConnectorError)
                if lost == _MAX_LOST:
                    break
                continue
            if response.status_code not in (429, 503):
                return response
            refused.append(response)
            if len(refused) == _MAX_FULL:
                break
        if refused:
            return refused[0]
        failure = f"{lost} replicas ended while they had this request" if lost else "no replica is ready yet"
        message, code = (_STOPPED, _STOPPED_CODE) if self._is_abandoned else (f"{failure}; try again", _LOST_CODE)
        return error_response(request.url.path, 503, message, code=code, headers={"Retry-After": "1"})

    async def _try(self, request: Request, sent: bytes, member: Member) -> Response:
        """A replica's answer, whole or as a stream that has begun. Raises aiohttp.ClientError if it doesn't come."""
        async with contextlib.AsyncExitStack() as held:
            held.enter_context(self.fleet.carry(member))
            reply = await held.enter_async_context(self._send(request, sent, member))
            request.state.log |= {"replica": member.name, "tries": request.state.log.get("tries", 0) + 1}
            headers = [(name.lower(), value) for name, value in reply.raw_headers if name.lower() not in _OWN_HEADERS]
            response: Response
            if reply.content_type == "text/event-stream":
                events = self._events(request.url.path, member, reply)
                first = await anext(events, b"")
                response = _Relayed(first, events, held.pop_all())
            else:
                response = Response(await reply.read())
            self._tries.labels(member.name, "refused" if reply.status in (429, 503) else "answered").inc()
            response.status_code, response.raw_headers = reply.status, headers
            return response

    def _send(
        self, request: Request, sent: bytes, member: Member
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        assert self._session is not None, "open comes first"
        given = [(n, v) for n, v in request.headers.raw if n not in _OWN_HEADERS and n != b"content-length"]
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in given]
        headers += [(SECRET, self._secret), (REQUEST_ID, request.state.request_id)]
        path, query = request.scope["raw_path"].decode("latin-1"), request.scope["query_string"].decode("latin-1")
        url = URL(member.url + path + (f"?{query}" if query else ""), encoded=True)
        return self._session.request(request.method, url, headers=headers, data=sent or None, allow_redirects=False)

    async def _events(self, path: str, member: Member, reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The events of a stream, several at once where they come so, each whole.

        Where the replica ends in the middle the last one is an error. Raises aiohttp.ClientError if there is no first.
        """
        rest, began = b"", False
        self._streams.add(reply)
        try:
            async for chunk in reply.content.iter_any():
                whole, mark, rest = (rest + chunk).rpartition(b"\n\n")
                if mark:
                    began = True
                    yield whole + mark
        except aiohttp.ClientError as error:
            if not began:
                raise
            if self._is_abandoned:
                yield _cut(path, _STOPPED, _STOPPED_CODE)
                return
            self._lose(member, error)
            yield _cut(path, "the replica that wrote this ended; send the request again", _LOST_CODE)
        finally:
            self._streams.discard(reply)

    def _lose(self, member: Member, error: Exception) -> None:
        self._tries.labels(member.name, "lost").inc()
        logger.warning("a replica is gone", extra={"fields": {"replica": member.name, "why": repr(error)}})
        self.fleet.lose(member)

    async def metrics(self, request: Request) -> bytes:
        """The metrics of all replicas, each sample with its replica as a label, and this router's own."""

        async def read(member: Member) -> tuple[str, str]:
            async with asyncio.timeout(_SECONDS_FOR_METRICS), self._send(request, b"", member) as reply:
                return member.name, await reply.text()

        read_all = await asyncio.gather(*map(read, self.fleet.members), return_exceptions=True)
        texts = dict(one for one in read_all if not isinstance(one, BaseException))
        return await asyncio.to_thread(with_replicas, texts, self.registry)


class _Relayed(StreamingResponse):
    """A stream of which `first` has come. What is `held` is let go when it ends, also if it is never sent."""

    def __init__(self, first: bytes, rest: AsyncIterator[bytes], held: contextlib.AsyncExitStack) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield first
            async for chunk in rest:
                yield chunk

        super().__init__(chunks())
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


def _cut(path: str, message: str, code: str) -> bytes:
    """The event that ends a stream which can't go on, as the path's protocol has it."""
    if is_anthropic(path):
        made, name = anthropic_body(503, message, code), "event: error\n"
    elif path.endswith("/v1/responses"):
        # with the `error` on which OpenAI's client raises
        told = {"type": "error", "code": code, "message": message, "param": None}
        made, name = told | body(503, message, code=code), "event: error\n"
    else:
        made, name = body(503, message, code=code), ""
    return f"{name}data: {json.dumps(made)}\n\n".encode()


def make_router(relay: Relay, config: ServerConfig, look: Look) -> Starlette:
    """The application in front of the replicas that `look` finds, which it does every second.

    It answers `/health`, `/ping` and `/metrics` for all of them. Keys, limits of bodies, a root path and origins are
    checked here, and so needn't be by the replicas.
    """
    fleet = relay.fleet

    async def watch() -> None:
        while True:
            found = await look()
            if found is not None:
                fleet.update(found)
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await relay.open()
        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            await relay.close()

    async def health(_: Request) -> Response:
        ready = bool(fleet.members)
        return JSONResponse({"status": "ready" if ready else "stopped"}, 200 if ready else 503)

    async def metrics(request: Request) -> Response:
        return Response(await relay.metrics(request), media_type=METRICS_TYPE)

    async def forward(request: Request) -> Response:
        return await unless_gone(request, relay.answer(request, await request.body()))

    routes = [Route("/health", health), Route("/ping", health), Route("/metrics", metrics)]
    app = Starlette(routes=[*routes, Route("/{path:path}", forward, methods=_METHODS)], lifespan=lifespan)
    install(app)
    add_layers(app, config, relay.responses, tracer=None)
    return app
