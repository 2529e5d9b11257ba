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

from twotower.decoding.modes import EXACT_MODES, MODES, DecodingMode
from twotower.decoding.output import Generation, StepOutput
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import Prompt, per_prompt
from twotower.decoding.record import Record, make_request, warn_about_block_size
from twotower.decoding.step import BatchStep, LaunchedStep, Request, read
from twotower.engine.auto import AutoRow, Chooser
from twotower.engine.config import EngineConfig
from twotower.engine.intake import Intake
from twotower.engine.job import Job, ModeBatch
from twotower.engine.memory_plan import places_of, plan_memory
from twotower.engine.pool import StatePool
from twotower.engine.prefix_cache import PrefixCache
from twotower.errors import SettingError
from twotower.model.state import join
from twotower.model.two_tower import TwoTower

logger = logging.getLogger(__name__)


class EngineStats(NamedTuple):
    """An engine's present load, and its counts since it was made.

    Now: `num_running` requests have a state and `num_waiting` have none; states and the prefix cache take `bytes_used`
    of `bytes_budget`; running requests need the fraction `usage` of the memory for keys, or of slots if there are none,
    and where that is 1 they wait for each other. Since it was made: `cache_query_tokens`, prompt tokens looked up in
    the prefix cache, and `cache_hit_tokens`, those found in it; `num_rounds`, calls of `Engine.step` with work;
    `num_preemptions`, states dropped to free memory; `denoiser_calls` and `context_calls`, counted per request as in
    `GenerationStats`.
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


class _Launch(NamedTuple):
    """A launched step of one mode's batch, and the seconds that the launch took."""

    mode: DecodingMode
    batch: ModeBatch
    launched: LaunchedStep
    seconds: float


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
        self._batches: dict[str, ModeBatch] = {}
        apart = self.config.commits_apart
        self._commits_apart = model.context_device != model.denoiser_device if apart is None else apart
        self._load = 0  # decoding requests, plus those that take over freed places this round
        self._num_rounds = self._num_preemptions = self._denoiser_calls = self._context_calls = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._jobs)

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
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self._withdraw(job)

    def queued(self) -> list[str]:
        """The ids of the requests that have never had a state; one that has lost its state to others is not queued."""
        return [job.id for job in self._intake.waiting if job.record.seconds_queued is None]

    def step(self) -> list[StepOutput]:
        """One round: absorbs some prompt tokens, takes one step of every decoding request, and returns the outputs.

        A step that gives a request no token and no text has no output, unless the request is watched.
        """
        if not self._jobs:
            return []
        self._num_rounds += 1
        began = time.perf_counter()
        with torch.inference_mode():
            self._make_room()
            self._choose_modes()
            if self._commits_apart:
                self._set_aside()
            num_decoding = sum(len(batch.jobs) for batch in self._batches.values())
            done = self._intake.admit(num_decoding)
            outputs = [job.record.end_without_tokens() for job in done]
            if not self._commits_apart:
                self._intake.absorb()
            started = self._intake.start()
            launches: list[_Launch] = []
            # `verified` first: its two passes depend on each other, and later launches fill its idle time.
            for mode in reversed(MODES.values()):
                launches += self._launch_mode(mode, [job for job in started if job.mode is mode])
            if self._commits_apart:
                self._intake.absorb()
            num_rows = sum(len(launch.batch.jobs) for launch in launches)
            finished, seconds_of_steps = self._finish(launches)
            outputs += finished
        for output in outputs:
            if output.result is not None:
                del self._jobs[output.request_id]
        if launches:
            self._chooser.observe_round(num_rows, time.perf_counter() - began - seconds_of_steps)
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
        unfinished; closing the iterator early aborts the requests that it has taken.
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
            denoiser_calls=self._denoiser_calls,
            context_calls=self._context_calls + self._intake.context_calls,
        )

    def clear_cache(self) -> None:
        """Empties the prefix cache."""
        self._cache.clear()

    def _choose_modes(self) -> None:
        """Chooses modes for requests of mode `auto`; those between two blocks change over and keep their state."""
        jobs = [job for batch in self._batches.values() for job in batch.jobs]
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
        for name, batch in list(self._batches.items()):
            if all(job.auto is None or job.auto.mode == job.auto.wanted for job in batch.jobs):
                continue
            for job, rests in zip(tuple(batch.jobs), batch.rows.rests, strict=True):
                if job.auto is not None and rests and job.auto.mode != job.auto.wanted:
                    job.auto.mode = job.auto.wanted
                    self._take_out(name, batch, job)

    def _set_aside(self) -> None:
        """Moves every request with a finished block to the intake, which absorbs it before the next block starts."""
        for name, batch in list(self._batches.items()):
            if MODES[name].fills_blocks:
                for job in [job for job, rests in zip(batch.jobs, batch.rows.rests, strict=True) if rests]:
                    self._take_out(name, batch, job)

    def _take_out(self, name: str, batch: ModeBatch, job: Job) -> None:
        """Moves a job from its batch to the intake, which absorbs the ids that its context lacks."""
        place = batch.jobs.index(job)
        job.context = batch.rows.context.select([place])
        self._keep(name, batch, [i for i in range(len(batch.jobs)) if i != place])
        job.points = []
        self._intake.absorbing.append(job)

    def _make_room(self) -> None:
        """Gives every decoding row pages for its next step, by priority and age; preempts the last if needed."""
        decoding = [(job, batch) for batch in self._batches.values() for job in batch.jobs]
        for job, batch in sorted(decoding, key=lambda pair: pair[0].rank):
            if job not in batch.jobs:  # preempted for an older one
                continue
            # room for the tokens that its context still lacks, and then for a step of any mode
            length = len(job.record.request.prompt_ids) + len(job.record.tokens)
            wanted = length + job.record.request.block_size + 1
            while job in batch.jobs and not self._intake.grow(job, wanted):
                running = [*self._intake.absorbing, *(j for b in self._batches.values() for j in b.jobs)]
                self._preempt(max(running, key=lambda j: j.rank))

    def _preempt(self, job: Job) -> None:
        """Drops a job's state and puts it back in the queue; later it absorbs its prompt and its own tokens again."""
        self._num_preemptions += 1
        self._withdraw(job)
        self._intake.put_back(job)

    def _withdraw(self, job: Job) -> None:
        """Removes a job from the intake and its batch, and frees its state."""
        self._intake.remove(job)
        for name, batch in list(self._batches.items()):
            if job in batch.jobs:
                keep = [i for i, other in enumerate(batch.jobs) if other is not job]
                self._keep(name, batch, keep)
        if job.has_slot:
            self._pool.close_(job.table)
        job.context, job.has_slot, job.silent_steps = None, False, 0

    def _keep(self, name: str, batch: ModeBatch, keep: list[int]) -> None:
        """Keeps only some rows of a batch; an empty batch is dropped."""
        if not keep:
            self._batches.pop(name, None)
            batch.jobs = []
        elif len(keep) < len(batch.jobs):
            batch.rows = batch.rows.select(keep)
            batch.jobs = [batch.jobs[i] for i in keep]

    def _launch_mode(self, mode: DecodingMode, started: list[Job]) -> list[_Launch]:
        """Launches one step of a mode's rows; starting jobs join its batch before the step if they can, else after."""
        alone = []
        # jobs without any token form a batch of their own, because they have no newest token
        for fresh in ([job for job in started if job.record.tokens], [job for job in started if not job.record.tokens]):
            if not fresh:
                continue
            contexts = [job.context for job in fresh if job.context is not None]
            state = contexts[0] if len(contexts) == 1 else join(contexts)
            new = ModeBatch(fresh, mode.steps.start(self.model, tuple(job.request for job in fresh), state))
            for job in fresh:
                job.context = None
            if not new.rows.joins:
                alone.append(new)
            elif mode.name in self._batches:
                self._batches[mode.name].join(new)
            else:
                self._batches[mode.name] = new
        joined = [self._batches[mode.name]] if mode.name in self._batches else []
        return [self._launch(mode, batch) for batch in joined + alone]

    def _launch(self, mode: DecodingMode, batch: ModeBatch) -> _Launch:
        began = time.perf_counter()
        launched = mode.steps.launch(self.model, batch.rows)
        return _Launch(mode, batch, launched, time.perf_counter() - began)

    def _finish(self, launches: list[_Launch]) -> tuple[list[StepOutput], float]:
        """Waits for the devices, once per round; returns the outputs of all steps and the seconds they took."""
        if not launches:
            return [], 0.0
        began = time.perf_counter()
        values = read([launch.launched for launch in launches])
        # device time per step is unknown: divide the wait in proportion to launch time
        waited = (time.perf_counter() - began) / sum(launch.seconds for launch in launches)
        outputs, total = [], 0.0
        for launch, found in zip(launches, values, strict=True):
            began = time.perf_counter()
            stepped = launch.launched.finish(found)
            seconds = launch.seconds * (1 + waited) + time.perf_counter() - began
            total += seconds
            self._chooser.observe(launch.mode.name, len(launch.batch.jobs), seconds)
            outputs += self._take(launch.mode.name, launch.batch, stepped)
        return outputs, total

    def _take(self, name: str, batch: ModeBatch, stepped: BatchStep) -> list[StepOutput]:
        """Hands a step's tokens to its requests; unfinished requests stay in the batch of their mode."""
        batch.rows = stepped.rows
        self._denoiser_calls += sum(stepped.denoiser_calls)
        self._context_calls += sum(stepped.context_calls)
        outputs, keep = [], []
        for place, job in enumerate(batch.jobs):
            output = job.record.take(stepped, place)
            job.silent_steps += 1
            if job.auto is not None:
                job.auto.took_step()
            if stepped.tokens[place]:
                self._chooser.observe_yield(name, job.auto, len(stepped.tokens[place]), job.silent_steps)
                job.silent_steps = 0
            if output.result is None:
                keep.append(place)
            else:
                self._pool.close_(job.table)
            if job.record.watch or output.text or output.tokens or output.result is not None:
                outputs.append(output)
        joined = self._batches.get(name)
        if joined is batch or joined is None:
            self._batches[name] = batch
            self._keep(name, batch, keep)
        elif keep:
            rows = batch.rows if len(keep) == len(batch.jobs) else batch.rows.select(keep)
            joined.join(ModeBatch([batch.jobs[i] for i in keep], rows))
        return outputs
