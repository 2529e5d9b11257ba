"""The scheduler: runs one step of every request per round; requests join and leave between rounds."""

import collections
import dataclasses
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from twotower.decoding.modes import EXACT_MODES, MODES
from twotower.decoding.output import DraftCount, Generation, StepOutput
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import Prompt, per_prompt
from twotower.decoding.record import Record, make_request, warn_about_block_size
from twotower.decoding.step import Request
from twotower.engine.auto import AutoRow, Chooser
from twotower.engine.batches import Batches, Launch
from twotower.engine.config import EngineConfig
from twotower.engine.failures import MOST_FAILED_ROUNDS, failing, forget_values, is_final, is_out_of_memory
from twotower.engine.intake import Intake
from twotower.engine.job import Job
from twotower.engine.memory_plan import places_of, plan_memory
from twotower.engine.pool import StatePool
from twotower.engine.prefix_cache import PrefixCache
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower

logger = logging.getLogger(__name__)


class EngineStats(NamedTuple):
    """An engine's present load, and its counts since it was made.

    Now: `num_running` requests have a state and `num_waiting` have none; states and the prefix cache take `bytes_used`
    of `bytes_budget`; running requests need the fraction `usage` of the memory for keys, or of slots if there are none,
    and where that is 1 they wait for each other. Since it was made: `cache_query_tokens`, prompt tokens looked up in
    the prefix cache, and `cache_hit_tokens`, those found in it; `num_rounds`, calls of `Engine.step` with work;
    `num_preemptions`, states dropped to free memory; `denoiser_calls` and `context_calls`, counted per request as in
    `GenerationStats`, and so are `drafts`.
    """

    num_running: int
    num_waiting: int
    bytes_used: int
    bytes_budget: int
    usage: float
    cache_query_tokens: int
    cache_hit_tokens: int
    num_rounds: int
    num_preemptions: int
    denoiser_calls: int
    context_calls: int
    drafts: tuple[DraftCount, ...]


