"""The engine's own record of a request, and the batch of one mode."""

import dataclasses

from twotower.decoding.modes import MODES, DecodingMode
from twotower.decoding.record import Record
from twotower.decoding.step import Request, RowBatch
from twotower.engine.auto import AutoRow
from twotower.model.state import ContextState


@dataclasses.dataclass(eq=False)
class Job:
    """One request: what it has produced, and where its state is.

    `order` is its place in the order of arrival; `num_passed` later requests were admitted before it. `has_slot` says
    whether it has a state in the pool; `table` lists its pages. `context` is its state while its prompt is being
    absorbed; afterwards the state is in the batch of its mode. `points` are the prefix lengths at which it leaves a
    snapshot in the prefix cache. `was_read` says whether a context pass has absorbed ids of it since it last decoded.
    `auto` holds the possible modes of a request of mode `auto`. `silent_steps` counts the steps since its last tokens.
    `error` is what it failed on; a job that has one is dropped at the end of the round.
    """

    id: str
    order: int
    record: Record
    table: list[int] = dataclasses.field(default_factory=list)
    context: ContextState | None = None
    has_slot: bool = False
    num_passed: int = 0
    points: list[int] = dataclasses.field(default_factory=list)
    was_read: bool = False
    auto: AutoRow | None = None
    silent_steps: int = 0
    error: BaseException | None = None

    @property
    def mode(self) -> DecodingMode:
        """The mode of its next step."""
        return MODES[self.record.request.params.mode if self.auto is None else self.auto.mode]

    @property
    def priority(self) -> int:
        """Jobs of a lower number come first."""
        return self.record.request.params.priority

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key: the job that comes first when memory is short has the lowest."""
        return self.priority, self.order

    @property
    def context_ids(self) -> tuple[int, ...]:
        """The ids that its context must hold before it starts to decode."""
        return self.mode.steps.context_ids(self.request)

    @property
    def num_absorbed(self) -> int:
        """How many of `context_ids` its context holds."""
        assert self.context is not None
        return self.context.lengths[0]

    @property
    def is_empty(self) -> bool:
        """Whether it asks for no new tokens."""
        return self.record.request.max_new_tokens == 0

    @property
    def must_read_all(self) -> bool:
        """Whether it can't start from a cached prefix, which says nothing about the tokens in it."""
        scores = self.record.prompt_scores
        return scores is not None and not scores.is_complete

    @property
    def request(self) -> Request:
        """The request with the tokens produced so far, from which it could start again."""
        return self.record.request._replace(produced=tuple(t.id for t in self.record.tokens))


@dataclasses.dataclass
class ModeBatch:
    """The decoding jobs of one mode between two steps; row i belongs to jobs[i]."""

    jobs: list[Job]
    rows: RowBatch

    def join(self, others: "ModeBatch") -> None:
        """Adds the jobs of another batch of the same mode."""
        # both or neither, where the rows can't be joined
        self.rows, self.jobs = self.rows.join(others.rows), self.jobs + others.jobs

    def of(self, jobs: list[Job]) -> "ModeBatch":
        """The batch with some of its jobs alone, in their order; itself where these are all."""
        if len(jobs) == len(self.jobs):
            return self
        return ModeBatch(jobs, self.rows.select([place for place, job in enumerate(self.jobs) if job in jobs]))
