"""From the queue to the end of the prompt: who comes in, and prompts absorbed a chunk per round."""

from collections import deque

import torch

from twotower.engine.config import EngineConfig
from twotower.engine.job import Job
from twotower.engine.pool import StatePool
from twotower.engine.prefix_cache import Match, PrefixCache, Snapshot
from twotower.model.pages import PAGE_SIZE
from twotower.model.state import MambaState, join
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device

# Requests that may come in before one that arrived earlier and needs more pages than there are.
_MOST_PASSED = 8


class Intake:
    """Jobs that wait and jobs whose prompts are being absorbed.

    `waiting` is in the order of arrival, preempted jobs first. `absorbing` jobs hold their own state.
    """

    def __init__(self, model: TwoTower, config: EngineConfig, pool: StatePool, cache: PrefixCache) -> None:
        self._model = model
        self._config = config
        self._pool = pool
        self._cache = cache
        self.waiting: deque[Job] = deque()
        self.absorbing: list[Job] = []
        self.num_hit_tokens = self.context_calls = 0

    def admit(self, num_decoding: int) -> list[Job]:
        """Lets waiting jobs in while there are slots, and pages for all of a job's ids.

        A job that needs more pages than there are is passed by later ones, but not for ever, and a preempted one never.
        Returns the jobs that want no tokens: they are done.
        """
        done = [job for job in self.waiting if job.record.request.params.max_new_tokens == 0]
        for job in done:
            job.record.leave_queue()
        self.waiting = deque(job for job in self.waiting if job not in done) if done else self.waiting
        passed: list[Job] = []
        for job in list(self.waiting):
            if num_decoding + len(self.absorbing) >= self._config.max_num_requests:
                break
            if self._open(job):
                job.record.leave_queue()
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
        """Takes a job out of wherever it is; its state is not freed."""
        if job in self.waiting:
            self.waiting.remove(job)
        if job in self.absorbing:
            self.absorbing.remove(job)

    def _open(self, job: Job) -> bool:
        """Gives a job its state, as far as the prefix cache knows its ids; False where there are too few pages."""
        ids = job.context_ids
        match = Match(0, (), None, 0)
        if self._config.snapshot_bytes:
            match = self._cache.match(ids, needs_logits=_needs_logits(job))
            job.points = self._cache.points(match, len(ids))
        for page in match.pages:
            self._pool.hold_(page)
        whole = match.length // PAGE_SIZE
        job.table.extend(match.pages[:whole])
        roomy = self.grow(job, len(ids) + job.record.request.params.block_size + 1)
        for page in match.pages[whole:]:  # the job appends to this page: it needs a copy
            if roomy:
                self._pool.copy_page_(page, job.table[whole])
            self._pool.drop_(page)
        if not roomy:
            self._pool.release_(job.table)
            return False
        mamba, logits = match.snapshot or Snapshot((), None)
        job.context = self._pool.open(job.table, match.length, mamba, logits)
        job.has_slot = True
        self.num_hit_tokens += match.length
        return True

    def grow(self, job: Job, length: int) -> bool:
        """Extends a job's table to hold `length` tokens, at the expense of the prefix cache."""
        self._cache.free_pages(self._pool.pages_for(length) - len(job.table))
        return self._pool.grow_(job.table, length)

    def absorb(self) -> None:
        """Absorbs the round's tokens, shared evenly, in one pass."""
        counts = _shares([len(job.context_ids) - job.num_absorbed for job in self.absorbing], self._config.prompt_chunk)
        chosen = [(job, n) for job, n in zip(self.absorbing, counts, strict=True) if n > 0]
        if chosen:
            self._absorb_chunks([job for job, _ in chosen], tuple(n for _, n in chosen))

    def start(self) -> list[Job]:
        """Takes out the jobs that have nothing left to absorb: they may start to decode."""
        started = [job for job in self.absorbing if job.num_absorbed == len(job.context_ids)]
        self.absorbing = [job for job in self.absorbing if job not in started]
        for job in started:
            if job.was_read:
                job.record.context_calls += 1
                self.context_calls += 1
                job.was_read = False
        return started

    def _absorb_chunks(self, jobs: list[Job], counts: tuple[int, ...]) -> None:
        """One pass over the next counts[i] ids of each job, which leaves snapshots where the job has points."""
        firsts = [job.num_absorbed for job in jobs]
        table = torch.zeros(len(jobs), max(counts), dtype=torch.long)
        for row, (job, first, n) in enumerate(zip(jobs, firsts, counts, strict=True)):
            table[row, :n] = torch.tensor(job.context_ids[first : first + n])
        states = [job.context for job in jobs if job.context is not None]
        inside = {p - f for job, f, n in zip(jobs, firsts, counts, strict=True) for p in job.points if f < p < f + n}
        joined = states[0] if len(states) == 1 else join(states)
        scored = self._model.score(to_device(table, self._model.context_device), joined, tuple(sorted(inside)))
        ends = any(f + n == len(job.context_ids) for job, f, n in zip(jobs, firsts, counts, strict=True))
        state = self._model.keep(scored, counts, with_logits=ends)
        for row, (job, first, n) in enumerate(zip(jobs, firsts, counts, strict=True)):
            job.context = state if len(jobs) == 1 else state.select([row])
            job.was_read = True
            ids, snapshots = job.context_ids[: first + n], {}
            for point in job.points:
                if first < point < first + n:
                    mamba = scored.marks[point - first]
                    rows = (MambaState(m.conv[row : row + 1].clone(), m.ssm[row : row + 1].clone()) for m in mamba)
                    snapshots[point] = Snapshot(tuple(rows), None)
                elif point == first + n:
                    whole = point == len(job.context_ids)
                    snapshots[point] = Snapshot(job.context.mamba, job.context.next_logits if whole else None)
            if snapshots:
                self._cache.insert(ids, job.table, snapshots)


def _needs_logits(job: Job) -> bool:
    """Whether the first step reads the logits after the last of the job's `context_ids`."""
    return job.mode.starts_from_logits and not job.record.tokens


def _shares(wanted: list[int], budget: int) -> list[int]:
    """Splits `budget` tokens evenly over jobs that want so many; what one can't use goes to the others."""
    shares = [0] * len(wanted)
    left = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for position, i in enumerate(left):
        shares[i] = min(wanted[i], budget // (len(left) - position))
        budget -= shares[i]
    return shares
