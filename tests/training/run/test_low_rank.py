from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from twotower.training.corpus.shards import Corpus, CorpusRows, write_shard
from twotower.training.objectives.denoising import Denoising, DenoisingConfig
from twotower.training.run.trainer import TrainConfig, Trainer, trained_parameters


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    ids = np.random.default_rng(0).integers(4, 40, (8, 20))
    write_shard(tmp_path / "0.safetensors", CorpusRows(ids, np.ones_like(ids), ids * 0))
    return Corpus(tmp_path, vocab_size=40)


@pytest.mark.parametrize("bf16", [False, True])
def test_only_additions_of_low_rank_and_the_time_modules_change(
    bf16: bool, tiny: Callable, corpus: Corpus, tmp_path: Path
) -> None:
    before = tiny("M*-E", block_size=4).released_tensors()
    objective = Denoising(tiny("M*-E", block_size=4), DenoisingConfig(lora_rank=2))
    start = objective.model.released_tensors()
    assert all(torch.equal(start[name], before[name]) for name in before)  # additions start at 0
    trained = trained_parameters(objective)
    plain = trained_parameters(Denoising(tiny("M*-E", block_size=4), DenoisingConfig()))
    assert sum(p.numel() for n, p in trained.items() if "time" not in n) < 0.5 * sum(p.numel() for p in plain.values())
    config = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2, warmup_steps=0, bf16=bf16)
    Trainer(objective, corpus, config, tmp_path / "run").run(lambda report: None)
    for name, after in objective.model.released_tensors().items():
        projection = name.startswith("denoiser_tower.layers") and "_proj" in name and not name.endswith("bias")
        if name.startswith(("t_embedder", "t_block", "scale_shift")):
            continue
        difference = after.double() - before[name].to(after.dtype).double()
        assert (difference.abs().max() > 0) == projection, name
        if projection and not bf16:
            assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2


def test_a_rank_above_the_smallest_projection_s_is_refused(tiny: Callable) -> None:
    Denoising(tiny("*-"), DenoisingConfig(lora_rank=32))
    with pytest.raises(
        ValueError, match="lora_rank is 33, must be 1 to 32, the smallest projection's, or 0 to train all"
    ):
        Denoising(tiny("*-"), DenoisingConfig(lora_rank=33))
