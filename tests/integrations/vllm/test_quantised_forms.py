"""Forms beside compressed-tensors' of a quantised context tower, written here as their libraries do: what vLLM makes of
the same tensors as an ordinary Llama or Nemotron-H."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import twotower

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
# Widths of a multiple of 32, which 4 bits need on CPUs, also for what a recurrent layer projects at once, and in
# attention of a whole block of FP8
SIZES = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 4}
SIZES |= {"mamba_num_heads": 32, "mamba_head_dim": 8, "mamba_state_size": 16}
MASK = 3
GROUP, BLOCK = 32, 128
# One scale for all layers: those that vLLM computes together must have the same, as ModelOpt gives them.
SCALE = torch.tensor(0.01)
# How AWQ orders eight numbers of 4 bits in one of 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}


class Form(NamedTuple):
    """How a layer's weight (out, in) is stored, by the layer's name, and quantization_config but for `left_out`, which
    has the key of the layers that are not quantised."""

    pack: Callable[[str, Tensor], dict[str, Tensor]]
    config: dict[str, Any]
    left_out: str | None = None


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (in, out) from 1 to 15, of which 8 is 0, and scales (groups, out)."""
    groups = weight.float().T.unflatten(0, (-1, GROUP))
    scale = groups.abs().amax(1) / 7
    return (groups / scale[:, None]).round().add(8).int().flatten(0, 1), scale.to(weight.dtype)


