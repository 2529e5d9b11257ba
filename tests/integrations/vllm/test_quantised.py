"""A quantised context tower inside vLLM, written by compressed-tensors' own library: what vLLM makes of the same tower
as an ordinary Llama checkpoint."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import twotower

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
SIZES = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
WEIGHTS = {"num_bits": 8, "strategy": "channel"}
INPUTS = {"num_bits": 8, "strategy": "token", "dynamic": True}
FORM = "int-quantized"
IGNORED = {"both": ["re:denoiser_tower", "lm_head", "context_lm_head"], "plain": ["lm_head"]}
PREFIXES = ("context_tower.", "model.")
MASK = 3


def quantised(tensors):
    """The tensors with the projections of the context tower in compressed-tensors' form."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**WEIGHTS)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=INPUTS, format=FORM)
    compressor = BaseCompressor.get_value_from_registry(FORM)
    found = {}
    for name, weight in tensors.items():
        layer = name.removesuffix(".weight")
        if not (layer.startswith(PREFIXES) and layer.endswith("_proj")):
            found[name] = weight.clone()
            continue
        scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
        parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        found |= {f"{layer}.{part}": tensor for part, tensor in compressor.compress(parts, scheme).items()}
    return found


@pytest.fixture
def folders(tiny, tmp_path) -> list[Path]:
    """Two towers with a quantised context tower, and that tower as a plain Llama."""
    from benchmarks.vllm_side_by_side import plain_checkpoint

    both, plain = tmp_path / "both", tmp_path / "plain"
    twotower.save(tiny("llama", dtype=torch.bfloat16, **SIZES), both)
    plain_checkpoint(both, plain)
    for folder in (both, plain):
        save_file(quantised(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": FORM,
            "quantization_status": "compressed",
            "ignore": IGNORED[folder.name],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": INPUTS}},
        }
        (folder / "config.json").write_text(json.dumps(config))
    return [both, plain]


def test_a_quantised_context_tower_gives_the_tokens_of_vllms_own_llama(folders, engine, prompts) -> None:
    from vllm import SamplingParams

    ids = [{"prompt_token_ids": one} for one in prompts(4)]
    # The plain model may write the mask token.
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False, logit_bias={MASK: -100.0})
    found = []
    for folder in folders:
        outputs = engine(str(folder), dtype="bfloat16").generate(ids, params, use_tqdm=False)
        found.append([list(one.outputs[0].token_ids) for one in outputs])
    assert found[0] == found[1]
