"""Runs a server as a process: its socket answers while the model loads, and a signal lets running requests finish."""

import asyncio
import functools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from types import FrameType
from typing import Any, NamedTuple, Protocol, Self

import uvicorn
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.engine.aio import AsyncEngine, EngineFailed
from twotower.server.app import make_app
from twotower.server.config import ServerConfig
from twotower.server.connections import Acceptor, TimedConnection, raise_descriptor_limit
from twotower.server.errors import error_response
from twotower.signals import end_at_once, on_signals

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# How long clients are told to wait while the model loads.
_RETRY_SECONDS = "5"
# After --shutdown-seconds, until streams have sent why they end, and until the process ends whatever still runs.
_LAST_EVENTS_SECONDS, _LAST_THREADS_SECONDS = 2, 2

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """What writes the texts of an application: an engine, whose words these are, or others that have engines."""

    @property
    def is_running(self) -> bool: ...

    @property
    def failure(self) -> BaseException | None: ...

    @property
    def num_unfinished(self) -> int: ...

    def start(self) -> Self: ...

    def drain(self) -> None: ...

    def abandon(self) -> None: ...

    def close(self) -> None: ...


class Loaded(NamedTuple):
    """An application, what the log says of it when it answers, and its engine, which is not started yet."""

    app: Starlette
    fields: Mapping[str, Any]
    engine: Worker


def of_engine(engine: AsyncEngine, config: ServerConfig, template: ChatTemplate | None) -> Loaded:
    """The server's application on an engine. Raises ValueError for a model without a tokenizer."""
    app = make_app(engine, config, template)
    fields: dict[str, Any] = {"mode": config.default_mode, "max_context": app.service.max_context}
    fields["limited_by"] = app.service.limited_by
    for tower, backend in engine.model.backends.items():
        fields[tower.replace(" ", "_")] = f"{backend.name} ({backend.reason})"
    return Loaded(app, fields, engine)


class Entrance:
    """Answers 503 until `app` is set, which then answers everything, on the same connections."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _not_yet(scope["path"])(scope, receive, send)


def _not_yet(path: str) -> ASGIApp:
    headers = {"Retry-After": _RETRY_SECONDS}
    if path.endswith(("/health", "/ping")):
        return JSONResponse({"status": "loading"}, 503, headers)
    message = "the server is loading its model; try again later"
    return error_response(path, 503, message, code="loading", headers=headers)


class _Process(uvicorn.Server):
    """uvicorn's server with our signals, connections, loading and drain."""

    def __init__(self, load: Callable[[], Loaded], config: ServerConfig, listening: Sequence[socket.socket]) -> None:
        self._entrance = Entrance()
        super().__init__(uvicorn_settings(self._entrance, config))
        self._load = load
        self._settings = config
        self._listening = listening
        self._acceptor = Acceptor(self, raise_descriptor_limit())
        self._engine: Worker | None = None
        self._loading: asyncio.Task[None] | None = None
        self._watchdog: threading.Timer | None = None
        self._failed = False
        self._held = AsyncExitStack()

    def stop(self, number: int, _: FrameType | None) -> None:
        """Handles a signal: the first begins the drain, and the next, or one while the model loads, ends at once."""
        if self.should_exit or self._entrance.app is None:
            end_at_once(number)
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to `stop`, which handles them until the process ends."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._acceptor.start(self._listening)
        logger.info("loading", extra={"fields": {"url": self._url()}})
        self._loading = asyncio.create_task(self._open())
        self._loading.add_done_callback(self._opened)

    async def _open(self) -> None:
        app, fields, engine = await asyncio.to_thread(self._load)
        self._engine = engine.start()
        await self._held.enter_async_context(app.router.lifespan_context(app))
        self._entrance.app = app
        logger.info("serving", extra={"fields": {"url": self._url(), **fields}})

    def _opened(self, loading: asyncio.Task[None]) -> None:
        if not loading.cancelled() and loading.exception() is not None:
            self.should_exit = True

    def _url(self) -> str:
        host, port = self._listening[0].getsockname()[:2]
        return f"{'https' if self.config.is_ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    async def on_tick(self, counter: int) -> bool:
        if self._engine is not None and not self._engine.is_running and not self.should_exit:
            self._failed = self.should_exit = True
            logger.error("the engine has failed: the server stops, so that a supervisor can start it again")
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._acceptor.close()
        # of every answer that begins from now on
        self.server_state.default_headers.append((b"connection", b"close"))
        async with self._held:
            await (super().shutdown() if self._engine is None else self._drain(self._engine))

    async def _drain(self, engine: Worker) -> None:
        most = self._settings.shutdown_seconds
        logger.info("stopping", extra={"fields": {"unfinished": engine.num_unfinished, "most_seconds": most}})
        # a round of the engine, or a thread that reads a long prompt, may be stuck
        self._watchdog = threading.Timer(most + _LAST_EVENTS_SECONDS + _LAST_THREADS_SECONDS, os._exit, (1,))
        self._watchdog.daemon = True
        self._watchdog.start()
        engine.drain()
        ending = asyncio.get_running_loop().call_later(most, engine.abandon)
        await super().shutdown()
        ending.cancel()

    def end(self) -> None:
        """Frees what the server had, when it has stopped. Raises what stopped it, if that was no signal."""
        try:
            if self._engine is not None:
                self._engine.close()
        finally:
            if self._watchdog is not None:
                self._watchdog.cancel()
        if self._loading is not None and self._loading.done():
            self._loading.result()
        if self._failed:
            cause = None if self._engine is None else self._engine.failure
            raise EngineFailed("the engine has failed, and the server has stopped") from cause


def run(load: Callable[[], Loaded], config: ServerConfig, listening: Sequence[socket.socket]) -> None:
    """Serves what `load` returns on sockets that listen, and answers 503 while it runs; raises what it raises,
    and EngineFailed when the engine has failed for good.

    SIGINT, SIGTERM and SIGHUP end the server when the running requests have finished, for which it waits for
    `shutdown_seconds` at most; a second signal ends the process at once, and so does one while `load` runs.
    """
    if config.host not in _LOOPBACK and not config.api_keys:
        message = "%s is reachable from other machines and there is no API key: anyone may use this server"
        logger.warning(message, config.host)
    server = _Process(load, config, listening)
    with on_signals(server.stop):
        try:
            server.run()
        finally:
            server.end()


def uvicorn_settings(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn runs the application."""
    connection: Any = functools.partial(TimedConnection, unread_seconds=config.unread_seconds)
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        # Where httptools is installed, uvicorn would take that, which loses the body of a request that offers HTTP/2,
        # as every one of Java's HttpClient does. This is made of h11.
        http=connection,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        log_config=None,
        access_log=False,
        timeout_keep_alive=config.idle_seconds,
        # the engine ends what is left at shutdown_seconds, and then streams say so
        timeout_graceful_shutdown=config.shutdown_seconds + _LAST_EVENTS_SECONDS,
    )
