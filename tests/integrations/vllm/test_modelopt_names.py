"""config.json as NVIDIA's ModelOpt writes it, in both of its layouts: which layers of a context tower vLLM takes for
quantised."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from twotower.config import TwoTowerConfig
from twotower.integrations.vllm.quantisation import ContextLayers, rename_layers_

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}


@pytest.fixture
def modelopt(sizes) -> Callable[[dict[str, Any]], Any]:
    """modelopt(what it writes into config.json): vLLM's reading with the names of a tower's layers, `M*E`."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.modelopt import (
        ModelOptFp8Config,
        ModelOptMixedPrecisionConfig,
        ModelOptNvFp4Config,
    )

    def read(written: dict[str, Any]) -> Any:
        written = {"quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.44.0"}} | written
        classes = (ModelOptFp8Config, ModelOptNvFp4Config, ModelOptMixedPrecisionConfig)
        [name] = [n for n in (one.override_quantization_method(written, None) for one in classes) if n]
        reading = get_quantization_config(name).from_config(written)
        fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        rename_layers_(reading, ContextLayers(TwoTowerConfig(**sizes, pattern="M*E"), fused))
        reading.packed_modules_mapping.update(fused)
        return reading

    return read


LEFT_OUT = [
    "lm_head",
    "context_lm_head",
    "denoiser_tower*",
    "context_tower.layers.0.mixer.conv1d",
    "context_tower.layers.0.mixer.in_proj",
    *(f"context_tower.layers.1.mixer.{letter}_proj" for letter in "qkvo"),
    "context_tower.layers.2.mixer.gate",
]


@pytest.mark.parametrize(("algorithm", "size"), [("FP8", {}), ("NVFP4", {"group_size": 16})])
def test_what_modelopt_leaves_out_is_left_out(algorithm, size, modelopt) -> None:
    numbers = {"dynamic": False, "num_bits": 8 if algorithm == "FP8" else 4, "type": "float"} | size
    groups = {"group_0": {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}}
    common = {"quant_algo": algorithm, "kv_cache_scheme": FP8_CACHE}
    for reading in (
        modelopt(common | {"config_groups": groups, "ignore": LEFT_OUT}),
        modelopt({"quantization": common | size | {"kv_cache_quant_algo": "FP8", "exclude_modules": LEFT_OUT}}),
    ):
        assert reading.kv_cache_quant_method == "FP8" if algorithm == "FP8" else reading.group_size == 16
        names = ["lm_head", *(f"model.layers.{n}" for n in ("0.mixer.in_proj", "1.mixer.qkv_proj", "1.mixer.o_proj"))]
        assert all(reading.is_layer_excluded(name) for name in [*names, "model.layers.2.mixer.gate"])
        kept = ("0.mixer.out_proj", "2.mixer.experts", "2.mixer.shared_experts.up_proj")
        assert not any(reading.is_layer_excluded(f"model.layers.{name}") for name in kept)


def test_modelopts_forms_by_layer_are_the_context_towers(modelopt) -> None:
    layer = "context_tower.layers"
    forms: dict[str, dict[str, Any]] = {
        f"{layer}.2.mixer.experts.{n}.{part}_proj": {"quant_algo": "NVFP4", "group_size": 16}
        for n in range(8)
        for part in ("up", "down")
    }
    forms |= {f"{layer}.1.mixer.{letter}_proj": {"quant_algo": "FP8"} for letter in "qkv"}
    forms["denoiser_tower.layers.0.mixer.in_proj"] = {"quant_algo": "FP8"}
    reading = modelopt({"quant_algo": "MIXED_PRECISION", "quantized_layers": forms, "ignore": LEFT_OUT[:3]})
    assert reading._resolve_quant_algo("model.layers.2.mixer.experts") == "NVFP4"
    assert reading._resolve_quant_algo("model.layers.1.mixer.qkv_proj") == "FP8"
    assert reading._resolve_quant_algo("model.layers.0.mixer.in_proj") is None