class Engine:
    """Runs many requests at once, each with its own mode and settings; only one thread may use it.

    Each result equals that of `generate` for the request alone: to the bit with the C kernels, else up to rounding.
    """

    def __init__(self, model: TwoTower, config: EngineConfig | None = None) -> None:
        self.model = model
        asked = config or EngineConfig()
        self.plan = plan_memory(model.config, places_of(model), asked)
        for warning in self.plan.warnings:
            logger.warning(warning)
        self.config = dataclasses.replace(asked, max_num_requests=self.plan.max_num_requests)
        self._pool = StatePool(model, self.plan.pool_bytes, self.config.max_num_requests)
        self._chooser = Chooser()
        self._cache = PrefixCache(self._pool, self.plan.snapshot_bytes)
        self._jobs: dict[str, Job] = {}
        self._num_added = 0
        self._intake = Intake(model, self.plan, self._pool, self._cache)
        self._batches = Batches(model, self._pool, self._chooser)
        apart = self.config.commits_apart
        self._commits_apart = model.context_device != model.denoiser_device if apart is None else apart
        self._load = 0  # decoding requests, plus those that take over freed places this round
        self._num_rounds = self._num_preemptions = 0
        self._num_failed_rounds = 0  # since the last step that was done
        self._unsaid: list[StepOutput] = []  # outputs of a round that raised

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._jobs or self._unsaid)

    def longest_text(self, block_size: int) -> int | None:
        """The most tokens of a prompt and its answer, in blocks of `block_size`, that the state budget has room for;
        None where keys take no room."""
        room = self._pool.num_tokens
        return None if room is None else max(room - block_size - 1, 0)

    def prepare(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Checks a request and turns its prompt into token ids; may run in any thread.

        Raises ValueError for a request that can't run here or needs more than the whole state budget.
        """
        request = make_request(self.model, prompt, params)
        longest = len(request.prompt_ids) + request.max_new_tokens + request.block_size + 1
        needed, there = self._pool.pages_for(longest), self._pool.num_pages - 1
        if needed > max(there, 0):
            rule = (
                f"enough for the {needed} pages of keys that a prompt of {len(request.prompt_ids)} tokens with "
                f"max_new_tokens {request.max_new_tokens} needs (it gives {there})"
            )
            raise SettingError("state_bytes", self.plan.state_bytes, rule, "raise it, or shorten the prompt")
        return request

    def add(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, watch: bool = False) -> str:
        """Queues a request and returns its id; with `watch`, every step gives an output that shows the block.

        Raises ValueError for a bad request, and for an id that another unfinished request has.
        """
        warn_about_block_size(self.model, [params])
        return self.add_request(self.prepare(prompt, params), request_id=request_id, watch=watch)

    def add_request(
        self, request: Request, *, request_id: str | None = None, watch: bool = False, arrived: float | None = None
    ) -> str:
        """`add` for a request from `prepare`; `arrived` is its time of arrival by time.perf_counter, by default now."""
        self._num_added += 1
        if request_id is None:
            request_id = f"request-{self._num_added}"
        if request_id in self._jobs:
            raise ValueError(f"request_id is {request_id!r}, which an unfinished request has; choose another")
        began = time.perf_counter() if arrived is None else arrived
        record = Record(self.model, request, began, request_id, watch)
        auto = None
        if request.params.mode == "auto":
            auto = AutoRow((*EXACT_MODES, "diffusion") if request.params.allow_loss else EXACT_MODES)
        self._jobs[request_id] = Job(request_id, self._num_added, record, auto=auto)
        self._intake.enqueue(self._jobs[request_id])
        return request_id

    def abort(self, request_id: str) -> None:
        """Drops a request and frees its state at once; does nothing if it is finished or unknown."""
        job = self._jobs.get(request_id)
        if job is not None:
            with failing([job, *self._batches.jobs, *self._intake.absorbing]):
                self._withdraw(job)
                del self._jobs[request_id]

    def queued(self) -> list[str]:
        """The ids of the requests that have never had a state; one that has lost its state to others is not queued."""
        return [job.id for job in self._intake.waiting if job.record.seconds_queued is None]

    def step(self) -> list[StepOutput]:
        """One round: absorbs some prompt tokens, takes one step of every decoding request, and returns the outputs.

        A step that gives a request no token and no text has no output, unless the request is watched. Requests on which
        an exception strikes have it in their last output, and the others go on: those whose batch or chunk of prompts
        it struck or, where that is not known, all that run. Raises what must end the engine: SystemError, MemoryError
        in the engine itself, the 16th round in a row that fails while no step is done; and KeyboardInterrupt, after
        which the engine may be used again.
        """
        if not self.has_work:
            return []
        self._num_rounds += 1
        outputs, self._unsaid = self._unsaid, []
        num_rows = 0
        final: BaseException | None = None
        try:
            with torch.inference_mode():
                num_rows = self._round(outputs)
        except BaseException as error:  # of any kind, for the same reason as in `failing`
            final = error if is_final(error) else None
            waiting = {job.id for job in self._intake.waiting}
            for job in self._jobs.values():
                if job.id not in waiting or job.has_slot or job.table:
                    job.error = job.error or error
        for output in outputs:
            if output.is_last:
                self._jobs.pop(output.request_id, None)
        failed = self._drop_failed()
        outputs += failed
        if failed and not num_rows:
            self._num_failed_rounds += 1
        elif num_rows:
            self._num_failed_rounds = 0
        if self._num_failed_rounds == MOST_FAILED_ROUNDS:
            final = failed[-1].error
        if final is not None:
            self._unsaid = outputs
            raise final
        return outputs

    def _round(self, outputs: list[StepOutput]) -> int:
        """The round itself: adds to `outputs`, and returns how many rows took a step."""
        began = time.perf_counter()
        self._make_room()
        self._choose_modes()
        if self._commits_apart:
            self._set_aside()
        taking = time.perf_counter()
        done = self._intake.admit(len(self._batches.jobs))
        outputs += [job.record.begin() for job in done]
        if not self._commits_apart:
            self._intake.absorb()
        started = self._intake.start()
        prompts = time.perf_counter() - taking  # is due once a request, in whatever mode: no cost of a round
        scored = [job for job in started if job.record.prompt_scores is not None]
        for job in scored:
            if job.is_empty:
                self._withdraw(job)
        launches: list[Launch] = []
        # `verified` first: its two passes depend on each other, and later launches fill its idle time.
        for mode in reversed(MODES.values()):
            launches += self._batches.launch(mode, [job for job in started if job.mode is mode and job.has_slot])
        if self._commits_apart:
            self._intake.absorb()
        finished = self._batches.finish(launches)
        for job in scored:
            with failing([job]):  # behind the launches, because it waits for the device
                outputs.append(job.record.begin())
        outputs += finished.outputs
        if finished.num_rows:
            beside = time.perf_counter() - began - prompts - finished.seconds
            self._chooser.observe_round(finished.num_rows, beside)
        return finished.num_rows

    def _drop_failed(self) -> list[StepOutput]:
        """Drops the requests that failed, with all that they held, and returns their last outputs."""
        outputs: list[StepOutput] = []
        # in a loop, because what is left of a batch may be more than there is memory for
        while failed := [(job, job.error) for job in self._jobs.values() if job.error is not None]:
            for job, error in failed:
                outputs.append(job.record.fail(error))
                del self._jobs[job.id]
                job.table.clear()
                job.context, job.has_slot = None, False
            self._intake.drop_failed()
            self._batches.drop_failed()
        if outputs:
            short = [output.error for output in outputs if output.error and is_out_of_memory(output.error)]
            if short or not self._cache.is_whole:
                self._cache.forget()
            jobs = self._jobs.values()
            self._pool.recount_([job.table for job in jobs], self._cache.pages(), sum(job.has_slot for job in jobs))
            for error in short:
                forget_values(error)
                torch.cuda.empty_cache()
        return outputs

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Generation]:
        """`twotower.generate` by this engine: results in the order of the prompts.

        Raises ValueError if other requests are unfinished, or as `add` does, before anything runs.
        """
        many = per_prompt(prompts, params)
        warn_about_block_size(self.model, many)
        return list(self.run([self.prepare(prompt, p) for prompt, p in zip(prompts, many, strict=True)]))

    def run(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Runs any number of requests from `prepare` and yields their results in order.

        Requests are taken from the iterable as there is room for them. Raises ValueError if other requests are
        unfinished, and the exception on which one of its own fails; then, and when the iterator is closed early, it
        aborts the requests that it has taken.
        """
        if self._jobs:
            raise ValueError(f"{len(self._jobs)} requests are unfinished; step until they are done, or abort them")
        coming, exhausted = iter(requests), False
        order: deque[str] = deque()
        results: dict[str, Generation] = {}
        try:
            while True:
                while not exhausted and len(order) < 4 * self.config.max_num_requests:
                    request = next(coming, None)
                    if request is None:
                        exhausted = True
                    else:
                        order.append(self.add_request(request))
                if not order:
                    return
                for output in self.step():
                    if output.error is not None:
                        raise output.error
                    if output.result is not None:
                        results[output.request_id] = output.result
                while order and order[0] in results:
                    yield results.pop(order.popleft())
        finally:
            for request_id in order:
                self.abort(request_id)

    def stats(self) -> EngineStats:
        """The engine's counts at this moment."""
        return EngineStats(
            num_running=len(self._jobs) - len(self._intake.waiting),
            num_waiting=len(self._intake.waiting),
            bytes_used=self._pool.bytes_used + self._cache.bytes_of_snapshots,
            bytes_budget=self.plan.state_bytes,
            usage=self._pool.usage,
            cache_query_tokens=self._intake.num_looked_up_tokens,
            cache_hit_tokens=self._intake.num_hit_tokens,
            num_rounds=self._num_rounds,
            num_preemptions=self._num_preemptions,
            denoiser_calls=self._batches.denoiser_calls,
            context_calls=self._batches.context_calls + self._intake.context_calls,
            drafts=self._batches.drafts,
        )

    def clear_cache(self) -> None:
        """Empties the prefix cache."""
        self._cache.clear()

    def _choose_modes(self) -> None:
        """Chooses modes for requests of mode `auto`; those between two blocks change over and keep their state."""
        jobs = self._batches.jobs
        most = self.config.max_num_requests
        waiting = list(itertools.islice(self._intake.waiting, most - len(jobs)))
        beginning = [job.auto for job in waiting if job.auto is not None]
        if beginning:
            self._chooser.begin(beginning, min(len(self._jobs), most))
        # For each request that left after the last round another one begins in this round, so it counts as well.
        coming = [*self._intake.absorbing, *waiting][: max(self._load - len(jobs), 0)]
        self._load = len(jobs) + len(coming)
        choosing = [job.auto for job in jobs if job.auto is not None]
        if not choosing:
            return
        if self._chooser.due(self._load):
            others = [job.mode.name for job in (*(job for job in jobs if job.auto is None), *coming)]
            self._chooser.choose(choosing, collections.Counter(others))
        for name, batch in list(self._batches.of_mode.items()):
            if all(job.auto is None or job.auto.mode == job.auto.wanted for job in batch.jobs):
                continue
            for job, rests in zip(batch.jobs, batch.rows.rests, strict=True):
                if job.auto is not None and rests and job.auto.mode != job.auto.wanted and job.error is None:
                    job.auto.mode = job.auto.wanted
                    self._take_out(name, job)

    def _set_aside(self) -> None:
        """Moves every request with a finished block to the intake, which absorbs it before the next block starts."""
        for name, batch in list(self._batches.of_mode.items()):
            if MODES[name].fills_blocks:
                for job, rests in zip(batch.jobs, batch.rows.rests, strict=True):
                    if rests and job.error is None:
                        self._take_out(name, job)

    def _take_out(self, name: str, job: Job) -> None:
        """Moves a job from its batch to the intake, which absorbs the ids that its context lacks."""
        self._batches.take_out(name, job)
        if job.error is None:
            job.points = []
            self._intake.absorbing.append(job)

    def _make_room(self) -> None:
        """Gives every decoding row pages for its next step, by priority and age; preempts the last if needed."""
        for job in sorted(self._batches.jobs, key=lambda job: job.rank):
            # room for the tokens that its context still lacks, and then for a step of any mode
            length = len(job.record.request.prompt_ids) + len(job.record.tokens)
            wanted = length + job.record.request.block_size + 1
            # one that was preempted for an older one has no slot any more
            while job.has_slot and job.error is None and not self._intake.grow(job, wanted):
                self._preempt(max((*self._intake.absorbing, *self._batches.jobs), key=lambda job: job.rank))

    def _preempt(self, job: Job) -> None:
        """Drops a job's state and puts it back in the queue; later it absorbs its prompt and its own tokens again."""
        self._num_preemptions += 1
        self._withdraw(job)
        self._intake.put_back(job)

    def _withdraw(self, job: Job) -> None:
        """Removes a job from the intake and its batch, and frees its state."""
        self._intake.remove(job)
        self._batches.remove(job)
        if job.has_slot:
            self._pool.close_(job.table)
        job.context, job.has_slot, job.silent_steps = None, False, 0
