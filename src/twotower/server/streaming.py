"""Responses that take long: streams of server-sent events, and work that is cancelled when its client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AbstractContextManager, aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from twotower.engine.aio import EngineFailed
from twotower.server.errors import ClientGone, body

T = TypeVar("T")


class EventStream(StreamingResponse):
    """Sends each object as a server-sent event. If the engine fails meanwhile, the last event is an error object.

    The context manager `held` is exited when the response ends, also if the stream never began. `done` is the text of
    one more event after the last object. With `named` each event has its object's `type` for a name.
    """

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        held: AbstractContextManager[object],
        *,
        done: str | None = None,
        named: bool = False,
    ) -> None:
        self._lines = _lines(events, done, named)
        self._held = held
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(self._lines, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            # Close the generator now and not when it is garbage-collected: closing it aborts the engine's requests.
            async with aclosing(self._lines):
                await super().__call__(scope, receive, send)


async def _lines(
    events: AsyncGenerator[dict[str, Any], None], done: str | None, named: bool
) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        try:
            async for event in events:
                yield (f"event: {event['type']}\n" if named else "") + _line(event)
        except EngineFailed as error:
            yield _line(body(503, str(error), code="engine_failed"))
            return
    if done is not None:
        yield f"data: {done}\n\n"


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


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
