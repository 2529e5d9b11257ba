"""Replies of protocols other than OpenAI's chats: one answer, whole or as a stream of named events."""

from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from twotower.decoding.output import Generation
from twotower.engine.aio import Admission
from twotower.server.chat import PreparedChat
from twotower.server.errors import Failure
from twotower.server.reasoning import Thought
from twotower.server.service import Service
from twotower.server.streaming import EventStream, unless_gone
from twotower.server.tools.calls import Call

Event = dict[str, Any]


class AnswerWriter(Protocol):
    """Writes an answer as a protocol has it: each method gives the events of a stream, which have a `type`, and `whole`
    is the body of a reply that is not streamed."""

    @property
    def id(self) -> str: ...

    @property
    def whole(self) -> dict[str, Any]:
        """All that was written; it has the `usage`."""
        ...

    def begin(self) -> list[Event]: ...

    def push(self, part: Thought | str | Call) -> list[Event]: ...

    def end(self, result: Generation) -> list[Event]: ...

    def failed(self, failure: Failure) -> list[Event]:
        """The events after which no others come, because something failed."""
        ...


async def reply_as(
    service: Service,
    request: Request,
    chat: PreparedChat,
    writer: AnswerWriter,
    stream: bool,
    admission: Admission,
    held: ExitStack,
) -> Response:
    """The response to a request. A stream takes over what `held` holds, the admission among it, until it ends."""
    [text] = chat.requests
    log = request.state.log
    log |= {"id": writer.id, "mode": text.params.mode, "texts": 1}
    events = _events(service, chat, writer, admission, log)
    if stream:
        return EventStream(events, held.pop_all(), writer.failed, named=True)
    await unless_gone(request, _exhaust(events))
    return JSONResponse(writer.whole)


async def _events(
    service: Service, chat: PreparedChat, writer: AnswerWriter, admission: Admission, log: dict[str, Any]
) -> AsyncGenerator[Event, None]:
    reading, begun = chat.answers.reading(), False
    async with service.run(chat.requests, admission, log) as outputs:
        async for _, output in outputs:
            # only now, for an answer that the engine never takes up has no beginning
            for event in [] if begun else writer.begin():
                yield event
            begun = True
            parts = reading.push(output.text)
            if output.result is not None:
                parts += reading.end()
            for part in parts:
                for event in writer.push(part):
                    yield event
            if output.result is not None:
                for event in writer.end(output.result):
                    yield event
    log |= writer.whole["usage"]


async def _exhaust(events: AsyncGenerator[Event, None]) -> None:
    async with aclosing(events):
        async for _ in events:
            pass
