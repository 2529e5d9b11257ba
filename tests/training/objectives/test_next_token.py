from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from twotower.model.one_tower import OneTower
from twotower.training.corpus.shards import Corpus, CorpusRows, write_shard
from twotower.training.objectives.next_token import NextToken, NextTokenConfig
from twotower.training.run.trainer import TrainConfig, Trainer


def one_tower(tiny: Callable, pattern: str = "M*-E", dtype: torch.dtype = torch.float64) -> OneTower:
    """The context tower of a tiny model."""
    two = tiny(pattern, dtype=dtype)
    model = OneTower(two.config, dtype=dtype)
    model.tower.load_state_dict(two.context_tower.state_dict())
    model.lm_head.load_state_dict(two.context_lm_head.state_dict())
    return model


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    ids = (np.arange(24)[:, None] * 7 + np.arange(24)) % 36 + 4
    document = np.broadcast_to(np.arange(24) >= 10, ids.shape).astype(np.int32)
    write_shard(
        tmp_path / "0.safetensors", CorpusRows(ids, np.broadcast_to(np.arange(24) % 10 > 0, ids.shape), document)
    )
    return Corpus(tmp_path, vocab_size=40)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_is_the_mean_over_scored_next_tokens(recompute: bool, tiny: Callable, corpus: Corpus) -> None:
    two, objective = tiny("M*-E", dtype=torch.float64), NextToken(one_tower(tiny), NextTokenConfig(recompute=recompute))
    rows = objective.prepare(corpus.batch(range(3), 0), 0, 0, torch.device("cpu"))
    losses = []
    for ids in rows.x0:
        for start, end in ((0, 10), (10, 24)):
            logits = two.context_logits(ids[None, start:end])[0]
            losses += [
                float(F.cross_entropy(logits[at - 1 - start], ids[at])) for at in range(start + 1, end) if at % 10 > 0
            ]
    assert rows.denominators == (len(losses),)
    expected = sum(losses) / len(losses)  # from logits rounded to float32
    assert objective(rows, slice(0, 3), rows.denominators).loss.item() == pytest.approx(expected, rel=1e-5)
    parts = [objective(rows, slice(i, i + 1), rows.denominators).loss.item() for i in range(3)]
    assert sum(parts) == pytest.approx(expected, rel=1e-5)


def test_a_mask_in_a_text_is_not_learnt(tiny: Callable, tmp_path: Path) -> None:
    ids = np.full((2, 24), 5)
    ids[0, 7] = 3
    write_shard(tmp_path / "0.safetensors", CorpusRows(ids, np.ones(ids.shape, bool), np.zeros(ids.shape, np.int32)))
    objective = NextToken(one_tower(tiny), NextTokenConfig())
    rows = objective.prepare(Corpus(tmp_path, vocab_size=40).batch(range(2), 0), 0, 0, torch.device("cpu"))
    assert rows.denominators == (2 * 23 - 1,)
    objective(rows, slice(None), rows.denominators).loss.backward()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.slow
def test_a_fresh_backbone_learns(tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    model = OneTower(tiny("ME*-").config)
    model.initialise_(0)
    losses: list[float] = []
    config = TrainConfig(steps=60, batch_size=8, learning_rate=1e-2, warmup_steps=5, decay_steps=30, bf16=True)
    Trainer(NextToken(model, NextTokenConfig()), corpus, config, tmp_path).run(lambda r: losses.append(r.loss))
    assert losses[0] == pytest.approx(np.log(40), rel=0.05)
    assert losses[-1] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [0, 3])
def test_experts_are_balanced(micro_batch_size: int, tiny: Callable, corpus: Corpus, tmp_path: Path) -> None:
    model = OneTower(tiny("E").config)
    model.initialise_(0)
    mixer = model.tower.stack[0].mixer
    mixer.correction_bias.data[0] = 0.05  # one that most tokens choose
    objective = NextToken(model, NextTokenConfig())
    rows = objective.prepare(corpus.batch(range(24), 0), 0, 0, torch.device("cpu"))
    before = objective(rows, slice(0, 24), rows.denominators).loads
    assert before.max() > 2.5 * before.mean()
    config = TrainConfig(steps=60, batch_size=6, micro_batch_size=micro_batch_size, learning_rate=1e-9)
    Trainer(objective, corpus, config, tmp_path).run(lambda report: None)
    after = objective(rows, slice(0, 24), rows.denominators).loads
    assert after.max() < 1.5 * after.mean()
    # one step of 1e-3 each time, so after any number of them a multiple of it
    assert torch.allclose((mixer.correction_bias * 1e3).round() / 1e3, mixer.correction_bias, atol=1e-6)
