import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from twotower.decoding.generate import generate
from twotower.decoding.output import Generation
from twotower.decoding.params import SamplingParams
from twotower.model.two_tower import TwoTower
from twotower.training import held_out
from twotower.training.corpus.shards import Corpus, CorpusRows, RowBatch, write_shard
from twotower.training.denoising import Denoising, DenoisingConfig, NoisyRows, Phase
from twotower.training.losses import LossPart
from twotower.training.run.ranks import Ranks
from twotower.training.run.trainer import StepReport, TrainConfig, Trainer, trained_parameters


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Counting upwards from anywhere: each token is a function of its neighbours."""
    ids = (np.arange(24)[:, None] * 7 + np.arange(24)) % 36 + 4
    write_shard(
        tmp_path / "corpus" / "0.safetensors", CorpusRows(ids, np.broadcast_to(np.arange(24) > 0, ids.shape), ids * 0)
    )
    return Corpus(tmp_path / "corpus", vocab_size=40)


def make(model: TwoTower, corpus: Corpus, folder: Path, **settings: Any) -> Trainer:
    """A trainer with settings of both kinds."""
    names = {f.name for f in dataclasses.fields(DenoisingConfig)}
    what = DenoisingConfig(**{k: v for k, v in settings.items() if k in names})
    run = {"steps": 8, "batch_size": 4, "warmup_steps": 2, "checkpoint_every": 3}
    config = TrainConfig(**run | {k: v for k, v in settings.items() if k not in names})
    return Trainer(Denoising(model, what), corpus, config, folder)


def train(model: TwoTower, corpus: Corpus, folder: Path, **settings: Any) -> list[StepReport]:
    reports: list[StepReport] = []
    make(model, corpus, folder, **settings).run(reports.append)
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
        {"complementary": True, "level_per": "example"},
        {"later_weight": 0.1},
        {"context": "trained", "ar_weight": 0.5},
        {"distil_weight": 0.5, "complementary": True},
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
    {"distil_weight": 1.0},
    {"final_learning_rate": 1e-4, "decay_steps": 3}, {"phases": (Phase(0, 8), Phase(2, 4))},
])  # fmt: skip
def test_every_choice_changes_what_is_learnt(
    change: dict[str, Any], tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    plain, other = tiny("M*", block_size=8), tiny("M*", block_size=8)
    train(plain, corpus, tmp_path / "plain", steps=3, **({"context": "trained"} if "ar_weight" in change else {}))
    train(other, corpus, tmp_path / "other", steps=3, **change)
    assert any(not torch.equal(a, b) for a, b in zip(state(plain).values(), state(other).values(), strict=True))


class Broken(Denoising):
    """Fails at some steps: a loss that isn't finite, a gradient that isn't, a loss far above the others."""

    def __init__(self, model: TwoTower, faults: dict[int, str]) -> None:
        super().__init__(model, DenoisingConfig())
        self.faults, self.step = faults, 0

    def prepare(self, batch: RowBatch, step: int, seed: int, device: torch.device) -> NoisyRows:
        self.step = step
        return super().prepare(batch, step, seed, device)

    def forward(self, rows: NoisyRows, part: slice, denominators: Sequence[float]) -> LossPart:
        loss = super().forward(rows, part, denominators).loss
        fault = self.faults.get(self.step, "")
        factor = {"": 1.0, "loss": math.nan, "gradient": 1.0, "spike": 9.0}[fault]
        if fault == "gradient":  # finite forward, infinite backward
            loss = (
                loss + (self.model.denoiser_tower.norm_f[0].detach() - self.model.denoiser_tower.norm_f[0]).abs().sqrt()
            )
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


def rows(corpus: Corpus) -> list[RowBatch]:
    """Each row, as tensors without a batch."""
    return [RowBatch(*(part[0] for part in corpus.batch(range(i, i + 1), 0))) for i in range(len(corpus))]


def test_held_out_rows_need_a_time_to_be_measured(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    objective = Denoising(tiny("*"), DenoisingConfig())
    with pytest.raises(ValueError, match="evaluate_every is 0, must be above 0 with held-out rows, else 0"):
        Trainer(objective, corpus, TrainConfig(steps=1), tmp_path, held_out=corpus)
    with pytest.raises(ValueError, match="evaluate_every is 3, must be above 0 with held-out rows, else 0"):
        Trainer(objective, corpus, TrainConfig(steps=1, evaluate_every=3), tmp_path)


def test_sharding_needs_ranks_and_no_compiler(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard is set for one process, must be for several ranks"):
        make(tiny("*"), corpus, tmp_path, shard=True)
    objective = Denoising(tiny("*"), DenoisingConfig(compile=True))
    with pytest.raises(ValueError, match="shard and compile are both set"):
        Trainer(objective, corpus, TrainConfig(steps=1, shard=True), tmp_path, Ranks(0, 2))


def test_the_running_mean_is_that_of_the_weights(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    trainer = make(tiny("llama"), corpus, tmp_path, ema_decay=0.25)
    name = "model.denoiser_tower.norm_f"
    mean = trainer.optimiser.masters[name].detach().clone()
    for step in range(1, 5):
        trainer.train_step()
        decay = min(0.25, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * trainer.optimiser.masters[name].detach()
        torch.testing.assert_close(trainer.optimiser.ema[name], mean)
    assert not torch.equal(mean, trainer.optimiser.masters[name])


def test_bf16_computes_coarsely_and_learns_finely(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    model, exact = tiny("M*-E", block_size=8), tiny("M*-E", block_size=8)
    settings = {"learning_rate": 1e-5, "warmup_steps": 0, "micro_batch_size": 1, "ema_decay": 0.5}
    reports = train(model, corpus, tmp_path / "bf16", bf16=True, **settings)
    expected = train(exact, corpus, tmp_path / "float32", **settings)
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in expected], rel=0.02)
    assert [r.loss for r in reports] != [r.loss for r in expected]
    assert model.denoiser_tower.embeddings.dtype == model.context_tower.norm_f.dtype == torch.bfloat16
    kept = {p.dtype for n, p in model.named_parameters() if n.endswith(("A_log", "dt_bias", ".D", "gate"))}
    assert kept == {torch.float32}
    # eight updates of 1e-5 are far below bf16's steps, and in the weights all the same
    resumed = make(tiny("M*-E", block_size=8), corpus, tmp_path / "bf16", bf16=True, **settings)
    resumed.run(lambda report: None)
    start, end = tiny("M*-E", block_size=8), resumed.optimiser.masters["model.lm_head.weight"]
    moved = (end - start.lm_head.weight).abs()
    assert moved.max() > 4e-5
    assert torch.equal(resumed.objective.model.lm_head.weight, end.bfloat16())


def test_a_resumed_bf16_run_is_the_same_run(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    settings = {"bf16": True, "ema_decay": 0.9, "learning_rate": 1e-2}
    straight = make(tiny("M*", block_size=8), corpus, tmp_path / "straight", **settings)
    straight.run(lambda report: None)
    make(tiny("M*", block_size=8), corpus, tmp_path / "cut", steps=3, **settings).run(lambda report: None)
    resumed = make(tiny("M*", block_size=8), corpus, tmp_path / "cut", **settings)
    resumed.run(lambda report: None)
    ours, theirs = resumed.optimiser.tensors(), straight.optimiser.tensors()
    assert all(torch.equal(ours[g][n], theirs[g][n]) for g in theirs for n in theirs[g])


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


def test_the_state_of_another_model_raises(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    train(tiny("llama"), corpus, tmp_path)
    with pytest.raises(
        ValueError, match=r"config.\w+ is .*, but .* is of a run with .*; give that again, or another output folder"
    ):
        train(tiny("*-"), corpus, tmp_path, steps=9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": -1}, "batch_size is -1, must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0, must be at least 1"),
        ({"steps": 0}, "steps is 0, must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, must be above 0"),
        ({"seed": -1}, r"seed is -1, must be in \[0, 2\*\*63\); give another"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, must be 0 or more"),
        ({"weight_decay": math.nan}, "weight_decay is nan, must be 0 or more"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0, must be above 0"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0, must be in \[0, 1\)"),
        ({"spike_factor": 0.5}, "spike_factor is 0.5, must be above 1"),
        ({"micro_batch_size": -1}, "micro_batch_size is -1, must be 0 .the whole batch. or more"),
    ],
)
def test_bad_settings_raise(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 5} | changed)


def test_an_output_folder_that_is_a_file_raises(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, must be a folder to write to; give another"):
        make(tiny("*"), corpus, tmp_path / "file")
