"""`AsyncEngine`: an engine on its own thread, for asyncio."""

import asyncio
import collections
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from typing import NamedTuple, Self, TypeAlias

from twotower.decoding.output import StepOutput
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import Prompt
from twotower.decoding.step import Request
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine, EngineStats
from twotower.engine.failures import forget_values
from twotower.engine.memory_plan import MemoryPlan
from twotower.model.two_tower import TwoTower

logger = logging.getLogger(__name__)


class Overloaded(RuntimeError):
    """The queue is full; the request was not taken."""


class EngineFailed(RuntimeError):
    """The engine's thread has ended, by an internal error or by `close`; no request runs any more."""


class RequestFailed(RuntimeError):
    """A request ended on an exception, its cause, which struck the engine while it ran; others go on."""


class Draining(RuntimeError):
    """The engine is about to be closed, so that it did not take the request or has given it up; send it elsewhere."""


@dataclasses.dataclass
class Admission:
    """Places reserved for requests, of which no stream has taken `num_left` yet; `has_begun` says whether one of the
    requests has had an output."""

    num_left: int
    has_begun: bool = False


class _Client(NamedTuple):
    """Takes the outputs of one stream: a queue in the event loop that opened it. None ends the stream.

    The engine knows a stream by its number, because a client may reuse its own id while a round is still running.
    """

    number: str
    request_id: str
    admission: Admission
    loop: asyncio.AbstractEventLoop
    outputs: "asyncio.Queue[StepOutput | _Ended]"

    def put(self, output: "StepOutput | _Ended") -> None:
        """Queues an output; called from the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits for the output any more
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, output)


# What ends a stream in the place of a result: an exception, or None where the request was aborted.
_Ended: TypeAlias = EngineFailed | RequestFailed | Draining | None


class AsyncEngine:
    """Runs an `Engine` on one worker thread between `start` and `close`; any event loop may open streams."""

    def __init__(self, model: TwoTower, config: EngineConfig | None = None) -> None:
        self._engine = Engine(model, config)
        self.config = self._engine.config
        self._wake = threading.Condition()
        self._arrived: deque[tuple[str, Request, bool, float]] = deque()
        self._aborted: deque[str] = deque()
        self._clients: dict[str, _Client] = {}  # by number
        self._numbers: dict[str, str] = {}  # by request id
        self._num_streams = 0
        self._num_reserved = 0  # places of admissions that no stream has taken yet
        self._closing = self._draining = False
        self._failure: BaseException | None = None
        self._stats = self._engine.stats()
        self._thread: threading.Thread | None = None

    @property
    def model(self) -> TwoTower:
        """The model that the engine runs."""
        return self._engine.model

    @property
    def plan(self) -> MemoryPlan:
        """What the engine's memory is for."""
        return self._engine.plan

    @property
    def is_running(self) -> bool:
        """Whether the worker thread takes requests."""
        return self._thread is not None and self._failure is None and not self._closing

    @property
    def failure(self) -> BaseException | None:
        """The exception that ended the engine, if one did; whoever runs it looks at `is_running` now and then."""
        return None if isinstance(self._failure, EngineFailed) else self._failure

    def start(self) -> Self:
        """Starts the worker thread."""
        assert self._thread is None, "this engine was started before"
        self._thread = threading.Thread(target=self._run, name="twotower-engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends the worker thread after the round it is in; unfinished streams raise EngineFailed."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._fail(EngineFailed("the engine was closed"))

    def drain(self) -> None:
        """Takes no more requests, and ends those that have to wait; what runs goes on. Returns at once, in any thread.

        `admit` raises Draining from now on. After the round in progress so does the stream of each request that has no
        state yet, unless another request of its admission has begun: the texts of one answer belong together.
        """
        with self._wake:
            self._draining = True

    def abandon(self, reason: str = "the engine is shutting down and did not finish this request") -> None:
        """Ends all unfinished requests: their streams raise Draining with `reason`. Returns at once, in any thread."""
        with self._wake:
            for number in list(self._clients):
                self._end(number, Draining(reason))

    def stats(self) -> EngineStats:
        """The counts after the last round; requests that haven't reached the engine yet count as waiting."""
        with self._wake:
            return self._stats._replace(num_waiting=self._stats.num_waiting + len(self._arrived))

    @property
    def is_draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining

    @property
    def num_unfinished(self) -> int:
        """The number of requests whose streams haven't ended, plus the reserved places."""
        with self._wake:
            return len(self._clients) + self._num_reserved

    @contextmanager
    def admit(self, count: int = 1) -> Iterator[Admission]:
        """Reserves places for `count` requests; places that no stream has taken are given back on exit.

        Raises Overloaded if they exceed the limit of unfinished requests, Draining after `drain`, and EngineFailed if
        the engine isn't running.
        """
        admission = Admission(count)
        with self._wake:
            self._check_takes(admission)
            unfinished, limit = self.num_unfinished, self.config.max_num_requests + self.config.max_num_waiting
            if unfinished + count > limit:
                raise Overloaded(f"{unfinished} requests are unfinished, the limit is {limit}; try again later")
            self._num_reserved += count
        try:
            yield admission
        finally:
            with self._wake:
                self._num_reserved -= admission.num_left
                admission.num_left = 0

    def longest_text(self, block_size: int) -> int | None:
        """`Engine.longest_text`, in any thread."""
        return self._engine.longest_text(block_size)

    def prepare(self, prompt: Prompt, params: SamplingParams) -> Request:
        """`Engine.prepare`, in any thread: the request for `stream_prepared`. Raises ValueError for a bad request."""
        return self._engine.prepare(prompt, params)

    async def stream(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, watch: bool = False
    ) -> AsyncGenerator[StepOutput, None]:
        """The outputs of one request as they come; the last has its result. Closing the iterator aborts the request.

        Raises ValueError for a bad request, Overloaded if the queue is full, Draining if the engine shuts down,
        RequestFailed if it ends on an exception, and EngineFailed if the engine is not running.
        """
        with self.admit() as admission:
            request = await asyncio.to_thread(self.prepare, prompt, params)
            outputs = self.stream_prepared(request, admission, request_id=request_id, watch=watch)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output

    async def stream_prepared(
        self, request: Request, admission: Admission, *, request_id: str | None = None, watch: bool = False
    ) -> AsyncGenerator[StepOutput, None]:
        """`stream` for a request from `prepare`, which takes one of the places reserved by `admit`."""
        client = self._enter(request, admission, request_id, watch)
        try:
            while True:
                output = await client.outputs.get()
                if output is None:
                    return
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.result is not None:
                    return
        finally:
            self._leave(client.number)

    async def abort(self, request_id: str) -> None:
        """Ends a request: its stream stops without a result. Does nothing if it is finished or unknown."""
        with self._wake:
            self._end(self._numbers.get(request_id, ""), None)

    def _end(self, number: str, last: _Ended) -> None:
        """Aborts a request, if it is unfinished, and ends its stream with `last`."""
        client = self._leave(number)
        if client is not None:
            client.put(last)

    def _check_takes(self, admission: Admission) -> None:
        if not self.is_running:
            raise EngineFailed("the engine does not run: it was never started, was closed or failed") from self._failure
        if self._draining and not admission.has_begun:
            raise Draining("the engine is shutting down and takes no more requests")

    def _enter(self, request: Request, admission: Admission, request_id: str | None, watch: bool) -> _Client:
        with self._wake:
            self._check_takes(admission)
            assert admission.num_left > 0, "all places of this admission are taken"
            self._num_streams += 1
            number = str(self._num_streams)
            request_id = f"request-{number}" if request_id is None else request_id
            if request_id in self._numbers:
                raise ValueError(f"request_id is {request_id!r}, which an unfinished request has; choose another")
            self._numbers[request_id] = number
            client = _Client(number, request_id, admission, asyncio.get_running_loop(), asyncio.Queue())
            self._clients[number] = client
            admission.num_left -= 1
            self._num_reserved -= 1
            self._arrived.append((number, request, watch, time.perf_counter()))
            self._wake.notify()
        return client

    def _leave(self, number: str) -> _Client | None:
        """Forgets a stream and aborts its request if it is unfinished."""
        with self._wake:
            client = self._clients.pop(number, None)
            if client is not None:
                del self._numbers[client.request_id]
                self._aborted.append(number)
                self._wake.notify()
        return client

    def _run(self) -> None:
        try:
            while self._take_in():
                self._give_out(self._engine.step())
                if self._draining:
                    self._refuse_waiting()
        except BaseException as error:
            # not raised again, for the log has it now
            logger.critical("the engine ended on an exception", exc_info=error)
            self._fail(error)

    def _take_in(self) -> bool:
        """Waits for work and hands new requests and aborts to the engine; returns False when closing."""
        with self._wake:
            while not (self._closing or self._arrived or self._aborted or self._engine.has_work):
                self._wake.wait()
            while self._arrived:
                number, request, watch, arrived = self._arrived.popleft()
                try:
                    self._engine.add_request(request, request_id=number, watch=watch, arrived=arrived)
                except Exception as error:  # of any kind, as in `failing`: it must not end the other requests
                    self._report({error: 1})
                    self._end(number, _failed(error))
            while self._aborted:
                self._engine.abort(self._aborted.popleft())
            self._stats = self._engine.stats()
            return not self._closing

    def _give_out(self, outputs: list[StepOutput]) -> None:
        self._report(collections.Counter(output.error for output in outputs if output.error is not None))
        with self._wake:
            self._stats = self._engine.stats()
            known = [(self._clients[o.request_id], o) for o in outputs if o.request_id in self._clients]
            for client, output in known:
                client.admission.has_begun = True
                if output.is_last:
                    del self._clients[output.request_id]
                    del self._numbers[client.request_id]
        for client, output in known:
            if output.error is None:
                client.put(dataclasses.replace(output, request_id=client.request_id))
            else:
                client.put(_failed(output.error))

    def _report(self, errors: Mapping[BaseException, int]) -> None:
        """Logs each exception once, however many requests it ended, and lets go of what it holds."""
        for error, count in errors.items():
            fields = {"texts": count, "error": _shown(error)}
            logger.error("%d texts failed", count, exc_info=error, extra={"fields": fields})
            forget_values(error)

    def _refuse_waiting(self) -> None:
        """Ends the requests that the round which is over had no place for."""
        with self._wake:
            waiting = set(self._engine.queued())
            running = [client.admission for number, client in self._clients.items() if number not in waiting]
            for number in waiting & self._clients.keys():
                admission = self._clients[number].admission
                if not admission.has_begun and not any(admission is other for other in running):
                    self._end(number, Draining("the engine is shutting down and had not begun this request"))

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            self._failure = self._failure or error
            clients = list(self._clients.values())
            self._clients.clear()
            self._numbers.clear()
        for client in clients:
            client.put(EngineFailed("the engine does not run any more"))


def _failed(error: BaseException) -> RequestFailed:
    failed = RequestFailed(f"the engine failed on this request: {_shown(error)}")
    failed.__cause__ = error
    return failed


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
