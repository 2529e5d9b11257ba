"""The decoding requests: a batch for each mode, which takes a step in every round."""

import time
from typing import Any, NamedTuple

from twotower.decoding.modes import DecodingMode
from twotower.decoding.output import DraftCount, StepOutput, add_drafts
from twotower.decoding.step import BatchStep, LaunchedStep, read
from twotower.engine.auto import Chooser
from twotower.engine.failures import failing
from twotower.engine.job import Job, ModeBatch
from twotower.engine.pool import StatePool
from twotower.model.state import join
from twotower.model.two_tower import TwoTower


class Launch(NamedTuple):
    """A launched step of one mode's batch, and the seconds that the launch took."""

    mode: DecodingMode
    batch: ModeBatch
    launched: LaunchedStep
    seconds: float


class Finished(NamedTuple):
    """What a round's steps gave: their outputs, how many rows took a step, and the seconds that the steps took."""

    outputs: list[StepOutput]
    num_rows: int
    seconds: float


class Batches:
    """The batch of each mode between two rounds, by the mode's name in `of_mode`.

    A job on which a step fails has its `error` set and stays where it is until `drop_failed`.
    """

    def __init__(self, model: TwoTower, pool: StatePool, chooser: Chooser) -> None:
        self._model = model
        self._pool = pool
        self._chooser = chooser
        self.of_mode: dict[str, ModeBatch] = {}
        self.denoiser_calls = self.context_calls = 0
        self.drafts: tuple[DraftCount, ...] = ()

    @property
    def jobs(self) -> list[Job]:
        """The jobs of all batches."""
        return [job for batch in self.of_mode.values() for job in batch.jobs]

    def take_out(self, name: str, job: Job) -> None:
        """Removes a job from its batch and gives it its own state again."""
        batch = self.of_mode[name]
        place = batch.jobs.index(job)
        with failing([job]):
            job.context = batch.rows.context.select([place])
        self._keep(name, batch, [other for other in batch.jobs if other is not job])

    def remove(self, job: Job) -> None:
        """Removes a job from its batch, if it is in one; doesn't free its state."""
        for name, batch in list(self.of_mode.items()):
            if job in batch.jobs:
                self._keep(name, batch, [other for other in batch.jobs if other is not job])

    def drop_failed(self) -> None:
        """Removes the jobs that failed."""
        for name, batch in list(self.of_mode.items()):
            self._keep(name, batch, [job for job in batch.jobs if job.error is None])

    def launch(self, mode: DecodingMode, started: list[Job]) -> list[Launch]:
        """Launches one step of a mode's rows; starting jobs join its batch before the step if they can, else after."""
        alone: list[ModeBatch] = []
        # jobs without any token form a batch of their own, because they have no newest token
        for fresh in ([job for job in started if job.record.tokens], [job for job in started if not job.record.tokens]):
            if fresh:
                with failing(fresh):
                    self._start(mode, fresh, alone)
        launches: list[Launch] = []
        joined = [self.of_mode[mode.name]] if mode.name in self.of_mode else []
        for batch in joined + alone:
            with failing(batch.jobs):
                began = time.perf_counter()
                launched = mode.steps.launch(self._model, batch.rows)
                launches.append(Launch(mode, batch, launched, time.perf_counter() - began))
        return launches

    def finish(self, launches: list[Launch]) -> Finished:
        """Waits for the devices, once per round, and hands the tokens of all steps to their requests."""
        outputs: list[StepOutput] = []
        num_rows, seconds = 0, 0.0
        if not launches:
            return Finished(outputs, num_rows, seconds)
        began = time.perf_counter()
        values: list[list[Any]] = []
        with failing([job for launch in launches for job in launch.batch.jobs]):
            values = read([launch.launched for launch in launches])
        # device time per step is unknown: divide the wait in proportion to launch time
        waited = (time.perf_counter() - began) / sum(launch.seconds for launch in launches)
        for launch, found in zip(launches, values, strict=False):  # there are none where the wait failed
            began = time.perf_counter()
            count = len(launch.batch.jobs)
            with failing(launch.batch.jobs):
                stepped = launch.launched.finish(found)
                took = launch.seconds * (1 + waited) + time.perf_counter() - began
                self._chooser.observe(launch.mode.name, count, took)
                self._take(launch.mode.name, launch.batch, stepped, outputs)
                num_rows, seconds = num_rows + count, seconds + took
        return Finished(outputs, num_rows, seconds)

    def _start(self, mode: DecodingMode, fresh: list[Job], alone: list[ModeBatch]) -> None:
        """Puts jobs into their mode's batch, or into one of their own in `alone` where they can't join it yet."""
        contexts = [job.context for job in fresh if job.context is not None]
        state = contexts[0] if len(contexts) == 1 else join(contexts)
        new = ModeBatch(fresh, mode.steps.start(self._model, tuple(job.request for job in fresh), state))
        for job in fresh:
            job.context = None
        if not new.rows.joins:
            alone.append(new)
        elif mode.name in self.of_mode:
            self.of_mode[mode.name].join(new)
        else:
            self.of_mode[mode.name] = new

    def _take(self, name: str, batch: ModeBatch, stepped: BatchStep, outputs: list[StepOutput]) -> None:
        """Hands a step's tokens to its requests; unfinished requests stay in the batch of their mode."""
        batch.rows = stepped.rows
        self.denoiser_calls += sum(stepped.denoiser_calls)
        self.context_calls += sum(stepped.context_calls)
        self.drafts = add_drafts(self.drafts, (count for count in stepped.drafts if count is not None))
        kept = []
        for place, job in enumerate(batch.jobs):
            with failing([job]):
                output = job.record.take(stepped, place)
            if job.error is not None:
                continue
            job.silent_steps += 1
            if job.auto is not None:
                job.auto.took_step()
            if stepped.tokens[place]:
                self._chooser.observe_yield(name, job.auto, len(stepped.tokens[place]), job.silent_steps)
                job.silent_steps = 0
            if output.result is None:
                kept.append(job)
            else:
                self._pool.close_(job.table)
            if job.record.watch or output.text or output.tokens or output.result is not None:
                outputs.append(output)
        joined = self.of_mode.get(name)
        if joined is batch or joined is None:
            self.of_mode[name] = batch
            self._keep(name, batch, kept)
        elif kept:
            with failing(kept):
                joined.join(batch.of(kept))

    def _keep(self, name: str, batch: ModeBatch, kept: list[Job]) -> None:
        """Keeps only some jobs of a batch; an empty batch is dropped."""
        with failing(kept):
            if kept:
                self.of_mode[name] = batch.of(kept)
        if not kept or kept[0].error is not None:
            self.of_mode.pop(name, None)
