"""Responses that take long: streams of server-sent events, and work that is cancelled when its client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from twotower.server.errors import ENDINGS, ClientGone, Failure, body, failure_of

T = TypeVar("T")


class EventStream(StreamingResponse):
    """Sends each object as a server-sent event.

    An exception before the first event is raised, so that the response is an error, and the headers wait for that
    event: who waits in vain gets a status that says so. After it the last events are those that `failed` makes of an
    exception. The context manager `held` is exited when the response ends, also if the stream never began. `done` is
    the text of one more event after the last object. With `named` each event has its object's `type` for a name.
    """

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        held: AbstractContextManager[object],
        failed: Callable[[Failure], Sequence[dict[str, Any]]],
        *,
        done: str | None = None,
        named: bool = False,
    ) -> None:
        self._events = events
        self._held = held
        self._failed = failed
        self._done = done
        self._named = named
        self._log: dict[str, Any] = {}
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__((), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._log = scope["state"]["log"]
        with self._held:
            # Close the generator now and not when it is garbage-collected: closing it aborts the engine's requests.
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        lines = self._lines(await anext(self._events, None))
        self.body_iterator = lines
        async with aclosing(lines):
            await super().stream_response(send)

    async def _lines(self, first: dict[str, Any] | None) -> AsyncGenerator[str, None]:
        try:
            if first is not None:
                yield self._line(first)
            async for event in self._events:
                yield self._line(event)
        except ENDINGS:
            raise
        except BaseException as error:  # of any kind: the client must be told
            for event in self._failed(failure_of(error, self._log)):
                yield self._line(event)
            return
        if self._done is not None:
            yield f"data: {self._done}\n\n"

    def _line(self, event: dict[str, Any]) -> str:
        name = f"event: {event['type']}\n" if self._named else ""
        return f"{name}data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


def openai_events(failure: Failure) -> list[dict[str, Any]]:
    """The event that ends a stream of OpenAI's completions and chats where it fails."""
    return [body(failure.status, failure.message, code=failure.code)]


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`. Cancels it and raises ClientGone when the client closes the connection."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
