"""A plain trainer: one process, float32, resumable. Letters: b batch, t tokens, m masked rows, v vocabulary."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.block_parallel import block_parallel_hidden
from twotower.model.two_tower import TwoTower
from twotower.training.corruption import Corrupted, corrupt
from twotower.training.data import Corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. The learning rate warms up linearly, stays, and over the last `decay_steps` falls linearly to 0."""

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    full_mask_fraction: float = 0.25
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
        if not 0 <= self.full_mask_fraction <= 1:
            raise ValueError(f"full_mask_fraction is {self.full_mask_fraction}, must be in [0, 1]")

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


def denoising_loss(model: TwoTower, x0: Tensor, noisy: Corrupted) -> Tensor:
    """Mean cross-entropy over the masked positions (`masked_mean`); same-position targets, head on masked rows only."""
    hidden = block_parallel_hidden(model, x0, noisy.xt, noisy.level, noisy.block)
    rows = hidden[noisy.masked]  # (m, d)
    total = F.cross_entropy(model.lm_head(rows).float(), x0[noisy.masked], reduction="sum")
    return total / max(rows.shape[0], 1)  # 0, not nan, where a small batch has nothing masked


def denoiser_parameters(model: TwoTower) -> list[torch.nn.Parameter]:
    """Every trained parameter: denoiser tower, its head (once, if tied) and the time modules."""
    modules = (model.denoiser_tower, model.lm_head, model.time_conditioning)
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


class Trainer:
    """Steps a denoiser over a corpus; `folder` holds the state to resume from and the metrics."""

    def __init__(self, model: TwoTower, corpus: Corpus, config: TrainConfig, folder: str | Path) -> None:
        self.model, self.corpus, self.config, self.folder = model, corpus, config, Path(folder)
        self.parameters = denoiser_parameters(model)
        model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        self.loss: Callable[..., Tensor] = torch.compile(denoising_loss) if config.compile else denoising_loss
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
        x0, scored = self.corpus.batch(self.step, c.batch_size, c.seed)
        noisy = corrupt(
            x0,
            scored,
            block_size=self.model.config.block_size,
            mask_token_id=self.model.config.mask_token_id,
            full_mask_fraction=c.full_mask_fraction,
            generator=torch.Generator().manual_seed(c.seed * 1_000_003 + self.step),
        )
        rate = c.rate(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = self.loss(self.model, x0, noisy)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, c.max_grad_norm, error_if_nonfinite=True)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        speed = x0.numel() / (time.perf_counter() - start)
        return StepReport(self.step, loss.item(), norm.item(), rate, speed)

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
