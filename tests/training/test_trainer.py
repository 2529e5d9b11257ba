import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.model.two_tower import TwoTower
from twotower.training.corruption import corrupt
from twotower.training.data import Corpus
from twotower.training.trainer import StepReport, TrainConfig, Trainer, denoiser_parameters, denoising_loss


@pytest.fixture
def corpus() -> Corpus:
    """Counting upwards from anywhere: each token is a function of its neighbours."""
    starts = np.arange(24)[:, None]
    return Corpus((starts * 7 + np.arange(24)) % 36 + 4, np.full(24, 1))


def train(model: TwoTower, corpus: Corpus, folder: Path, **config: Any) -> list[StepReport]:
    reports: list[StepReport] = []
    settings = {"steps": 8, "batch_size": 4, "warmup_steps": 2, "checkpoint_every": 3} | config
    Trainer(model, corpus, TrainConfig(**settings), folder).run(reports.append)
    return reports


def state(model: TwoTower) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.released_tensors().items()}


@pytest.mark.parametrize(("pattern", "stop"), [("llama", 3), ("llama", 7), ("*E", 4)])
def test_resuming_is_never_having_stopped(
    pattern: str, stop: int, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    straight, broken = tiny(pattern, block_size=8), tiny(pattern, block_size=8)
    expected = train(straight, corpus, tmp_path / "straight")

    def interrupt(report: StepReport) -> None:
        if report.step == stop:
            raise KeyboardInterrupt

    config = TrainConfig(steps=8, batch_size=4, warmup_steps=2, checkpoint_every=3)
    with pytest.raises(KeyboardInterrupt):
        Trainer(broken, corpus, config, tmp_path / "broken").run(interrupt)
    resumed = tiny(pattern, block_size=8)
    rest = train(resumed, corpus, tmp_path / "broken")
    assert rest[0].step == (stop - 1) // 3 * 3 + 1  # from the last state that was saved
    for ours, theirs in zip(rest, expected[rest[0].step - 1 :], strict=True):
        assert ours[:4] == theirs[:4]
    ours, theirs = state(resumed), state(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert train(tiny(pattern, block_size=8), corpus, tmp_path / "broken") == []


@pytest.mark.parametrize("pattern", ["llama", "*-E"])
def test_the_context_tower_stays_bit_identical_and_all_else_trains(
    pattern: str, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    model = tiny(pattern, block_size=8)
    before = state(model)
    train(model, corpus, tmp_path, weight_decay=0.1)
    assert not any(p.requires_grad for p in model.context_tower.parameters())
    for name, after in state(model).items():
        same = torch.equal(after, before[name])
        if name.startswith("context"):
            assert same, name
        elif not name.endswith("e_score_correction_bias"):  # which only chooses
            assert not same, name


def test_the_loss_goes_down_and_the_text_is_learnt(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    model = tiny("llama", block_size=8)
    reports = train(
        model, corpus, tmp_path, steps=150, batch_size=12, learning_rate=1e-2, decay_steps=75, checkpoint_every=150
    )
    first, last = (sum(r.loss for r in part) / 10 for part in (reports[:10], reports[-10:]))
    assert last < 0.2 * first
    row = corpus.ids[5].tolist()
    result = generate(model, [row[:8]], SamplingParams(max_new_tokens=16, block_size=8))[0]
    assert result.token_ids == row[8:24]
    assert result.stats.denoiser_calls < 16


def test_the_loss_is_the_mean_over_masked_positions(tiny: Callable, corpus: Corpus) -> None:
    """Against cached decoding, block by block."""
    model = tiny("llama", dtype=torch.float64, block_size=8)
    x0, scored = corpus.batch(0, 3, seed=0)
    noisy = corrupt(
        x0, scored, block_size=8, mask_token_id=3, full_mask_fraction=0.25, generator=torch.Generator().manual_seed(0)
    )
    losses = []
    for row in range(3):
        for index in noisy.block.unique():
            place = (noisy.block == index).nonzero()[:, 0]
            seed = model.prefill(x0[row : row + 1, : place[0]])
            with torch.no_grad():
                logits = model.denoiser_logits(
                    noisy.xt[row : row + 1, place], seed, noisy.level[row : row + 1, place[0]]
                )
            picked = noisy.masked[row, place]
            losses += F.cross_entropy(logits[0, picked], x0[row, place][picked], reduction="none").tolist()
    # `denoiser_logits` rounds to float32
    assert denoising_loss(model, x0, noisy).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_metrics_and_reports_agree(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    reports = train(tiny("llama"), corpus, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [StepReport(**line) for line in lines] == reports
    assert [r.step for r in reports] == list(range(1, 9))
    assert not (tmp_path / "state.pt.partial").exists()


def test_a_tied_head_is_one_parameter(tiny: Callable) -> None:
    model = tiny("llama")
    parameters = denoiser_parameters(model)
    assert len({id(p) for p in parameters}) == len(parameters)
    assert sum(p is model.lm_head.weight for p in parameters) == 1
    context = {id(p) for p in model.context_tower.parameters()} | {id(model.context_lm_head.weight)}
    assert not context & {id(p) for p in parameters}


def test_the_state_of_another_model_raises(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    train(tiny("llama"), corpus, tmp_path)
    with pytest.raises(ValueError, match="belongs to another model; choose an empty output folder"):
        train(tiny("*-"), corpus, tmp_path, steps=9)


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    config = TrainConfig(steps=10, learning_rate=2.0, warmup_steps=4, decay_steps=4)
    assert [config.rate(s) for s in range(10)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    flat = TrainConfig(steps=3, learning_rate=2.0, warmup_steps=0)
    assert [flat.rate(s) for s in range(3)] == [2.0] * 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps is 0, must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1, must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0, must be at least 1"),
        ({"decay_steps": 6}, r"decay_steps is 6, must be in \[0, steps=5\]"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan, must be above 0"),
        ({"full_mask_fraction": 1.5}, r"full_mask_fraction is 1.5, must be in \[0, 1\]"),
    ],
)
def test_bad_settings_raise(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 5} | changed)
