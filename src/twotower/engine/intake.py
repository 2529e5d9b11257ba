"""The intake: admits waiting requests and absorbs their prompts, a chunk per round."""

import collections
from collections import deque

import torch

from twotower.engine.failures import failing
from twotower.engine.job import Job
from twotower.engine.memory_plan import MemoryPlan
from twotower.engine.pool import StatePool
from twotower.engine.prefix_cache import Match, PrefixCache, Snapshot, Tree
from twotower.model.pages import PAGE_SIZE
from twotower.model.state import MambaState, join
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device

# Later requests that may overtake one for which there are too few free pages.
_MOST_PASSED = 8


class Intake:
    """The waiting jobs, by priority and of one priority in the order of arrival with preempted ones first, and the jobs
    that absorb their prompts.

    A job in `absorbing` holds its own state. A job that fails has its `error` set and is no longer in either.
    """

    def __init__(self, model: TwoTower, plan: MemoryPlan, pool: StatePool, cache: PrefixCache) -> None:
        self._model = model
        self._plan = plan
        self._pool = pool
        self._cache = cache
        self.waiting: deque[Job] = deque()
        self.absorbing: list[Job] = []
        self.num_looked_up_tokens = self.num_hit_tokens = self.context_calls = 0

    def enqueue(self, job: Job) -> None:
        """Queues a new job: behind those of its priority, before those of a higher number."""
        behind = enumerate(reversed(self.waiting))
        num_behind = next((n for n, other in behind if other.priority <= job.priority), len(self.waiting))
        self.waiting.insert(len(self.waiting) - num_behind, job)

    def put_back(self, job: Job) -> None:
        """Queues a preempted job before all others of its priority."""
        before = enumerate(self.waiting)
        self.waiting.insert(next((n for n, o in before if o.priority >= job.priority), len(self.waiting)), job)

    def admit(self, num_decoding: int) -> list[Job]:
        """Admits waiting jobs while there are slots, and pages for all ids of the job.

        Later jobs may overtake one that needs more pages than are free, but at most `_MOST_PASSED` of them, and none
        may overtake a preempted job. Returns the jobs that ask neither for new tokens nor for the scores of their
        prompt, which are done.
        """
        done = [job for job in self.waiting if job.is_empty and job.record.prompt_scores is None]
        for job in done:
            job.record.leave_queue()
            self.waiting.remove(job)
        passed: list[Job] = []
        for job in list(self.waiting):
            if num_decoding + len(self.absorbing) >= self._plan.max_num_requests:
                break
            alone, opened = num_decoding + len(self.absorbing) == 0, False
            with failing([job]):
                # Held for a while by who goes on from them, cached pages may be those that one text lacks.
                opened = self._open(job) or (alone and self._open(job, from_cache=False))
            if job.error is not None:
                self.waiting.remove(job)
            elif opened:
                job.record.leave_queue(job.num_absorbed)
                self.waiting.remove(job)
                self.absorbing.append(job)
                for other in passed:
                    other.num_passed += 1
            else:
                passed.append(job)
                if job.num_passed >= _MOST_PASSED or job.record.tokens or len(passed) > _MOST_PASSED:
                    break
        return done

    def remove(self, job: Job) -> None:
        """Removes a job from the queue or from absorption; doesn't free its state."""
        if job in self.waiting:
            self.waiting.remove(job)
        if job in self.absorbing:
            self.absorbing.remove(job)

    def drop_failed(self) -> None:
        """Removes the jobs that failed."""
        self.absorbing = [job for job in self.absorbing if job.error is None]
        for job in [job for job in self.waiting if job.error is not None]:
            self.waiting.remove(job)

    def _open(self, job: Job, *, from_cache: bool = True) -> bool:
        """Gives a job its state, starting from the prefix cache or anew; returns False if there are too few free
        pages. Anew there are enough for any job that is alone, for nothing that is cached is held."""
        ids = job.context_ids
        match = Match(0, (), None, 0)
        if self._plan.snapshot_bytes:
            if from_cache:
                match = self._cache.match(ids, self._tree(job), needs_logits=_needs_logits(job))
            if job.must_read_all:
                match = Match(0, (), None, match.shared)
            job.points = self._cache.points(match, len(ids))
        whole = match.length // PAGE_SIZE
        self._pool.extend_(job.table, match.pages[:whole])
        for page in match.pages[whole:]:
            self._pool.hold_(page)
        roomy = self.grow(job, len(ids) + job.record.request.block_size + 1)
        for page in match.pages[whole:]:  # the job appends to this page, so it needs its own copy
            if roomy:
                self._pool.copy_page_(page, job.table[whole])
            self._pool.drop_(page)
        if not roomy:
            self._pool.release_(job.table)
            return False
        mamba, logits = match.snapshot or Snapshot((), None)
        job.context = self._pool.open(job.table, match.length, mamba, logits, self._rope_length(job))
        job.has_slot = True
        self.num_looked_up_tokens += 0 if job.must_read_all else len(ids)
        self.num_hit_tokens += match.length
        return True

    def _rope_length(self, job: Job) -> int:
        """What RoPE depends on for a job, from its first token to its last."""
        return self._model.config.rope_length(job.record.request.planned_length)

    def _tree(self, job: Job) -> Tree:
        """Which requests the job shares cached tokens with."""
        return Tree(self._rope_length(job), job.record.request.params.cache_salt)

    def grow(self, job: Job, length: int) -> bool:
        """Extends a job's table to hold `length` tokens, dropping cached pages if needed; returns whether it could."""
        self._cache.free_pages(self._pool.pages_for(length) - len(job.table))
        return self._pool.grow_(job.table, length)

    def absorb(self) -> None:
        """Absorbs up to `prompt_chunk` tokens in one pass, fewer for long texts, shared evenly among the jobs."""
        most = self._plan.chunk_at(max((job.num_absorbed for job in self.absorbing), default=0))
        counts = _shares([len(job.context_ids) - job.num_absorbed for job in self.absorbing], most)
        chosen = [(job, n) for job, n in zip(self.absorbing, counts, strict=True) if n > 0]
        if chosen:
            with failing([job for job, _ in chosen]):
                self._absorb_chunks([job for job, _ in chosen], tuple(n for _, n in chosen))
            self.drop_failed()

    def start(self) -> list[Job]:
        """Removes and returns the jobs that have absorbed all their ids; they may start to decode."""
        started = [job for job in self.absorbing if job.num_absorbed == len(job.context_ids)]
        self.absorbing = [job for job in self.absorbing if job not in started]
        for job in started:
            if job.was_read:
                job.record.context_calls += 1
                self.context_calls += 1
                job.was_read = False
        return started

    def _absorb_chunks(self, jobs: list[Job], counts: tuple[int, ...]) -> None:
        """Absorbs the next counts[i] ids of each job in one pass, and caches a snapshot at each of the job's points."""
        firsts = [job.num_absorbed for job in jobs]
        table = torch.zeros(len(jobs), max(counts), dtype=torch.long)
        for row, (job, first, n) in enumerate(zip(jobs, firsts, counts, strict=True)):
            table[row, :n] = torch.tensor(job.context_ids[first : first + n])
        states = [job.context for job in jobs if job.context is not None]
        wanted = [p - f for job, f, n in zip(jobs, firsts, counts, strict=True) for p in job.points if f < p < f + n]
        joined = states[0] if len(states) == 1 else join(states)
        marks = _marks(wanted, self._plan.most_marks(len(jobs)))
        scored = self._model.score(to_device(table, self._model.context_device), joined, marks)
        ends = any(f + n == len(job.context_ids) for job, f, n in zip(jobs, firsts, counts, strict=True))
        state = self._model.keep(scored, counts, with_logits=ends)
        for row, (job, first, n) in enumerate(zip(jobs, firsts, counts, strict=True)):
            job.context = state if len(jobs) == 1 else state.select([row])
            job.was_read = True
            if job.record.prompt_scores is not None:
                job.record.prompt_scores.take(self._model, scored.hidden[row, :n], first)
            ids, snapshots = job.context_ids[: first + n], {}
            for point in job.points:
                if point - first in scored.marks:
                    mamba = scored.marks[point - first]
                    rows = (MambaState(m.conv[row : row + 1].clone(), m.ssm[row : row + 1].clone()) for m in mamba)
                    snapshots[point] = Snapshot(tuple(rows), None)
                elif point == first + n:
                    whole = point == len(job.context_ids)
                    snapshots[point] = Snapshot(job.context.mamba, job.context.next_logits if whole else None)
            if snapshots:
                self._cache.insert(ids, self._tree(job), job.table, snapshots)


def _needs_logits(job: Job) -> bool:
    """Whether the first step reads the logits after the last of the job's `context_ids`."""
    return job.mode.starts_from_logits and not job.record.tokens


def _marks(wanted: list[int], most: int) -> tuple[int, ...]:
    """The places in a pass that rows want a snapshot at, ascending; if they are too many, those that most rows want,
    and of these the last."""
    counts = collections.Counter(wanted)
    return tuple(sorted(sorted(counts, key=lambda place: (counts[place], place))[-most:]))


def _shares(wanted: list[int], budget: int) -> list[int]:
    """Splits `budget` tokens evenly over jobs that want wanted[i] each; unused shares go to the other jobs."""
    shares = [0] * len(wanted)
    left = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for position, i in enumerate(left):
        shares[i] = min(wanted[i], budget // (len(left) - position))
        budget -= shares[i]
    return shares