def packed(numbers: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers of 4 bits in one of 32, along a dimension."""
    eight = numbers.movedim(dim, -1).unflatten(-1, (-1, 8))[..., list(order)].long()
    whole = (eight << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int().movedim(-1, dim)


def pack_gptq(layer: str, weight: Tensor) -> dict[str, Tensor]:
    numbers, scale = four_bits(weight)
    zeros = torch.full_like(scale, 7, dtype=torch.int32)  # the files have one less
    places = torch.arange(len(numbers), dtype=torch.int32) // GROUP
    return {"qweight": packed(numbers, 0), "qzeros": packed(zeros, 1), "scales": scale, "g_idx": places}


def pack_awq(layer: str, weight: Tensor) -> dict[str, Tensor]:
    numbers, scale = four_bits(weight)
    zeros = torch.full_like(scale, 8, dtype=torch.int32)
    return {"qweight": packed(numbers, 1, AWQ_ORDER), "qzeros": packed(zeros, 1, AWQ_ORDER), "scales": scale}


def pack_fp8(layer: str, weight: Tensor) -> dict[str, Tensor]:
    return {"weight": (weight.float() / SCALE).to(torch.float8_e4m3fn), "weight_scale": SCALE}


def pack_blocks(layer: str, weight: Tensor) -> dict[str, Tensor]:
    blocks = torch.full([-(-size // BLOCK) for size in weight.shape], SCALE.item())
    return {"weight": (weight.float() / SCALE).to(torch.float8_e4m3fn), "weight_scale_inv": blocks}


def pack_modelopt(layer: str, weight: Tensor) -> dict[str, Tensor]:
    found = pack_fp8(layer, weight) | {"input_scale": torch.tensor(0.02)}
    letter = layer[-len("k_proj")]
    # So small a scale that keys and values are cut off
    return found | ({f"{letter}_scale": torch.tensor(0.001)} if layer.endswith((".k_proj", ".v_proj")) else {})


def pack_nvfp4(layer: str, weight: Tensor) -> dict[str, Tensor]:
    rows, width = weight.shape
    return {
        "weight": torch.zeros(rows, width // 2, dtype=torch.uint8),
        "weight_scale": torch.ones(rows, width // 16).to(torch.float8_e4m3fn),
        "weight_scale_2": SCALE,
        "input_scale": SCALE,
    }


FORMS = {
    "GPTQ": Form(pack_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "AWQ": Form(
        pack_awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        "modules_to_not_convert",  # without it vLLM takes a recurrent layer, which has other tensors, for left out
    ),
    "fp8": Form(pack_fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}, "ignored_layers"),
    "fp8 blocks": Form(
        pack_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
        "ignored_layers",
    ),
    "ModelOpt FP8": Form(
        pack_modelopt,
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": FP8_CACHE},
        "ignore",
    ),
    "NVFP4": Form(pack_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "ignore"),
}


def write_quantised(folder: Path, form: Form, prefixes: tuple[str, ...], left_out: list[str]) -> None:
    """Quantises the projections with these prefixes of a checkpoint in its place."""
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.startswith(prefixes) and layer.endswith("_proj"):
            tensors |= {f"{layer}.{part}": tensor.clone() for part, tensor in form.pack(layer, weight).items()}
        else:
            tensors[name] = weight.clone()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = form.config | ({form.left_out: left_out} if form.left_out else {})
    (folder / "config.json").write_text(json.dumps(config))


# What vLLM's build for CPUs says of any model in these forms on a CPU without AMX
WITHOUT_AMX = {
    ("fp8 blocks", "llama"): "requires AMX tile support",
    ("ModelOpt FP8", "llama"): "no attribute 'silu_and_mul_quant'",
}


@pytest.fixture
def folders(tiny, tmp_path) -> Callable[[str, str], list[Path]]:
    """folders(form, name): two towers with a quantised context tower, and that tower as a plain model."""

    def make(form: str, name: str) -> list[Path]:
        from benchmarks.vllm_side_by_side import plain_checkpoint

        both, plain = tmp_path / "both", tmp_path / "plain"
        twotower.save(tiny(name, dtype=torch.bfloat16, **SIZES), both)
        plain_checkpoint(both, plain)
        write_quantised(both, FORMS[form], ("context_tower.",), ["denoiser_tower*", "lm_head", "context_lm_head"])
        write_quantised(plain, FORMS[form], ("model.", "backbone."), ["lm_head"])
        return [both, plain]

    return make


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("GPTQ", "llama"),
        ("AWQ", "llama"),
        ("fp8 blocks", "llama"),
        ("ModelOpt FP8", "llama"),
        ("GPTQ", "M*-"),
        ("AWQ", "M*-"),
        ("ModelOpt FP8", "M*-"),
    ],
)
def test_a_quantised_context_tower_gives_the_tokens_of_the_same_model_without_a_denoiser(
    form, name, folders, engine, prompts
) -> None:
    from vllm import SamplingParams

    ids = [{"prompt_token_ids": one} for one in prompts(4)]
    # The plain model may write the mask token.
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False, logit_bias={MASK: -100.0})

    def tokens(folder: Path) -> list[list[int]]:
        outputs = engine(str(folder), dtype="bfloat16").generate(ids, params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in outputs]

    error = None if torch.cpu._is_amx_tile_supported() else WITHOUT_AMX.get((form, name))
    if error is not None:
        for folder in folders(form, name):
            with pytest.raises((ValueError, AttributeError), match=error):
                tokens(folder)
        return
    found = [tokens(folder) for folder in folders(form, name)]
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0]}) == 4


@pytest.mark.parametrize(
    ("form", "error"), [("fp8", "static_scaled_fp8_quant"), ("NVFP4", "Failed to find a kernel that can implement")]
)
def test_what_vllm_cant_compute_on_cpus_is_its_own_error_for_either_model(form, error, folders, engine) -> None:
    for folder in folders(form, "llama"):
        with pytest.raises((RuntimeError, ValueError), match=error):
            engine(str(folder), dtype="bfloat16")


@pytest.mark.parametrize(
    ("form", "name"), [("AWQ", "M*-"), ("fp8 blocks", "M*-"), ("ModelOpt FP8", "M*-"), ("ModelOpt FP8", "M*-M*E")]
)
def test_a_star_leaves_out_every_layer(form, name, tiny, tmp_path, engine, prompts, ask) -> None:
    twotower.save(tiny(name, dtype=torch.bfloat16, **SIZES), tmp_path / "floats")
    shutil.copytree(tmp_path / "floats", tmp_path / "starred")
    said = {key: value for key, value in FORMS[form].config.items() if key != "kv_cache_scheme"}
    write_quantised(tmp_path / "starred", FORMS[form]._replace(config=said), (), ["*"])
    ids = prompts(4)
    floats = ask(engine(str(tmp_path / "floats"), dtype="bfloat16"), ids, 20)
    assert ask(engine(str(tmp_path / "starred"), dtype="bfloat16"), ids, 20) == floats
