import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.model.two_tower import TwoTower
from twotower.training.config import DenoisingConfig, Phase, Share
from twotower.training.corpus.shards import Corpus
from twotower.training.objectives.denoising import Denoising
from twotower.training.run.trainer import StepReport, trained_parameters

LOSSES = tuple(Share(n, 0.5) for n in ("certainty", "consistency", "distillation", "acceptance", "cross_entropy"))
MASKS = tuple(Share(n, 1.0) for n in ("drafting", "trajectory", "prefix"))


def state(model: TwoTower) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.released_tensors().items()}


@pytest.mark.parametrize(("pattern", "stop"), [("llama", 3), ("M*", 7), ("*E", 4)])
def test_resuming_is_never_having_stopped(
    make: Callable, train: Callable, pattern: str, stop: int, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    straight, broken = tiny(pattern, block_size=8), tiny(pattern, block_size=8)
    expected = train(straight, corpus, tmp_path / "straight")

    def interrupt(report: StepReport) -> None:
        if report.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(broken, corpus, tmp_path / "broken").run(interrupt)
    resumed = tiny(pattern, block_size=8)
    rest = train(resumed, corpus, tmp_path / "broken")
    assert rest[0].step == (stop - 1) // 3 * 3 + 1  # from the last state that was saved
    for ours, theirs in zip(rest, expected[rest[0].step - 1 :], strict=True):
        assert ours[:6] == theirs[:6]
    ours, theirs = state(resumed), state(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert train(tiny(pattern, block_size=8), corpus, tmp_path / "broken") == []


@pytest.mark.parametrize("pattern", ["llama", "M*-E"])
def test_the_context_tower_stays_bit_identical_and_all_else_trains(
    train: Callable, pattern: str, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    model = tiny(pattern, block_size=8)
    before = state(model)
    train(model, corpus, tmp_path, weight_decay=0.1)
    assert not any(p.requires_grad for p in model.context_tower.parameters())
    for name, after in state(model).items():
        same = torch.equal(after, before[name])
        if name.startswith("context"):
            assert same, name
        elif not name.endswith("e_score_correction_bias"):  # which chooses experts and gets no gradient
            assert not same, name


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"lora_rank": 2}])
def test_every_loss_and_mask_resumes_to_the_byte_and_leaves_the_context_tower(
    make: Callable, train: Callable, more: dict[str, Any], tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    what = {"objective": LOSSES, "masks": MASKS, "steps": 6} | more
    straight, broken, resumed, before = (tiny("M*", block_size=8) for _ in range(4))
    expected = train(straight, corpus, tmp_path / "straight", **what)

    def interrupt(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(broken, corpus, tmp_path / "broken", **what).run(interrupt)
    rest = train(resumed, corpus, tmp_path / "broken", **what)
    assert [r[:6] for r in rest] == [r[:6] for r in expected[-len(rest) :]]
    ours, theirs, start = state(resumed), state(straight), state(before)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = [name for name in start if name.startswith("context")]
    assert kept
    assert all(torch.equal(theirs[name], start[name].to(theirs[name].dtype)) for name in kept)
    assert any(not torch.equal(theirs[name], start[name].to(theirs[name].dtype)) for name in set(start) - set(kept))


@pytest.mark.slow
def test_the_loss_goes_down_and_the_text_is_learnt(
    train: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "example_mean"},
        {"reduction": "elbo", "full_mask_fraction": 0.0},
        {"complementary": True, "level_per": "example"},
        {"later_weight": 0.1},
        {"context": "trained", "ar_weight": 0.5},
        {"objective": (Share("cross_entropy", 1.0), Share("distillation", 0.5)), "complementary": True},
        {"objective": LOSSES, "masks": MASKS},
    ],
)
def test_micro_batches_change_no_step(
    train: Callable, options: dict[str, Any], tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
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
    {"objective": LOSSES[:1]}, {"objective": LOSSES[1:2]}, {"objective": LOSSES[2:3]}, {"objective": LOSSES[3:]},
    {"masks": MASKS[:1]}, {"masks": MASKS[1:2]}, {"masks": MASKS[2:]}, {"masks": (Share("noise", 1.0), MASKS[2])},
    {"final_learning_rate": 1e-4, "decay_steps": 3}, {"phases": (Phase(0, 8), Phase(2, 4))},
])  # fmt: skip
def test_every_choice_changes_what_is_learnt(
    train: Callable, change: dict[str, Any], tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    plain, other = tiny("M*", block_size=8), tiny("M*", block_size=8)
    train(plain, corpus, tmp_path / "plain", steps=3, **({"context": "trained"} if "ar_weight" in change else {}))
    train(other, corpus, tmp_path / "other", steps=3, **change)
    assert any(not torch.equal(a, b) for a, b in zip(state(plain).values(), state(other).values(), strict=True))


def test_the_running_mean_is_that_of_the_weights(
    make: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    trainer = make(tiny("llama"), corpus, tmp_path, ema_decay=0.25)
    name = "model.denoiser_tower.norm_f.weight"
    mean = trainer.optimiser.masters[name].detach().clone()
    for step in range(1, 5):
        trainer.train_step()
        decay = min(0.25, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * trainer.optimiser.masters[name].detach()
        torch.testing.assert_close(trainer.optimiser.ema[name], mean)
    assert not torch.equal(mean, trainer.optimiser.masters[name])


@pytest.mark.slow
def test_bf16_computes_coarsely_and_learns_finely(
    make: Callable, train: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    model, exact = tiny("M*-E", block_size=8), tiny("M*-E", block_size=8)
    settings = {"learning_rate": 1e-5, "warmup_steps": 0, "micro_batch_size": 1, "ema_decay": 0.5}
    reports = train(model, corpus, tmp_path / "bf16", bf16=True, **settings)
    expected = train(exact, corpus, tmp_path / "float32", **settings)
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in expected], rel=0.02)
    assert [r.loss for r in reports] != [r.loss for r in expected]
    assert model.denoiser_tower.embeddings.dtype == model.context_tower.norm_f.weight.dtype == torch.bfloat16
    kept = {p.dtype for n, p in model.named_parameters() if n.endswith(("A_log", "dt_bias", ".D", "gate"))}
    assert kept == {torch.float32}
    # eight updates of 1e-5 are too small for bf16 weights, but the float32 masters have them
    resumed = make(tiny("M*-E", block_size=8), corpus, tmp_path / "bf16", bf16=True, **settings)
    resumed.run(lambda report: None)
    start, end = tiny("M*-E", block_size=8), resumed.optimiser.masters["model.lm_head.linear.weight"]
    moved = (end - start.lm_head.weight).abs()
    assert moved.max() > 4e-5
    assert torch.equal(resumed.objective.model.lm_head.weight, end.bfloat16())


@pytest.mark.slow
def test_a_resumed_bf16_run_is_the_same_run(make: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    settings = {"bf16": True, "ema_decay": 0.9, "learning_rate": 1e-2}
    straight = make(tiny("M*", block_size=8), corpus, tmp_path / "straight", **settings)
    straight.run(lambda report: None)
    make(tiny("M*", block_size=8), corpus, tmp_path / "cut", steps=3, **settings).run(lambda report: None)
    resumed = make(tiny("M*", block_size=8), corpus, tmp_path / "cut", **settings)
    resumed.run(lambda report: None)
    ours, theirs = resumed.optimiser.tensors(), straight.optimiser.tensors()
    assert all(torch.equal(ours[g][n], theirs[g][n]) for g in theirs for n in theirs[g])


def test_recomputing_changes_nothing(train: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    plain, other = tiny("M*-E", block_size=8), tiny("M*-E", block_size=8)
    train(plain, corpus, tmp_path / "plain", steps=3)
    train(other, corpus, tmp_path / "other", steps=3, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(state(plain).values(), state(other).values(), strict=True))


@pytest.mark.slow
def test_a_trained_context_moves_and_tied_towers_stay_one(
    train: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
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


def test_metrics_and_reports_agree(train: Callable, tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    reports = train(tiny("llama"), corpus, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [StepReport(**line) for line in lines] == reports
    assert [r.step for r in reports] == list(range(1, 9))
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000008"]


def test_a_tied_head_is_one_parameter(tiny: Callable) -> None:
    model = tiny("llama")
    parameters = list(trained_parameters(Denoising(model, DenoisingConfig())).values())
    assert len({id(p) for p in parameters}) == len(parameters)
    assert sum(p is model.lm_head.weight for p in parameters) == 1
    context = {id(p) for p in model.context_tower.parameters()} | {id(model.context_lm_head.weight)}
    assert not context & {id(p) for p in parameters}
    both = trained_parameters(Denoising(model, DenoisingConfig(context="trained")))
    assert context <= {id(p) for p in both.values()}
