"""The estimates of a dry run against what a tiny run has."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from twotower.config import TwoTowerConfig
from twotower.model.one_tower import OneTower
from twotower.model.two_tower import TwoTower
from twotower.training.config import Share
from twotower.training.corpus.shards import CorpusBatch
from twotower.training.objectives.denoising import Denoising, DenoisingConfig
from twotower.training.objectives.next_token import NextToken, NextTokenConfig
from twotower.training.run.estimate import estimate
from twotower.training.run.trainer import TrainConfig, trained_parameters

RUN = {"row_length": 128, "num_ranks": 1}


@pytest.fixture(scope="module")
def config(tiny):
    return tiny("M*-E", hidden_size=64).config


def test_counts_are_those_of_the_model(config):
    found = estimate(config, TrainConfig(steps=3, batch_size=4), DenoisingConfig(), row_length=10, num_ranks=1)
    objective = Denoising(TwoTower(config), DenoisingConfig())
    trained = sum(p.numel() for p in trained_parameters(objective).values())
    assert found.parameters == sum(p.numel() for p in objective.parameters())
    assert found.trained == trained
    assert found.tokens == 120
    assert found.memory.weights == 4 * found.parameters
    assert (found.memory.gradients, found.memory.moments, found.memory.running_mean) == (4 * trained, 8 * trained, 0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "what",
    [
        NextTokenConfig(),
        DenoisingConfig(),  # here no layer reads the context tower
        DenoisingConfig(objective=(Share("cross_entropy", 1.0), Share("distillation", 1.0))),
        DenoisingConfig(context="trained", ar_weight=1.0, complementary=True, level_per="example"),
    ],
)
@pytest.mark.parametrize("layers", [None, (1,)])
def test_flops_are_those_that_torch_counts(what, recompute, layers):
    """For towers of projections alone, where nothing is approximate."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64}
    config = TwoTowerConfig(**sizes, pattern="--", denoiser_layers=layers)
    what = dataclasses.replace(what, recompute=recompute)
    if isinstance(what, NextTokenConfig):
        objective = NextToken(OneTower(config), what)
    else:
        what = dataclasses.replace(what, full_mask_fraction=0.0 if what.complementary else 1.0)
        objective = Denoising(TwoTower(config), what)
    for parameter in objective.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    ids = torch.randint(4, 50, (8, 129))
    batch = CorpusBatch(ids, torch.ones_like(ids).bool(), ids * 0, torch.arange(8))
    rows = objective.prepare(batch, 0, 0, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        objective(rows, slice(0, 8), rows.denominators).loss.backward()
    found = estimate(config, TrainConfig(steps=1, batch_size=8), what, row_length=129, num_ranks=1)
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.02)  # the last of 129 tokens has no next one


def test_a_denoiser_of_few_layers_costs_less_and_so_does_its_context_tower(tiny):
    """Without what distillation reads, the context tower runs up to the last layer that seeds the denoiser."""
    sizes = {"hidden_size": 64, "vocab_size": 400, "intermediate_size": 400}
    layers = {"all": None, "last": (2, 3), "first": (0, 1)}
    plain, distilled = (
        {
            name: estimate(tiny("*-*-", **sizes, denoiser_layers=of).config, TrainConfig(), what, **RUN)
            for name, of in layers.items()
        }
        for what in (DenoisingConfig(), DenoisingConfig(objective=(Share("distillation", 1.0),)))
    )
    assert plain["first"].flops < plain["last"].flops < plain["all"].flops
    assert distilled["first"].flops == distilled["last"].flops
    assert plain["first"].memory.activations < plain["all"].memory.activations
    assert plain["first"].trained < plain["all"].trained


def test_what_saves_memory_saves_it(config):
    run, what = TrainConfig(steps=3, batch_size=4, ema_decay=0.9), DenoisingConfig()
    plain = estimate(config, run, what, row_length=512, num_ranks=2).memory
    sharded = estimate(config, dataclasses.replace(run, shard=True), what, row_length=512, num_ranks=2).memory
    for part in ("gradients", "moments", "running_mean"):
        assert getattr(plain, part) / 2 <= getattr(sharded, part) < 0.6 * getattr(plain, part)
    again = dataclasses.replace(what, recompute=True)
    assert estimate(config, run, again, row_length=512, num_ranks=2).memory.activations < 0.8 * plain.activations
    small = dataclasses.replace(run, micro_batch_size=1)
    assert estimate(config, small, what, row_length=512, num_ranks=2).memory.activations < 0.6 * plain.activations
    coarse = estimate(config, dataclasses.replace(run, bf16=True), what, row_length=512, num_ranks=2).memory
    assert coarse.activations < 0.6 * plain.activations
    assert coarse.moments == plain.moments


def test_the_passes_of_a_trajectory_and_both_versions_of_a_row_are_counted():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = TwoTowerConfig(vocab_size=50, hidden_size=128, pattern="*-", intermediate_size=256, block_size=16, **heads)
    run = TrainConfig(steps=1, batch_size=8)
    pair = (Share("cross_entropy", 1.0), Share("consistency", 1.0))
    for what, fewer in (
        (DenoisingConfig(masks=(Share("trajectory", 1.0),), trajectory_passes=3), DenoisingConfig()),
        (DenoisingConfig(objective=pair), DenoisingConfig()),
    ):
        objective = Denoising(TwoTower(config), what)
        for parameter in objective.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        ids = torch.randint(4, 50, (8, 32))
        batch = CorpusBatch(ids, torch.ones_like(ids).bool(), ids * 0, torch.arange(8))
        learnt = [p for p in objective.parameters() if p.requires_grad]
        with FlopCounterMode(display=False) as decoding:  # which can't follow what requires a gradient and gets none
            objective.requires_grad_(False)
            rows = objective.prepare(batch, 0, 0, torch.device("cpu"))
        for parameter in learnt:
            parameter.requires_grad_(True)
        with FlopCounterMode(display=False) as counter:
            objective(rows, slice(0, 8), rows.denominators).loss.backward()
        found = estimate(config, run, what, row_length=32, num_ranks=1).flops
        # torch doesn't count attention on a CPU, and the shares of masked places are rough
        assert found == pytest.approx(counter.get_total_flops() + decoding.get_total_flops(), rel=0.15)
        assert found > 1.4 * estimate(config, run, fewer, row_length=32, num_ranks=1).flops
