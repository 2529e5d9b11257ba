"""The training loop, for one process or many ranks, which can be stopped and resumed. It knows of what is learnt only
the protocol `Objective`."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from twotower.errors import SettingError
from twotower.training.config import TrainConfig
from twotower.training.corpus.row_length import check_row_length
from twotower.training.corpus.shards import Corpus, CorpusBatch
from twotower.training.held_out import measure
from twotower.training.objectives.protocol import LossPart, Objective, ObjectiveConfig
from twotower.training.run.checkpointing import Checkpoints, latest_state, read_progress, read_tensors_, stored_groups
from twotower.training.run.identity import (
    all_settings,
    changes,
    check_changes,
    corpus_identity,
    model_identity,
    settings_identity,
)
from twotower.training.run.optimiser import Optimiser, total_norm
from twotower.training.run.precision import coarse_parameters, compute_in_
from twotower.training.run.ranks import Ranks
from twotower.training.run.record import append, moved, this_call
from twotower.training.run.schedule import Fault, rise
from twotower.training.run.sharding import drop_gathered_, shard_
from twotower.training.run.weights import TensorStream, fill_


class StepReport(NamedTuple):
    """Optimiser step number `step`, from 1: its `loss` in nats, `grad_norm`, the gradient's norm before clipping, its
    `learning_rate`, and `tokens_per_second` over all ranks. `fault` says why the step was skipped, None if it was not;
    `num_skipped` counts the skipped steps so far. `held_out` has the measurements of held-out rows after it, by name,
    None where none were made."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    fault: Fault | None
    num_skipped: int
    tokens_per_second: float
    held_out: dict[str, float] | None = None

    def to_json(self) -> str:
        """One line of JSON, with null for numbers that are not finite, which JSON cannot hold."""
        values = self._asdict().items()
        return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values})


class Start(NamedTuple):
    """What a run goes on from: a saved `state`, or None at its beginning; the steps and `tokens` that are done, the
    mean `loss` of the last ones, None before the first, and `notes` of what is other than it was."""

    state: Path | None
    step: int
    tokens: int
    loss: float | None
    notes: tuple[str, ...]


def check_run(config: TrainConfig, objective: ObjectiveConfig, num_ranks: int, *, has_held_out: bool) -> None:
    """Raises ValueError where settings contradict each other."""
    if has_held_out != (config.evaluate_every > 0):
        raise SettingError("evaluate_every", config.evaluate_every, "above 0 with held-out rows, else 0")
    if config.shard and num_ranks == 1:
        raise SettingError("shard", True, "left out for one process", "start several with torchrun")
    if config.shard and objective.compile:
        raise SettingError("shard", True, "left out with compile, which can't trace gathered weights", "drop one")


