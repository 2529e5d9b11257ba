"""Two gloo processes against one, on tiny models in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from twotower.model.two_tower import TwoTower
from twotower.training.config import Share
from twotower.training.corpus.shards import Corpus, CorpusBatch, CorpusRows, write_shard
from twotower.training.objectives.denoising import Denoising, DenoisingConfig, NoisyRows
from twotower.training.run.checkpointing import latest_state, read_tensors_
from twotower.training.run.ranks import Ranks, joined
from twotower.training.run.trainer import TrainConfig, Trainer, trained_parameters

pytestmark = pytest.mark.slow

LOSSES = tuple(Share(n, 0.5) for n in ("certainty", "consistency", "distillation", "acceptance", "cross_entropy"))
MASKS = tuple(Share(n, 1.0) for n in ("drafting", "trajectory", "prefix"))
RUN = {
    "evaluate_every": 1,
    "batch_size": 4,
    "warmup_steps": 2,
    "checkpoint_every": 3,
    "learning_rate": 1e-2,
    "ema_decay": 0.5,
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Rows with different numbers of scored positions and documents: a mean of the ranks' means would differ."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 40, (8, 20))
    scored = np.arange(20) >= rng.integers(0, 15, (8, 1))
    write_shard(
        tmp_path / "corpus" / "0.safetensors", CorpusRows(ids, scored, np.sort(rng.integers(0, 3, (8, 20)), axis=1))
    )
    return tmp_path / "corpus"


class Recording(Denoising):
    """Records each sample's noise."""

    seen: dict[str, list[Any]]

    def prepare(self, batch: CorpusBatch, step: int, seed: int, device: torch.device) -> NoisyRows:
        rows = super().prepare(batch, step, seed, device)
        views = (v.unflatten(0, (-1, len(batch.ids))).transpose(0, 1).tolist() for v in rows.noisy[:4])
        noise = zip(batch.samples.tolist(), *views, strict=True)
        self.seen |= {str(sample): parts for sample, *parts in noise}
        return rows


def train(
    model: TwoTower, corpus: Path, folder: Path, settings: dict[str, Any], what: dict[str, Any], ranks: Ranks
) -> None:
    """Trains, and writes each rank's noise into `folder`; the steps are in metrics.jsonl."""
    objective = Recording(model, DenoisingConfig(**what))
    objective.seen = {}
    config = TrainConfig(**RUN | settings)
    opened = Corpus(corpus, vocab_size=40)
    trainer = Trainer(objective, opened, config, folder, ranks, held_out=opened)
    if config.shard:
        _check_shards(trainer)
    trainer.run(lambda report: None)
    (folder / f"noise-{ranks.rank}.json").write_text(json.dumps(objective.seen))


def _check_shards(trainer: Trainer) -> None:
    """Half of every projection, its running mean and moments; all of a router."""
    tensors = trainer.optimiser.tensors()
    for group in ("weights", "ema", "exp_avg"):
        weight = tensors[group].get("model.lm_head.linear.weight")
        if weight is None:  # of low rank: frozen, sharded all the same
            weight = trainer.objective.model.lm_head.weight
        assert isinstance(weight, DTensor)
        assert weight.to_local().shape[0] == weight.shape[0] // 2
    routers = [t for name, t in trainer.objective.model.named_parameters() if name.endswith((".gate", "A_log"))]
    assert routers
    assert not any(isinstance(t, DTensor) for t in routers)


