"""The trainer trains whatever has the members of `Objective`."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from twotower.model.two_tower import TwoTower
from twotower.training.corpus.shards import Corpus, CorpusBatch, CorpusRows, write_shard
from twotower.training.objectives.protocol import LossPart, Measured, Objective
from twotower.training.run.ranks import Ranks
from twotower.training.run.trainer import StepReport, TrainConfig, Trainer


@dataclasses.dataclass(frozen=True)
class PullConfig:
    towards: float
    compile: bool = False


class PullRows(NamedTuple):
    ids: Tensor
    denominators: tuple[float]


class Pull(nn.Module):
    """Pulls the embeddings of the tokens it sees towards a number."""

    def __init__(self, model: TwoTower, config: PullConfig) -> None:
        super().__init__()
        self.model, self.config, self.num_updates = model, config, 0
        model.requires_grad_(False).denoiser_tower.embeddings.requires_grad_(True)

    def layer_groups(self) -> list[list[nn.Module]]:
        return []

    def prepare(self, batch: CorpusBatch, step: int, seed: int, device: torch.device) -> PullRows:
        return PullRows(batch.ids.to(device), (float(batch.ids.numel()),))

    def forward(self, rows: PullRows, part: slice, denominators: Sequence[float]) -> LossPart:
        rows_seen = self.model.denoiser_tower.embeddings[rows.ids[part]]
        return LossPart((rows_seen - self.config.towards).square().mean(-1).sum() / denominators[0], None)

    def after_update_(self, loads: Tensor | None) -> None:
        self.num_updates += 1

    def measure(self, batch: CorpusBatch, step: int, device: torch.device) -> dict[str, Measured]:
        with torch.no_grad():
            rows = self.prepare(batch, step, 0, device)
            loss = self(rows, slice(None), (1.0,)).loss
        return {"distance": Measured(float(loss), float(rows.ids.numel()))}

    def decode(self, held_out: Corpus, step: int, ranks: Ranks) -> dict[str, float]:
        return {"rows": float(len(held_out))}


def test_an_objective_is_trained_measured_and_resumed_by_its_protocol_alone(
    tiny: Callable[..., TwoTower], tmp_path: Path
) -> None:
    ids = np.arange(64).reshape(4, 16) % 30 + 4
    write_shard(tmp_path / "corpus" / "0.safetensors", CorpusRows(ids, ids > 0, ids * 0))
    corpus = Corpus(tmp_path / "corpus", vocab_size=40)
    config = TrainConfig(
        steps=20, batch_size=4, micro_batch_size=1, learning_rate=0.02, warmup_steps=0, evaluate_every=10
    )
    pull = Pull(tiny("*"), PullConfig(towards=0.5))
    objective: Objective[PullRows] = pull
    reports: list[StepReport] = []
    Trainer(objective, corpus, config, tmp_path / "out", held_out=corpus).run(reports.append)
    assert pull.num_updates == 20
    assert reports[-1].loss < 0.7 * reports[0].loss
    assert reports[-1].held_out is not None
    assert reports[-1].held_out["distance"] < reports[-1].loss  # measured after the step
    assert reports[-1].held_out["rows"] == 4
    again = Pull(tiny("*"), PullConfig(towards=0.5))
    Trainer(again, corpus, config, tmp_path / "out", held_out=corpus).run(reports.append)
    assert again.num_updates == 0  # the run was over
    assert torch.equal(again.model.denoiser_tower.embeddings, pull.model.denoiser_tower.embeddings)
