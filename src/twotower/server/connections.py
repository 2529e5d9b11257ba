"""Connections: as many as the process may have, and none for ever that sends nothing or takes nothing."""

import asyncio
import json
import logging
import os
import resource
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from twotower.server.errors import body

# As many open files as a server has use for; some systems have no limit, or one that no program can reach.
_MOST_FILES = 65536
# Files that connections leave to everything else: pages, checkpoints, pipes.
_RESERVE = 16
# Most seconds for a TLS handshake, during which a connection can't be closed for another.
_HANDSHAKE_SECONDS = 10.0
# When no more are taken, seconds for those that were taken just now.
_OPENING_SECONDS = 0.1
# At the limit, seconds until connections are taken again, for a refused client to go, and between two log lines.
_PAUSE_SECONDS, _LEAVE_SECONDS, _SILENT_SECONDS = 1.0, 1.0, 60.0
# When the server stops, seconds after an answer in which its connection may still bring a request, which is told so.
_LAST_REQUEST_SECONDS = 0.5
# A connection that was opened just now has its request on the way: only after so long does it make room for another.
_SETTLED_SECONDS = 0.5

# A body that comes at so many bytes a second may take as long as it does.
_LEAST_RATE = 4096

# What is waited for: the first bytes of a request, the rest of it, or the client's taking of its answer.
Awaited = Literal["nothing", "request", "answer"]

logger = logging.getLogger(__name__)