class Trainer:
    """Trains an objective on a corpus. `folder` keeps the metrics and the saved states, from which a run resumes.

    Every rank makes a trainer and calls `run`. Each has the whole model or, with `config.shard`, a model on the meta
    device; `weights` then streams its released tensors, and each rank keeps its shards only. `held_out` are rows to
    measure every `config.evaluate_every` steps. Raises ValueError, before anything is written, for settings that
    contradict each other, and SettingError for rows longer than the model's positions unless `config.past_positions`.
    """

    def __init__(
        self,
        objective: Objective[Any],
        corpus: Corpus,
        config: TrainConfig,
        folder: str | Path,
        ranks: Ranks | None = None,
        *,
        held_out: Corpus | None = None,
        weights: Callable[[], TensorStream] | None = None,
    ) -> None:
        self.objective, self.corpus, self.config, self.folder = objective, corpus, config, Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, must be a folder to write to; give another")
        self.ranks, self.held_out = ranks or Ranks(), held_out
        check_run(config, objective.config, self.ranks.size, has_held_out=held_out is not None)
        for rows in (corpus, held_out):
            if rows is not None:
                check_row_length("row_length", rows.length, objective.model.config, config.past_positions)
        self.share = self.ranks.share(config.batch_size)
        self._run = model_identity(objective, weights) | settings_identity(objective.config)
        self._run |= dataclasses.asdict(config) | {"corpus": corpus_identity(corpus)}
        self.optimiser = _optimiser(objective, config, self.ranks, weights)
        self.guard, self.schedule = config.guard(), config.schedule
        self.checkpoints = Checkpoints(self.folder, self.ranks)
        self.step = self.samples = 0
        self.calls: list[dict[str, Any]] = []

    def run(
        self,
        report: Callable[[StepReport], None],
        stop: Callable[[], bool] = lambda: False,
        *,
        begin: Callable[[Start], None] = lambda start: None,
        inputs: Mapping[str, Any] | None = None,
        allow_changes: bool = False,
    ) -> bool:
        """Trains up to `config.steps`, from the saved state in `folder` if there is one; `report` gets every step.

        Writes `metrics.jsonl`, one step a line, and a state every `config.checkpoint_every` steps and after the last.
        `stop` is asked after every step: once it is true on any rank, all save the state of that step and return.
        `begin` gets what the run goes on from. `runs.jsonl` and the states keep a record of this call, with the
        settings and `inputs`, which say what else it was given.

        Returns whether all steps are done. Raises ValueError where the state belongs to a run with another model or,
        unless `allow_changes`, with other settings that decide what is learnt; where a state can't be written, and
        where too many of the last steps had to be skipped.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        begin(self._start(inputs or {}, allow_changes))
        try:
            with (self.folder / "metrics.jsonl").open("a") as metrics:
                stopping = self.ranks.any(stop())
                while not stopping and self.step < self.config.steps:
                    done = self.train_step()
                    if self._due(self.config.evaluate_every):
                        done = done._replace(held_out=self.evaluate())
                    if self.ranks.rank == 0:
                        metrics.write(done.to_json() + "\n")
                        metrics.flush()
                    report(done)
                    self.checkpoints.poll()
                    stopping = self.ranks.any(stop())
                    if stopping or self._due(self.config.checkpoint_every):
                        self.checkpoints.save(self.step, self.optimiser.tensors(), self._progress())
        finally:
            self.checkpoints.finish()
        self.ranks.wait()
        return self.step >= self.config.steps

    def _start(self, inputs: Mapping[str, Any], allow_changes: bool) -> Start:
        """Resumes from the saved state, if there is one, and records this call."""
        state, notes = latest_state(self.folder), list[str]()
        if state is not None:
            notes += self._resume(state, allow_changes)
        if self.ranks.rank == 0:
            settings = {**inputs, **dataclasses.asdict(self.config), **all_settings(self.objective.config)}
            call = this_call(settings, self.ranks, self.step)
            notes += moved(self.calls[-1], call) if self.calls else []
            if self.step < self.config.steps:
                self.calls = [*self.calls, call]
                append(self.folder, call)
            dropped = _drop_later_metrics(self.folder / "metrics.jsonl", self.step)
            notes += [f"{dropped} later lines of metrics.jsonl are made again"] if dropped else []
        return Start(state, self.step, self.samples * self.corpus.length, self.guard.recent_loss, tuple(notes))

    def train_step(self) -> StepReport:
        """One optimiser step. Its rows and their noise depend on the seed and the number of rows seen alone."""
        start = time.perf_counter()
        c = self.config
        mine = range(self.samples + self.share.start, self.samples + self.share.stop)
        batch = self.corpus.batch(mine, c.seed)
        loss, loads = self._backward(batch)
        gradients = self.optimiser.gradients()
        self.ranks.sum_(gradients)
        norm = total_norm(gradients)
        rate = self.schedule.rate(self.step)
        fault = self.guard.judge(self.step, loss, norm)
        if fault is None:
            self.optimiser.update(rate, c.max_grad_norm, norm)
            self.objective.after_update_(loads)
            self.optimiser.average(self.step + 1 - self.guard.num_skipped)
        self.optimiser.clear()
        self.step += 1
        self.samples += c.batch_size
        speed = c.batch_size * self.corpus.length / (time.perf_counter() - start)
        return StepReport(self.step, loss, norm, rate, fault, self.guard.num_skipped, speed)

    def evaluate(self) -> dict[str, float]:
        """Measures the held-out rows: nats per token as `Objective.measure` names them, and what `Objective.decode`
        gives. With `ema_decay` also the same under the running mean of the weights, by names that begin with `ema_`."""
        found = self._measured()
        if self.optimiser.ema:
            drop_gathered_(self.objective)
            with self.optimiser.averaged():
                found |= {f"ema_{name}": value for name, value in self._measured().items()}
            drop_gathered_(self.objective)
        return found

    def _measured(self) -> dict[str, float]:
        assert self.held_out is not None
        at_once = self.config.micro_batch_size or len(self.share)
        step, device = self.step - 1, self.ranks.device
        found = measure(self.held_out, at_once, self.ranks, lambda batch: self.objective.measure(batch, step, device))
        # FSDP gathers shards in its modules' forward hooks, which decoding does not run.
        return found if self.config.shard else found | self.objective.decode(self.held_out, step, self.ranks)

    def _due(self, every: int) -> bool:
        """Whether the step just made is one of every `every` or the last; never if `every` is 0."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _backward(self, batch: CorpusBatch) -> tuple[float, Tensor | None]:
        """Accumulates this rank's gradient, one micro-batch after the other; returns the loss and the expert loads,
        both summed over all ranks."""
        rows = self.objective.prepare(batch, self.step, self.config.seed, self.ranks.device)
        denominators = self.ranks.total(rows.denominators)
        num_rows, total = len(batch.ids), 0.0
        loads: Tensor | None = None
        size = self.config.micro_batch_size or num_rows
        for start in range(0, num_rows, size):
            piece: LossPart = self.objective(rows, slice(start, start + size), denominators)
            piece.loss.backward()
            total += piece.loss.item()
            if piece.loads is not None:
                loads = piece.loads if loads is None else loads + piece.loads
        if loads is not None:
            self.ranks.sum_([loads])
        return self.ranks.total([total])[0], loads

    def _progress(self) -> dict[str, Any]:
        tokens = self.samples * self.corpus.length
        counts = {"step": self.step, "samples": self.samples, "tokens": tokens}
        return counts | {"guard": self.guard.state(), "run": self._run, "calls": self.calls}

    def _resume(self, state: Path, allow_changes: bool) -> list[str]:
        """Goes on from a state; returns what is other than it was."""
        progress = read_progress(state)
        found = changes(state, progress["run"], self._run, progress["step"])
        check_changes(state, found, allowed=allow_changes)
        tensors = self.optimiser.tensors()
        if "ema" not in stored_groups(state):
            tensors.pop("ema", None)
        read_tensors_(state, tensors, self.ranks)
        self.optimiser.round_()
        if "ema" not in tensors:  # the run had none so far: it begins here
            for name, mean in self.optimiser.ema.items():
                mean.copy_(self.optimiser.masters[name])
        self.step, self.samples = progress["step"], progress["samples"]
        self.guard = self.guard.restored(progress["guard"])
        self.calls = progress.get("calls", [])
        notes = [str(change) for change in found]
        if "learning_rate" not in progress["run"]:
            notes.append("an older version saved it without learning rate, batch size and the like: give those of then")
        if rates := rise(progress["run"], self.schedule, self.step):
            notes.append(f"the learning rate, which had begun to fall, rises from {rates[0]:.2g} to {rates[1]:.2g}")
        return notes


