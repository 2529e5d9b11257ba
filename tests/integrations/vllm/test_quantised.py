"""Quantised towers inside vLLM, written by compressed-tensors' own library."""

import importlib.util
import json
import shutil
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import twotower
from twotower.integrations.vllm.settings import DRAFTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
# Widths of a multiple of 32, which 4 bits need on CPUs, also for what a recurrent layer projects at once
SIZES = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
SIZES |= {"mamba_num_heads": 32, "mamba_head_dim": 8, "mamba_state_size": 16}
MASK = 3


class Form(NamedTuple):
    """One of compressed-tensors' forms: how weights are stored, and what inputs are rounded to."""

    format: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None


_TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}
FORMS = {
    "W8A8": Form("int-quantized", {"num_bits": 8, "strategy": "channel"}, _TOKENS),
    "W4A16": Form("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "FP8": Form(
        "float-quantized", {"num_bits": 8, "strategy": "channel", "type": "float"}, _TOKENS | {"type": "float"}
    ),
}


def quantised(tensors, form, prefixes):
    """The tensors with the projections in compressed-tensors' form of the towers with these prefixes."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**form.weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=form.inputs, format=form.format)
    compressor = BaseCompressor.get_value_from_registry(form.format)
    found = {}
    for name, weight in tensors.items():
        layer = name.removesuffix(".weight")
        if not (layer.startswith(prefixes) and layer.endswith("_proj")):
            found[name] = weight.clone()
            continue
        groups = weight.unflatten(1, (-1, form.weights.get("group_size", weight.shape[1])))
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
        parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        found |= {f"{layer}.{part}": tensor for part, tensor in compressor.compress(parts, scheme).items()}
    return found


def write_quantised(folder, form, prefixes, ignore):
    """Quantises a checkpoint in its place."""
    tensors = load_file(folder / "model.safetensors")
    save_file(quantised(tensors, form, prefixes), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form.format,
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": form.weights, "input_activations": form.inputs}
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


def written(running, ids, params):
    """What a server writes after each of some prompts."""
    outputs = running.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs]


@pytest.mark.parametrize(
    ("form", "name"), [("W8A8", "llama"), ("W4A16", "llama"), ("FP8", "llama"), ("W8A8", "M*-"), ("W4A16", "M*-")]
)
def test_a_quantised_context_tower_gives_the_tokens_of_the_same_model_without_a_denoiser(
    form, name, tiny, engine, prompts, tmp_path
) -> None:
    """In vLLM's own Llama and Nemotron-H."""
    from vllm import SamplingParams

    from benchmarks.vllm_side_by_side import plain_checkpoint

    both, plain = tmp_path / "both", tmp_path / "plain"
    twotower.save(tiny(name, dtype=torch.bfloat16, **SIZES), both)
    plain_checkpoint(both, plain)
    write_quantised(both, FORMS[form], "context_tower.", ["re:denoiser_tower", "lm_head", "context_lm_head"])
    write_quantised(plain, FORMS[form], ("model.", "backbone."), ["lm_head"])
    # The plain model may write the mask token.
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False, logit_bias={MASK: -100.0})
    found = [written(engine(str(folder), dtype="bfloat16"), prompts(4), params) for folder in (both, plain)]
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0]}) == 4


@pytest.fixture
def ask_all(ask):
    """ask_all(engine, prompts): its tokens by mode, greedily."""
    return lambda engine, ids: {
        mode: ask(engine, ids, 40, [mode] * len(ids)) for mode in ("ar", "verified", "diffusion")
    }


@pytest.mark.parametrize("form", ["W8A8", "W4A16"])  # products in FP8 take minutes on CPUs
def test_the_denoiser_beside_a_quantised_context_tower_is_one_of_floats(
    form, checkpoint, engine, prompts, ask_all, count, tmp_path
) -> None:
    """Quantised itself it becomes floats, and does what a denoiser of these floats does."""
    both, one = tmp_path / "both", tmp_path / "one"
    for folder in (both, one):
        shutil.copytree(checkpoint("stories"), folder)
    write_quantised(both, FORMS[form], ("context_tower.", "denoiser_tower."), ["lm_head", "context_lm_head"])
    rounded = twotower.load(both, pack=False).released_tensors()
    towers = load_file(one / "model.safetensors")
    changed = {
        n: rounded[n] for n in towers if n.startswith("denoiser_tower.") and not torch.equal(rounded[n], towers[n])
    }
    assert len(changed) > 20
    save_file(towers | changed, one / "model.safetensors")
    write_quantised(one, FORMS[form], "context_tower.", ["re:denoiser_tower", "lm_head", "context_lm_head"])
    found = []
    for folder in (both, one):
        running = engine(
            str(folder),
            dtype="bfloat16",
            speculative_config={"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 16},
            additional_config={"twotower": {"denoiser": True, "drafter": "denoiser"}},
        )
        found.append(ask_all(running, prompts(4)))
        assert found[-1]["verified"] == found[-1]["ar"] != found[-1]["diffusion"]
        assert count(running, "spec_decode_num_accepted_tokens") > 40
    assert found[0] == found[1]