def raise_descriptor_limit() -> int:
    """Lets the process have as many open files, and so connections, as it may; returns how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return _MOST_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


class TimedConnection(H11Protocol):
    """uvicorn's connection, which is closed when its client is silent or takes nothing.

    uvicorn's own limit, `timeout_keep_alive`, which is `idle_seconds` here, holds only between an answer and the next
    byte. Here it also holds before the first request, and for a request from its first byte to its last, without the
    time that its body takes at `_LEAST_RATE`: a large one over a slow line is no silence, a byte now and then is. A
    client that waits for its answer is never closed, nor one that takes it slowly: only one that has taken none of the
    bytes that wait for it in `unread_seconds`. Either may last a quarter longer, for it is looked at four times.
    """

    def __init__(self, *, unread_seconds: float, **given: Any) -> None:
        super().__init__(**given)
        self._unread_seconds = unread_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so only for sockets that say they are TCP's: without, answers wait 40 ms for the client's system.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Bytes wait in the transport only while the client takes none. TLS would pause for ever at a limit of 0.
        transport.set_write_buffer_limits(high=1, low=0)
        self.since = self._taken = self.loop.time()
        self._awaited: Awaited = "nothing"
        self._unsent = 0
        self._is_ending = False
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note()
        if self._awaited == "request" and self.conn.their_state is h11.SEND_BODY:
            self.since = min(self.since + len(data) / _LEAST_RATE, self.loop.time())

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()
        if self._is_ending:
            self._end_soon()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taken = self.loop.time()
        self._note()

    def shutdown(self) -> None:
        """Closes the connection because the server stops, a moment after its last answer.

        A client that was not told that the connection ends sends its next request on it at once, which would be lost.
        """
        self._is_ending = True
        if self.cycle is None or self.cycle.response_complete:
            self._end_soon()

    def _end_soon(self) -> None:
        self.loop.call_later(_LAST_REQUEST_SECONDS, self._end)

    def _end(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    @property
    def awaited(self) -> Awaited:
        """What this connection is open for."""
        if self.transport.get_write_buffer_size():
            return "answer"
        if self.cycle is not None and not self.cycle.response_complete:
            return "request" if self.cycle.more_body else "answer"
        return "request" if self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY else "nothing"

    @property
    def is_silent(self) -> bool:
        """Whether the client lets the server wait."""
        return self.awaited != "answer" and not self.transport.is_closing()

    def close(self) -> None:
        """Closes the connection of a silent client; one that has sent half of a request is told why."""
        if self.awaited == "request" and not (self.cycle and self.cycle.response_started):
            self.transport.write(_plain(408, "the request took too long to arrive; send it again"))
        if self.cycle is not None:
            self.cycle.disconnected = True  # before the application answers what it could not read
        self.transport.close()

    def _note(self) -> None:
        if self.awaited != self._awaited:
            self._awaited, self.since = self.awaited, self.loop.time()

    def _look(self) -> None:
        now = self.loop.time()
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent:
            self._taken = now
        self._unsent = unsent
        if unsent and now - self._taken >= self._unread_seconds:
            self.transport.abort()
        elif self.is_silent and now - self.since >= self.timeout_keep_alive:
            self.close()
        self._timer = self.loop.call_later(min(self.timeout_keep_alive, self._unread_seconds) / 4, self._look)


def _plain(status: int, message: str, *headers: str) -> bytes:
    """An error without its request, of which nothing is known."""
    content = json.dumps(body(status, message)).encode()
    phrase = {408: "Request Timeout", 503: "Service Unavailable"}[status]
    lines = [f"HTTP/1.1 {status} {phrase}", "Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, *headers, "Connection: close", "", ""]).encode() + content


class Acceptor:
    """Takes connections for a server.

    asyncio's own loop tries two thousand times a second to take a connection where the limit of open files is reached,
    and logs each of them. Here the connection that has been silent for longest makes room for a new one, and where all
    wait for answers the new one is refused.
    """

    def __init__(self, server: uvicorn.Server, most_files: int) -> None:
        self._server = server
        used = len(os.listdir("/dev/fd"))
        self._most = max(most_files - used - min(_RESERVE, most_files // 4), 1)
        self._told = float("-inf")
        self._opening: set[asyncio.Task[None]] = set()

    def start(self, listening: Sequence[socket.socket]) -> None:
        """Begins to take connections from sockets, which it will close."""
        self._listening = listening
        self._running = [asyncio.create_task(self._take(one)) for one in listening]

    async def close(self) -> None:
        """Takes no more connections; those that are taken go on, unless they have not got through a handshake."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for one in self._listening:
            # The system has taken these already, and would reset them.
            with suppress(OSError):
                while True:
                    taken, _ = one.accept()
                    taken.setblocking(False)
                    self._opening.add(asyncio.create_task(self._open(taken)))
            one.close()
        if self._opening:
            await asyncio.wait(self._opening, timeout=_OPENING_SECONDS)
        for task in self._opening:
            task.cancel()

    async def _take(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                taken, _ = await loop.sock_accept(listening)
            except OSError as error:
                self._make_room()
                self._tell(str(error))
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            crowded = len(self._server.server_state.connections) + len(self._opening) >= self._most
            if crowded:
                self._tell("the limit of open files is near")
            task = asyncio.create_task(self._refuse(taken) if crowded and not self._make_room() else self._open(taken))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
            await asyncio.sleep(0)  # so that many that come at once hold up nothing

    async def _open(self, taken: socket.socket) -> None:
        config = self._server.config
        limits: dict[str, float] = {}
        if config.ssl:
            limits["ssl_handshake_timeout"] = min(_HANDSHAKE_SECONDS, config.timeout_keep_alive)
            limits["ssl_shutdown_timeout"] = config.timeout_keep_alive
        # what a client does during a handshake is not worth a line
        with suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, taken, ssl=config.ssl, **limits)

    def _protocol(self) -> asyncio.Protocol:
        server = self._server
        made: Any = server.config.http_protocol_class
        return made(config=server.config, server_state=server.server_state, app_state=server.lifespan.state)

    def _make_room(self) -> bool:
        """Closes the connection that has been silent for longest, if any is."""
        open_ones = [c for c in self._server.server_state.connections if isinstance(c, TimedConnection)]
        settled = asyncio.get_running_loop().time() - _SETTLED_SECONDS
        silent = [c for c in open_ones if c.is_silent and c.since <= settled]
        if silent:
            min(silent, key=lambda c: c.since).close()
        return bool(silent)

    async def _refuse(self, taken: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with taken, suppress(OSError, TimeoutError):
            if self._server.config.ssl is None:
                async with asyncio.timeout(_LEAVE_SECONDS):
                    answer = _plain(503, "the server has no room for another connection; try again", "Retry-After: 1")
                    await loop.sock_sendall(taken, answer)
                    taken.shutdown(socket.SHUT_WR)
                    # closed with something unread, the connection would be reset, and the answer lost
                    while await loop.sock_recv(taken, 4096):
                        pass

    def _tell(self, what: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told >= _SILENT_SECONDS:
            self._told = now
            message = (
                "%s: silent connections are closed to make room, and new ones refused where none is silent; "
                "raise the limit (ulimit -n)"
            )
            logger.warning(message, what)
