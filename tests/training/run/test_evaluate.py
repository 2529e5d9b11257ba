from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from twotower.decoding.generate import generate
from twotower.decoding.output import Generation
from twotower.decoding.params import SamplingParams
from twotower.model.two_tower import TwoTower
from twotower.training import held_out
from twotower.training.config import DenoisingConfig, Phase
from twotower.training.corpus.shards import Corpus, CorpusBatch
from twotower.training.objectives.denoising import Denoising
from twotower.training.run.trainer import StepReport, TrainConfig, Trainer


@pytest.mark.slow
def test_held_out_rows_are_measured_alike_however_they_are_cut(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    model = tiny("M*", dtype=torch.float64, block_size=8)
    objective = Denoising(model, DenoisingConfig())
    found = []
    for size in (0, 1, 3):
        config = TrainConfig(steps=4, batch_size=4, micro_batch_size=size, evaluate_every=2)
        reports: list[StepReport] = []
        Trainer(objective, corpus, config, tmp_path / str(size), held_out=corpus).run(reports.append)
        assert [report.held_out is not None for report in reports] == [False, True, False, True]
        found.append(Trainer(objective, corpus, config, tmp_path / "new", held_out=corpus).evaluate())
        expected = sum(
            float(F.cross_entropy(model.context_logits(row.ids[None])[0, :-1], row.ids[1:])) for row in rows(corpus)
        )
        assert found[-1]["ar"] == pytest.approx(expected / len(corpus), rel=1e-5)
        model = tiny("M*", dtype=torch.float64, block_size=8)
        objective = Denoising(model, DenoisingConfig())
        fresh = Trainer(objective, corpus, config, tmp_path / "new", held_out=corpus).evaluate()
        assert fresh["elbo"] > found[-1]["elbo"]  # training helped
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.slow
def test_the_running_mean_is_measured_beside_the_weights(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    def last(ema_decay: float) -> tuple[Trainer, dict[str, float]]:
        config = TrainConfig(steps=4, batch_size=4, learning_rate=1e-2, evaluate_every=4, ema_decay=ema_decay)
        objective, folder = Denoising(tiny("M*", block_size=8), DenoisingConfig()), tmp_path / str(ema_decay)
        trainer = Trainer(objective, corpus, config, folder, held_out=corpus)
        reports: list[StepReport] = []
        trainer.run(reports.append)
        assert reports[-1].held_out is not None
        return trainer, reports[-1].held_out

    trainer, found = last(0.9)
    assert {name: found[name] for name in ("elbo", "ar")} == last(0.0)[1]
    assert found["ema_elbo"] > found["elbo"]  # it is behind
    assert found["ema_ar"] == found["ar"]
    with torch.no_grad():
        for name, value in trainer.optimiser.ema.items():
            trainer.optimiser.masters[name].copy_(value)
    assert trainer.evaluate()["elbo"] == pytest.approx(found["ema_elbo"])


def test_held_out_answers_are_decoded_at_the_phase_s_block_size(
    tiny: Callable, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny("M*", bos_token_id=None, block_size=8), []

    def decode(model: TwoTower, prompts: list[list[int]], params: list[SamplingParams]) -> list[Generation]:
        seen.append((len(prompts), {p.block_size for p in params}))
        return generate(model, prompts, params)

    monkeypatch.setattr(held_out, "generate", decode)
    what = DenoisingConfig(phases=(Phase(0, 8), Phase(1, 4)))
    config = TrainConfig(steps=2, batch_size=4, evaluate_every=1, ema_decay=0.5)
    reports: list[StepReport] = []
    Trainer(Denoising(model, what), corpus, config, tmp_path, held_out=corpus).run(reports.append)
    assert seen == [(16, {8}), (16, {8}), (16, {4}), (16, {4})]
    names = ["elbo", "ar", "tokens_per_nfe", "exact_match"]
    assert [list(report.held_out or {}) for report in reports] == [[*names, *(f"ema_{n}" for n in names)]] * 2


def rows(corpus: Corpus) -> list[CorpusBatch]:
    """Each row, as tensors without a batch."""
    return [CorpusBatch(*(part[0] for part in corpus.batch(range(i, i + 1), 0))) for i in range(len(corpus))]


def test_held_out_rows_need_a_time_to_be_measured(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    objective = Denoising(tiny("*"), DenoisingConfig())
    with pytest.raises(ValueError, match="evaluate_every is 0, must be above 0 with held-out rows, else 0"):
        Trainer(objective, corpus, TrainConfig(steps=1), tmp_path, held_out=corpus)
    with pytest.raises(ValueError, match="evaluate_every is 3, must be above 0 with held-out rows, else 0"):
        Trainer(objective, corpus, TrainConfig(steps=1, evaluate_every=3), tmp_path)
