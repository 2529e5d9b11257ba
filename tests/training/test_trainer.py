import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.model.two_tower import TwoTower
from twotower.training.data import Corpus, Rows, write_shard
from twotower.training.trainer import StepReport, TrainConfig, Trainer, trained_parameters


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Counting upwards from anywhere: each token is a function of its neighbours."""
    ids = (np.arange(24)[:, None] * 7 + np.arange(24)) % 36 + 4
    write_shard(
        tmp_path / "corpus" / "0.safetensors", Rows(ids, np.broadcast_to(np.arange(24) > 0, ids.shape), ids * 0)
    )
    return Corpus(tmp_path / "corpus", vocab_size=40)


def train(model: TwoTower, corpus: Corpus, folder: Path, **config: Any) -> list[StepReport]:
    reports: list[StepReport] = []
    settings = {"steps": 8, "batch_size": 4, "warmup_steps": 2, "checkpoint_every": 3} | config
    Trainer(model, corpus, TrainConfig(**settings), folder).run(reports.append)
    return reports


def state(model: TwoTower) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.released_tensors().items()}


@pytest.mark.parametrize(("pattern", "stop"), [("llama", 3), ("M*", 7), ("*E", 4)])
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


@pytest.mark.parametrize("pattern", ["llama", "M*-E"])
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
        model, corpus, tmp_path, steps=250, batch_size=12, learning_rate=1e-2, decay_steps=125, checkpoint_every=250
    )
    first, last = (sum(r.loss for r in part) / 10 for part in (reports[:10], reports[-10:]))
    assert last < 0.2 * first
    row = corpus.row(5).ids.tolist()
    result = generate(model, [row[:8]], SamplingParams(max_new_tokens=16, block_size=8))[0]
    assert result.token_ids == row[8:24]
    assert result.stats.denoiser_calls < 16


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "example_mean"},
        {"reduction": "elbo", "full_mask_fraction": 0.0},
        {"complementary": True, "level_per": "example", "later_weight": 0.1},
        {"context": "trained", "ar_weight": 0.5},
    ],
)
def test_micro_batches_change_no_step(options: dict[str, Any], tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    found = []
    for size in (0, 1, 3):
        model = tiny("M*-", dtype=torch.float64, block_size=8)
        reports = train(model, corpus, tmp_path / str(size), steps=2, micro_batch_size=size, **options)
        found.append((reports, state(model)))
    for reports, weights in found[1:]:
        for ours, theirs in zip(reports, found[0][0], strict=True):
            assert ours[:3] == pytest.approx(theirs[:3], rel=1e-6)  # the noise is float32
        for name, expected in found[0][1].items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", [
    {"reduction": "example_mean"}, {"level_per": "example"}, {"later_weight": 0.5}, {"complementary": True},
    {"context": "trained"}, {"context": "tied"}, {"context": "trained", "ar_weight": 1.0}, {"full_mask_fraction": 1.0},
])  # fmt: skip
def test_every_choice_changes_what_is_learnt(
    change: dict[str, Any], tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    plain, other = tiny("M*", block_size=8), tiny("M*", block_size=8)
    train(plain, corpus, tmp_path / "plain", steps=3, **({"context": "trained"} if "ar_weight" in change else {}))
    train(other, corpus, tmp_path / "other", steps=3, **change)
    assert any(not torch.equal(a, b) for a, b in zip(state(plain).values(), state(other).values(), strict=True))


def test_recomputing_changes_nothing(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    plain, other = tiny("M*-E", block_size=8), tiny("M*-E", block_size=8)
    train(plain, corpus, tmp_path / "plain", steps=3)
    train(other, corpus, tmp_path / "other", steps=3, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(state(plain).values(), state(other).values(), strict=True))


def test_a_trained_context_moves_and_tied_towers_stay_one(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    model = tiny("M*", block_size=8)
    before = state(model)
    train(model, corpus, tmp_path / "trained", context="trained", ar_weight=0.5)
    assert all(not torch.equal(v, before[n]) for n, v in state(model).items() if n.startswith("context"))
    model = tiny("M*", block_size=8)
    train(model, corpus, tmp_path / "tied", context="tied")
    after = state(model)
    for name, value in after.items():
        if name.startswith("context_tower"):
            assert torch.equal(value, after[name.replace("context", "denoiser")])
    assert torch.equal(after["context_lm_head.weight"], after["lm_head.weight"])
    resumed = tiny("M*", block_size=8)
    assert train(resumed, corpus, tmp_path / "tied", context="tied") == []
    assert all(torch.equal(v, after[n]) for n, v in state(resumed).items())


def test_metrics_and_reports_agree(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    reports = train(tiny("llama"), corpus, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [StepReport(**line) for line in lines] == reports
    assert [r.step for r in reports] == list(range(1, 9))
    assert not (tmp_path / "state.pt.partial").exists()


def test_a_tied_head_is_one_parameter(tiny: Callable) -> None:
    model = tiny("llama")
    parameters = trained_parameters(model, with_context=False)
    assert len({id(p) for p in parameters}) == len(parameters)
    assert sum(p is model.lm_head.weight for p in parameters) == 1
    context = {id(p) for p in model.context_tower.parameters()} | {id(model.context_lm_head.weight)}
    assert not context & {id(p) for p in parameters}
    assert context <= {id(p) for p in trained_parameters(model, with_context=True)}


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
        ({"level_per": "row"}, "level_per is 'row', must be block or example"),
        ({"later_weight": -1.0}, "later_weight is -1.0, must be 0 or more"),
        ({"micro_batch_size": -1}, "micro_batch_size is -1, must be 0 .the whole batch. or more"),
        ({"reduction": "sum"}, "reduction is 'sum', must be one of masked_mean, example_mean, elbo"),
        ({"reduction": "elbo"}, "reduction is elbo, .*; set full_mask_fraction and later_weight to 0"),
        ({"context": "half"}, "context is 'half', must be frozen, trained or tied"),
        ({"context": "trained", "ar_weight": -1.0}, "ar_weight is -1.0, must be 0 or more"),
        ({"ar_weight": 0.5}, "ar_weight is 0.5 for a frozen context tower; train it"),
    ],
)
def test_bad_settings_raise(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 5} | changed)