def one_of_two(rank: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/init-{arguments[3]['steps']}"
    with joined(rank, 2, torch.device("cpu"), init_method=init) as ranks:
        train(*arguments, ranks)


def two(model: TwoTower, corpus: Path, folder: Path, settings: dict[str, Any], what: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    arguments = (folder, (model, corpus, folder, settings, what))
    torch.multiprocessing.start_processes(one_of_two, arguments, nprocs=2, start_method="fork")


def result(model: TwoTower, folder: Path, what: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The last state's weights and running means, and the losses."""
    state = latest_state(folder)
    assert state is not None
    found = {}
    trained = trained_parameters(Denoising(model, DenoisingConfig(**what)))
    for group in ("weights", "ema", "exp_avg_sq"):
        tensors = {name: torch.empty_like(p) for name, p in trained.items()}
        read_tensors_(state, {group: tensors}, Ranks())
        found |= {f"{group}.{name}": tensor for name, tensor in tensors.items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [[line["loss"], line["grad_norm"], *line["held_out"].values()] for line in lines]
    return found | {"metrics": torch.tensor(numbers, dtype=torch.float64)}


def noise(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in folder.glob("noise-*.json"):
        found |= json.loads(file.read_text())
    return found


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, {"objective": LOSSES, "masks": MASKS}),
        ({"micro_batch_size": 1}, {"context": "trained", "ar_weight": 0.5, "reduction": "example_mean"}),
        ({"shard": True}, {"objective": LOSSES, "masks": MASKS, "recompute": True}),
        ({"shard": True}, {"lora_rank": 2}),
        ({"shard": True}, {"context": "tied"}),
        ({"shard": True, "micro_batch_size": 1}, {"context": "trained", "ar_weight": 0.5, "complementary": True}),
    ],
)
def test_two_ranks_are_one_process(
    settings: dict[str, Any], what: dict[str, Any], tiny: Callable, corpus: Path, tmp_path: Path
) -> None:
    make = lambda: tiny("M*-E", dtype=torch.float64, block_size=4)  # noqa: E731
    train(make(), corpus, tmp_path / "one", {"steps": 4}, what, Ranks())
    two(make(), corpus, tmp_path / "two", {"steps": 4} | settings, what)
    assert noise(tmp_path / "two") == noise(tmp_path / "one")
    expected, found = result(make(), tmp_path / "one", what), result(make(), tmp_path / "two", what)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_bf16_on_two_ranks_is_bf16_on_one(tiny: Callable, corpus: Path, tmp_path: Path) -> None:
    make = lambda: tiny("M*-E", block_size=4)  # noqa: E731
    settings = {"steps": 2, "bf16": True, "learning_rate": 1e-6}
    train(make(), corpus, tmp_path / "exact", settings | {"bf16": False}, {}, Ranks())
    train(make(), corpus, tmp_path / "one", settings, {}, Ranks())
    two(make(), corpus, tmp_path / "two", settings, {})
    two(make(), corpus, tmp_path / "sharded", settings | {"shard": True}, {})
    exact, one, both, sharded = (
        result(make(), tmp_path / name, {})["metrics"] for name in ("exact", "one", "two", "sharded")
    )
    torch.testing.assert_close(sharded, both, rtol=1e-4, atol=0)
    torch.testing.assert_close(both, one, rtol=1e-2, atol=0)  # products of other shapes round elsewhere
    assert (one - exact).abs().max() > 1e-4 * exact.max()


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_goes_on_with_another_number_of_ranks(shard: bool, tiny: Callable, corpus: Path, tmp_path: Path) -> None:
    make = lambda: tiny("M*", dtype=torch.float64, block_size=4)  # noqa: E731
    train(make(), corpus, tmp_path / "one", {"steps": 9}, {}, Ranks())
    whole = noise(tmp_path / "one")
    folder = tmp_path / "moved"
    train(make(), corpus, folder, {"steps": 3}, {}, Ranks())
    two(make(), corpus, folder, {"steps": 6, "shard": shard}, {})
    assert noise(folder) == {str(sample): whole[str(sample)] for sample in range(12, 24)} | {
        key: value for key, value in noise(folder).items() if int(key) < 12
    }
    train(make(), corpus, folder, {"steps": 9}, {}, Ranks())
    expected, found = result(make(), tmp_path / "one", {}), result(make(), folder, {})
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_shares_cover_a_step_and_must_be_equal() -> None:
    assert [Ranks(rank, 3).share(6) for rank in range(3)] == [range(2), range(2, 4), range(4, 6)]
    with pytest.raises(ValueError, match="batch_size is 5, must be a multiple of 2"):
        Ranks(0, 2).share(5)