def _optimiser(
    objective: Objective[Any],
    config: TrainConfig,
    ranks: Ranks,
    weights: Callable[[], TensorStream] | None,
) -> Optimiser:
    """Rounds and shards the objective's parameters as the run asks for, and makes the optimiser that trains them."""
    assert isinstance(objective, nn.Module)
    model, exact = objective.model, {}
    coarse = {id(p) for p in coarse_parameters(model, torch.bfloat16)}
    named = trained_parameters(objective)
    if config.bf16 and not config.shard:
        exact = {name: p.detach().clone() for name, p in named.items() if id(p) in coarse}
    if config.bf16:
        compute_in_(model, torch.bfloat16, named.values() if config.shard else ())
    if config.shard:
        dtype = torch.bfloat16 if config.bf16 else None
        whole = [p for p in model.parameters() if id(p) not in coarse]
        shard_(objective, objective.layer_groups(), ranks, dtype=dtype, whole=whole)
        if weights is not None:
            fill_(objective, weights(), ranks)
    return Optimiser(trained_parameters(objective), exact, weight_decay=config.weight_decay, ema_decay=config.ema_decay)


def trained_parameters(objective: Objective[Any]) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is trained; a parameter with several names has the first."""
    return {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}


def _drop_later_metrics(file: Path, step: int) -> int:
    """Drops the lines of steps after `step`, which are run again and would otherwise have two lines; returns their
    number."""
    if not file.exists():
        return 0
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        partial = file.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, file)
    return len(lines) - len(kept)
