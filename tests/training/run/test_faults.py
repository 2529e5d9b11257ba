import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from twotower.model.two_tower import TwoTower
from twotower.training.corpus.shards import Corpus, CorpusBatch
from twotower.training.objectives.denoising import Denoising, DenoisingConfig, NoisyRows
from twotower.training.objectives.protocol import LossPart
from twotower.training.run.trainer import StepReport, TrainConfig, Trainer


class Broken(Denoising):
    """Fails at some steps: a loss that isn't finite, a gradient that isn't, a loss far above the others."""

    def __init__(self, model: TwoTower, faults: dict[int, str]) -> None:
        super().__init__(model, DenoisingConfig())
        self.faults, self.step = faults, 0

    def prepare(self, batch: CorpusBatch, step: int, seed: int, device: torch.device) -> NoisyRows:
        self.step = step
        return super().prepare(batch, step, seed, device)

    def forward(self, rows: NoisyRows, part: slice, denominators: Sequence[float]) -> LossPart:
        loss = super().forward(rows, part, denominators).loss
        fault = self.faults.get(self.step, "")
        factor = {"": 1.0, "loss": math.nan, "gradient": 1.0, "spike": 9.0}[fault]
        if fault == "gradient":  # finite forward, infinite backward
            first = self.model.denoiser_tower.norm_f.weight[0]
            loss = loss + (first.detach() - first).abs().sqrt()
        return LossPart(loss * factor, None)


def test_harmful_steps_are_skipped_and_counted(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    faults = {3: "loss", 5: "gradient", 20: "spike"}
    model = tiny("llama", block_size=8)
    reports: list[StepReport] = []
    kept: dict[int, list[torch.Tensor]] = {}

    def report(done: StepReport) -> None:
        reports.append(done)
        tensors = [t.clone() for group in trainer.optimiser.tensors().values() for t in group.values()]
        kept[done.step] = [*(t.clone() for t in model.released_tensors().values()), *tensors]

    config = TrainConfig(steps=22, batch_size=4, warmup_steps=2, ema_decay=0.5, spike_factor=3.0)
    trainer = Trainer(Broken(model, faults), corpus, config, tmp_path)
    trainer.run(report)
    assert {r.step - 1: r.fault for r in reports if r.fault} == {3: "not finite", 5: "not finite", 20: "spike"}
    assert [r.num_skipped for r in reports] == [0] * 3 + [1] * 2 + [2] * 15 + [3] * 2
    for step in range(1, 22):
        same = all(torch.equal(a, b) for a, b in zip(kept[step], kept[step + 1], strict=True))
        assert same == (step in faults)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[3]["loss"] is None
    assert lines[5]["grad_norm"] is None
    assert lines[20]["fault"] == "spike"


def test_a_run_that_keeps_failing_stops(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    config = TrainConfig(steps=9, batch_size=4, skip_limit=2, checkpoint_every=2)
    trainer = Trainer(Broken(tiny("llama"), {3: "loss", 4: "loss", 5: "loss"}), corpus, config, tmp_path)
    with pytest.raises(ValueError, match="3 of the last 100 steps were skipped"):
        trainer.run(lambda report: None)
    assert trainer.step == 5
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000004"]
