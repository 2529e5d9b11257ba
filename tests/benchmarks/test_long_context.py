"""What benchmarks/long_context.py counts for its floors is what a model has."""

import importlib.util
from pathlib import Path

import pytest
import torch

from twotower.backends.choose import pack_
from twotower.config import TwoTowerConfig

FILE = Path(__file__).parents[2] / "benchmarks" / "long_context.py"


@pytest.fixture(scope="module")
def long_context():
    spec = importlib.util.spec_from_file_location("long_context", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_counts_weights_and_keys_and_times_every_context(long_context, sizes):
    config = TwoTowerConfig(pattern="*-*-", use_rope=True, gated_mlp=True, mlp_hidden_act="silu", **sizes)
    model = long_context.random_model(config, torch.float32)
    layers = [layer.released_tensors().values() for layer in model.context_tower.stack]
    assert long_context.num_weights(config) == sum(t.numel() for layer in layers for t in layer if t.ndim == 2)
    pack_(model)
    found = long_context.measured(model, [20, 40], repeats=2)
    size = 2 * 2 * config.num_key_value_heads * config.head_dim * 4  # keys and values of two layers in float32
    assert found["key_bytes_per_token"] == size
    for length in ("20", "40"):
        assert found[length]["prefill_tokens_s"] > 0
        assert found[length]["step"]["ms"] > 0
        assert found[length]["nfe"]["ms"] > 0
