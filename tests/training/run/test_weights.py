"""A sharded run that starts from files against one that starts from a whole model, on two gloo processes."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from twotower.checkpoints import save
from twotower.checkpoints.hf import load_model, read_config, released_stream
from twotower.model.one_tower import OneTower
from twotower.model.two_tower import TwoTower
from twotower.training.corpus.shards import Corpus, CorpusRows, write_shard
from twotower.training.objectives.denoising import Denoising, DenoisingConfig
from twotower.training.objectives.next_token import NextToken, NextTokenConfig
from twotower.training.run import weights
from twotower.training.run.checkpointing import latest_state, read_tensor
from twotower.training.run.ranks import Ranks, joined
from twotower.training.run.trainer import TrainConfig, Trainer, trained_parameters
from twotower.training.run.weights import TensorStream, trained_tensors

pytestmark = pytest.mark.slow

SETTINGS = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-2, "shard": True, "evaluate_every": 1}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    ids = np.random.default_rng(0).integers(4, 40, (8, 12))
    write_shard(tmp_path / "corpus" / "0.safetensors", CorpusRows(ids, np.ones_like(ids), ids * 0))
    return tmp_path / "corpus"


def without_weights(model: type[TwoTower] | type[OneTower], config: Any) -> Any:
    with torch.device("meta"):
        return model(config)


def two(check: Callable[..., None], folder: Path, *arguments: Any) -> None:
    torch.multiprocessing.start_processes(
        one_of_two, (check, folder, arguments), nprocs=2, start_method="fork", join=True
    )


def one_of_two(rank: int, check: Callable[..., None], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    with joined(rank, 2, torch.device("cpu"), init_method=f"file://{folder}/init") as ranks:
        check(ranks, folder, *arguments)
        ranks.wait()  # neither process ends while the other still needs it


def same_runs(
    ranks: Ranks,
    folder: Path,
    whole: Denoising | NextToken,
    empty: Denoising | NextToken,
    files: Callable[[], TensorStream],
    settings: dict[str, Any],
) -> None:
    """Both start with the same bits everywhere, frozen parts too, and learn the same."""
    found = []
    corpus = Corpus(folder / "corpus", vocab_size=40)
    for name, objective, source in (("whole", whole, None), ("files", empty, files)):
        config = TrainConfig(**SETTINGS | settings)
        trainer = Trainer(objective, corpus, config, folder / name, ranks, held_out=corpus, weights=source)
        tensors = dict(objective.named_parameters()) | dict(objective.named_buffers())
        start = {n: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}
        reports: list[Any] = []
        trainer.run(reports.append)
        found.append((start, [report[:4] + report[7:] for report in reports]))
    (expected, losses), (start, ours) = found
    assert start.keys() == expected.keys()
    assert any(isinstance(p, DTensor) for p in empty.parameters())
    for name, tensor in expected.items():
        assert start[name].dtype == tensor.dtype
        assert torch.equal(start[name], tensor), name
    assert ours == losses


@pytest.mark.parametrize(
    ("pattern", "what", "settings"),
    [
        ("M*-E", {}, {"ema_decay": 0.5}),
        ("llama", {}, {"bf16": True}),
        ("*E", {"lora_rank": 2}, {"bf16": True}),
        ("M*-", {"context": "tied"}, {}),
        ("M*-E*-", {}, {"bf16": True}),
    ],
)
def test_shards_filled_from_files_are_those_of_a_whole_model(
    pattern: str, what: dict[str, Any], settings: dict[str, Any], tiny: Callable, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    some = (1, 3, 4) if pattern == "M*-E*-" else None
    model = tiny(pattern, block_size=4, hidden_size=33, vocab_size=41, denoiser_layers=some)
    save(model, folder, max_shard_bytes=10_000)
    config = DenoisingConfig(**what)
    whole = Denoising(load_model(folder, dtype=torch.float32), config)
    empty = Denoising(without_weights(TwoTower, read_config(folder)), config)
    two(same_runs, tmp_path, whole, empty, functools.partial(released_stream, folder), settings)


def test_a_new_backbone_starts_the_same_in_shards(tiny: Callable, corpus: Path, tmp_path: Path) -> None:
    config = tiny("ME*-").config
    model, empty = OneTower(config), without_weights(OneTower, config)
    model.initialise_(3)
    objectives = [NextToken(m, NextTokenConfig()) for m in (model, empty)]
    two(same_runs, tmp_path, *objectives, functools.partial(without_weights(OneTower, config).initial_tensors, 3), {})


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, those of local parts where they are sharded."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        made, *given = (t._local_tensor if isinstance(t, DTensor) else t for t in (out, *args))
        storages = [t.untyped_storage()._cdata for t in given if isinstance(t, torch.Tensor)]
        if isinstance(made, torch.Tensor) and not made.is_meta and made.untyped_storage()._cdata not in storages:
            self.num_bytes += made.untyped_storage().nbytes()
        return out


def small_parts(ranks: Ranks, folder: Path) -> None:
    objective = Denoising(without_weights(TwoTower, read_config(folder / "model")), DenoisingConfig())
    corpus = Corpus(folder / "corpus", vocab_size=40)
    source = functools.partial(released_stream, folder / "model")
    with Allocated() as allocated:
        Trainer(objective, corpus, TrainConfig(steps=1, batch_size=4, shard=True), folder, ranks, weights=source)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    every = sum(p.numel() for p in objective.parameters())
    # Weights and both moments of what is trained, of all of which a rank has half; little else
    assert 0.45 < allocated.num_bytes / (4 * (every + 2 * trained)) < 0.55


def test_no_rank_allocates_more_than_its_shards(tiny: Callable, corpus: Path, tmp_path: Path) -> None:
    save(tiny("*-*-", block_size=4, hidden_size=64), tmp_path / "model")
    two(small_parts, tmp_path)


@pytest.mark.parametrize("what", [{}, {"lora_rank": 2}, {"context": "tied"}, {"context": "trained"}])
def test_a_state_gives_the_trained_model_one_tensor_at_a_time(
    what: dict[str, Any], tiny: Callable, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "model", DenoisingConfig(**what)
    save(tiny("M*-E", block_size=4), folder)
    trained = Denoising(load_model(folder), config)
    run = TrainConfig(steps=1, batch_size=2, warmup_steps=0)
    Trainer(trained, Corpus(corpus, vocab_size=40), run, tmp_path / "out").run(lambda done: None)
    with torch.device("meta"):
        empty = Denoising(TwoTower(read_config(folder)), config)
    state = latest_state(tmp_path / "out")
    assert state is not None
    read: list[str] = []

    def counted(state: Path, name: str) -> torch.Tensor:
        read.append(name)
        return read_tensor(state, name)

    monkeypatch.setattr(weights, "read_tensor", counted)
    found = dict(trained_tensors(empty, state, "weights", released_stream(folder)))
    expected = trained.model.released_tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert len(read) <= 2 * len(set(read))  # each parameter once, and not once for each of its parts
    assert {f"weights.{name}" for name in trained_parameters(trained)} == set(read)
