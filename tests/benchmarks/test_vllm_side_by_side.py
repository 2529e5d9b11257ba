"""vLLM side by side: plain checkpoints are the same towers, and ratios are of runs in one round."""

import importlib.util
from pathlib import Path

import pytest
import torch

import twotower

FILE = Path(__file__).parents[2] / "benchmarks" / "vllm_side_by_side.py"


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("vllm_side_by_side", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_llama_has_the_logits_of_the_context_tower(benchmark, tied, tiny, tmp_path):
    from transformers import LlamaForCausalLM

    twotower.save(tiny("llama", tie_word_embeddings=tied), tmp_path / "two")
    benchmark.plain_checkpoint(tmp_path / "two", tmp_path / "plain")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits
    model = twotower.load(tmp_path / "two")
    ours = model.context_logits(ids)
    ours[..., model.config.mask_token_id] = theirs[..., model.config.mask_token_id]  # which ours makes impossible
    # float32, summed in another order
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_plain_recurrent_checkpoint_has_every_tensor_of_the_context_tower(benchmark, tiny, tmp_path):
    from safetensors.torch import load_file

    model = tiny("M*-")
    twotower.save(model, tmp_path / "two")
    benchmark.plain_checkpoint(tmp_path / "two", tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    tower = {name: t for name, t in model.released_tensors().items() if name.startswith("context_")}
    assert len(plain) == len(tower)
    for name, tensor in tower.items():
        renamed = name.replace("context_tower", "backbone").replace("context_lm_head", "lm_head")
        assert torch.equal(plain[renamed], tensor)


def test_ratios_are_of_one_round(benchmark):
    rounds = [
        [
            benchmark.Run(name, n, speed * factor)
            for n in benchmark.SEQUENCES
            for name, speed in (("vllm ar", 10.0), ("plugin ar", 9.0), ("twotower ar", 20.0))
        ]
        for factor in (1.0, 4.0, 2.0)  # a machine that is slow in one round and fast in another
    ]
    found = benchmark.summary(rounds)
    assert found["tokens_per_second"]["vllm ar"] == dict.fromkeys(benchmark.SEQUENCES, 20.0)
    assert found["ratios"]["plugin ar / vllm ar"][4] == [0.9, 0.9, 0.9]
    assert found["ratios"]["twotower ar / plugin ar"][1] == [2.222, 2.222, 2.222]
    assert "twotower verified / plugin verified" not in found["ratios"]


def test_the_plugin_is_the_base_where_plain_vllm_is_not(benchmark):
    rounds = [[benchmark.Run(name, n, 1.0) for n in benchmark.SEQUENCES for name in ("twotower ar", "plugin ar")]] * 2
    assert list(benchmark.summary(rounds)["ratios"]) == ["twotower ar / plugin ar"]
