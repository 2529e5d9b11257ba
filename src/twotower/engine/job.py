"""A request inside the engine."""

import dataclasses
import time
from types import ModuleType
from typing import NamedTuple

from twotower.decoding.generate import MODULES
from twotower.decoding.params import Generation
from twotower.decoding.record import Record
from twotower.decoding.step import BlockView, Request, Rows, Token
from twotower.engine.auto import AutoRow
from twotower.model.state import ContextState


class Event(NamedTuple):
    """What one round meant for one request: new text and tokens, and the result once it is finished.

    `block` shows the block in progress where the request is watched. `seconds_queued` is how long the request waited
    before the engine took it up.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[Token, ...]
    block: BlockView | None
    result: Generation | None
    seconds_queued: float


@dataclasses.dataclass(eq=False)
class Job:
    """One request: what it has produced, and where its state is.

    `order` is its place in the order of arrival, and `num_passed` later ones came in first. `has_slot` says whether it
    has a state in the pool; `table` lists its pages. `context` is its state while its prompt is being absorbed;
    afterwards the state is in the batch of its mode. `points` are the lengths at which it leaves a snapshot to the
    prefix cache. `was_read` says whether a pass has read ids of it since it last decoded. `auto` has the modes of a
    request that leaves them to the engine. `silent_steps` are those since its last tokens. `seconds_queued` is how long
    it waited, None while it does.
    """

    id: str
    order: int
    record: Record
    watch: bool
    table: list[int] = dataclasses.field(default_factory=list)
    context: ContextState | None = None
    has_slot: bool = False
    num_passed: int = 0
    points: list[int] = dataclasses.field(default_factory=list)
    was_read: bool = False
    auto: AutoRow | None = None
    silent_steps: int = 0
    seconds_queued: float | None = None

    def leave_queue(self) -> None:
        """Notes how long it has waited, if this is the first time."""
        if self.seconds_queued is None:
            self.seconds_queued = time.perf_counter() - self.record.began

    def event(self, text: str, tokens: tuple[Token, ...], block: BlockView | None, result: Generation | None) -> Event:
        """What a round meant for it."""
        assert self.seconds_queued is not None
        return Event(self.id, text, tuple(t.id for t in tokens), tokens, block, result, self.seconds_queued)

    @property
    def module(self) -> ModuleType:
        """Whose launch() it takes next."""
        return MODULES[self.record.request.params.mode if self.auto is None else self.auto.mode]

    @property
    def context_ids(self) -> tuple[int, ...]:
        """What its context must hold before it starts to decode."""
        ids: tuple[int, ...] = self.module.context_ids(self.request)
        return ids

    @property
    def num_absorbed(self) -> int:
        """How many of them its context holds."""
        assert self.context is not None
        return self.context.lengths[0]

    @property
    def request(self) -> Request:
        """The request as it would start now."""
        return self.record.request._replace(produced=tuple(t.id for t in self.record.tokens))


@dataclasses.dataclass
class ModeBatch:
    """The jobs of one mode between two steps; row i belongs to jobs[i]."""

    jobs: list[Job]
    rows: Rows

    def join(self, others: "ModeBatch") -> None:
        """Takes in the jobs of another batch of the mode."""
        self.rows = self.rows.join(others.rows)
        self.jobs = self.jobs + others.jobs
