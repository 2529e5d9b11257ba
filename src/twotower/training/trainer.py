"""A plain trainer: one process, float32, resumable. Letters: b batch, t tokens."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from twotower.model.block_parallel import Hidden, block_parallel_hidden
from twotower.model.two_tower import TwoTower
from twotower.training.corruption import Corrupted, LevelPer, Noise, corrupt
from twotower.training.data import Corpus
from twotower.training.objective import Reduction, loss_sums, next_token_targets, weigh

ContextTraining = Literal["frozen", "trained", "tied"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. The learning rate warms up linearly, stays, and over the last `decay_steps` falls linearly to 0.

    `micro_batch_size` rows are computed at a time (0: all of the step's), without changing the gradient. `reduction`
    is explained at `objective.weigh`, `level_per`, `full_mask_fraction`, `later_weight` and `complementary` at
    `corruption.Noise`, `recompute` at `block_parallel_hidden`. `context` says whether the context tower stays as it is,
    is trained through the seeding, or is one and the same as the denoiser tower; `ar_weight` adds that much of its
    next-token loss.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_size: int = 0
    reduction: Reduction = "masked_mean"
    level_per: LevelPer = "block"
    full_mask_fraction: float = 0.25
    later_weight: float = 0.0
    complementary: bool = False
    context: ContextTraining = "frozen"
    ar_weight: float = 0.0
    recompute: bool = False
    seed: int = 0
    checkpoint_every: int = 100
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not 0 <= self.decay_steps <= self.steps:
            raise ValueError(f"decay_steps is {self.decay_steps}, must be in [0, steps={self.steps}]")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, must be above 0")
        if self.micro_batch_size < 0:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}, must be 0 (the whole batch) or more")
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction is {self.reduction!r}, must be one of {', '.join(get_args(Reduction))}")
        if self.context not in ("frozen", "trained", "tied"):
            raise ValueError(f"context is {self.context!r}, must be frozen, trained or tied")
        if not self.ar_weight >= 0:
            raise ValueError(f"ar_weight is {self.ar_weight}, must be 0 or more")
        if self.ar_weight > 0 and self.context == "frozen":
            raise ValueError(f"ar_weight is {self.ar_weight} for a frozen context tower; train it or set it to 0")
        uniform = self.noise.full_mask_fraction == 0 and self.noise.later_weight == 0
        if self.reduction == "elbo" and not uniform:
            raise ValueError(
                "reduction is elbo, a bound only where t̂ alone decides; set full_mask_fraction and later_weight to 0"
            )

    @property
    def noise(self) -> Noise:
        return Noise(
            level_per=self.level_per,
            full_mask_fraction=self.full_mask_fraction,
            later_weight=self.later_weight,
            complementary=self.complementary,
        )

    def rate(self, step: int) -> float:
        """The learning rate of a 0-based step."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        left = 1.0 if self.decay_steps == 0 else min(1.0, (self.steps - step) / self.decay_steps)
        return self.learning_rate * warm * left


class StepReport(NamedTuple):
    """What one optimiser step did."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float


def trained_parameters(model: TwoTower, *, with_context: bool) -> list[torch.nn.Parameter]:
    """Denoiser tower, its head (once, if tied) and time modules, and the context tower and its head if asked for."""
    modules = [model.denoiser_tower, model.lm_head, model.time_conditioning]
    if with_context:
        modules += [model.context_tower, model.context_lm_head]
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


class Trainer:
    """Steps a denoiser over a corpus; `folder` holds the state to resume from and the metrics."""

    def __init__(self, model: TwoTower, corpus: Corpus, config: TrainConfig, folder: str | Path) -> None:
        self.model, self.corpus, self.config, self.folder = model, corpus, config, Path(folder)
        if config.context == "tied":
            model.context_tower, model.context_lm_head = model.denoiser_tower, model.lm_head
        self.parameters = trained_parameters(model, with_context=config.context != "frozen")
        model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        # The heads stay as they are: how many rows are masked changes at every step
        self.towers: Callable[..., Hidden] = (
            torch.compile(block_parallel_hidden) if config.compile else block_parallel_hidden
        )
        self.step = 0

    def run(self, report: Callable[[StepReport], None]) -> None:
        """Trains to `config.steps`, resuming from `folder` if it holds a state; calls `report` after each step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "state.pt").exists():
            self._load()
            self._drop_later_metrics()
        with (self.folder / "metrics.jsonl").open("a") as metrics:
            while self.step < self.config.steps:
                done = self.train_step()
                metrics.write(json.dumps(done._asdict()) + "\n")
                metrics.flush()
                report(done)
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self._save()

    def train_step(self) -> StepReport:
        """One optimiser step; rows and noise depend on (seed, step) alone."""
        start = time.perf_counter()
        c = self.config
        x0, scored, document, samples = self.corpus.batch(self.step, c.batch_size, c.seed)
        noisy = corrupt(
            x0,
            scored,
            samples,
            seed=c.seed,
            noise=c.noise,
            block_size=self.model.config.block_size,
            mask_token_id=self.model.config.mask_token_id,
            document=document,
        )
        rate = c.rate(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = self._backward(x0, noisy)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, c.max_grad_norm, error_if_nonfinite=True)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        speed = x0.numel() / (time.perf_counter() - start)
        return StepReport(self.step, loss, norm.item(), rate, speed)

    def _backward(self, x0: Tensor, noisy: Corrupted) -> float:
        """Adds the step's gradient, one micro-batch after the other, and returns its loss."""
        c = self.config
        weight, denominator = weigh(noisy, c.reduction)
        ar_denominator = float(next_token_targets(x0, noisy)[1].sum())
        views = weight.unflatten(0, (-1, len(x0)))
        size, total = c.micro_batch_size or len(x0), 0.0
        for start in range(0, len(x0), size):
            part = slice(start, start + size)
            sums = loss_sums(
                self.model,
                x0[part],
                noisy.rows(part),
                views[:, part].flatten(0, 1),
                with_ar=c.ar_weight > 0,
                recompute=c.recompute,
                towers=self.towers,
            )
            # 0, not nan, where a small batch has nothing masked
            loss = sums.denoising / max(denominator, 1)
            if sums.ar is not None:
                loss = loss + c.ar_weight * sums.ar / max(ar_denominator, 1)
            loss.backward()
            total += loss.item()
        return total

    def _save(self) -> None:
        state: dict[str, Any] = {
            "step": self.step,
            "parameters": [p.data for p in self.parameters],
            "optimiser": self.optimiser.state_dict(),
        }
        partial = self.folder / "state.pt.partial"
        torch.save(state, partial)
        os.replace(partial, self.folder / "state.pt")  # a kill leaves the old state or the new one

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True)
        if [p.shape for p in state["parameters"]] != [p.shape for p in self.parameters]:
            raise ValueError(f"{self.folder}/state.pt belongs to another model; choose an empty output folder")
        for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
            parameter.data.copy_(saved)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    def _drop_later_metrics(self) -> None:
        """Steps after the saved state are run again: their lines would stand twice."""
        file = self.folder / "metrics.jsonl"
        if file.exists():
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(line for line in lines if line.endswith("\n") and self._is_done(line)))

    def _is_done(self, line: str) -> bool:
        return json.loads(line)["step"] <= self.step
