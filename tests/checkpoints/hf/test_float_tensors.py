"""Directories of quantised weights, as the tools that make them name their parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from twotower.checkpoints.hf.float_tensors import FloatTensors, has_own_head, open_floats
from twotower.checkpoints.hf.tensor_files import TensorSpec

FP8 = torch.tensor([[1.0, 2.0], [3.0, -4.0]]).to(torch.float8_e4m3fn)
NIBBLES = torch.tensor([[0x21] * 16, [0x9A] * 16], dtype=torch.uint8)  # 0.5, 1 and -1, -0.5


@pytest.fixture
def opened(tmp_path: Path):
    def make(tensors: dict[str, torch.Tensor], settings: dict[str, Any] | None = None, **config: Any) -> FloatTensors:
        save_file(tensors, tmp_path / "model.safetensors")
        return open_floats(tmp_path, config | ({} if settings is None else {"quantization_config": settings}))

    return make


def read(found: FloatTensors) -> dict[str, torch.Tensor]:
    tensors = dict(found.stream(found.specs))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {n: s.shape for n, s in found.specs.items()}
    return tensors


@pytest.mark.parametrize(
    ("method", "parts", "expected"),
    [
        ("fp8", {"q.weight": FP8, "q.weight_scale_inv": torch.full((1, 1), 0.5)}, FP8.float() / 2),
        ("compressed-tensors", {"q.weight": FP8, "q.weight_scale": torch.ones(2, 1) * 0.5}, FP8.float() / 2),
        ("fbgemm_fp8", {"q.weight": FP8, "q.weight_scale": torch.ones(2, 1) * 0.5}, FP8.float() / 2),
        ("modelopt", {"q.weight": FP8, "q.weight_scale": torch.tensor(0.5)}, FP8.float() / 2),
        (
            "compressed-tensors",
            {"q.weight": FP8.to(torch.int8), "q.weight_scale": torch.tensor([2.0])},
            FP8.float() * 2,
        ),
        (
            "compressed-tensors",
            {
                "q.weight_packed": torch.tensor([[0x21212121] * 4, [0x43434343] * 4], dtype=torch.int32),
                "q.weight_scale": torch.ones(2, 1),
                "q.weight_shape": torch.tensor([2, 32]),
            },
            torch.tensor([[-7.0, -6.0] * 16, [-5.0, -4.0] * 16]),
        ),
        (
            "modelopt",
            {
                "q.weight": NIBBLES,
                "q.weight_scale": torch.full((2, 2), 2.0).to(torch.float8_e4m3fn),
                "q.weight_scale_2": torch.tensor(0.5),
            },
            torch.tensor([[0.5, 1.0] * 16, [-1.0, -0.5] * 16]),
        ),
        (
            "compressed-tensors",
            {
                "q.weight_packed": NIBBLES,
                "q.weight_scale": torch.full((2, 2), 2.0).to(torch.float8_e4m3fn),
                "q.weight_global_scale": torch.tensor([4.0]),
            },
            torch.tensor([[0.25, 0.5] * 16, [-0.5, -0.25] * 16]),
        ),
        (
            "mxfp4",
            {
                "q.weight_blocks": NIBBLES.view(1, 2, 1, 16),
                "q.weight_scales": torch.full((1, 2, 1), 128, dtype=torch.uint8),
            },
            torch.tensor([[[1.0, 2.0] * 16, [-2.0, -1.0] * 16]]).transpose(1, 2),
        ),
    ],
)
def test_the_parts_of_a_weight_become_one_float_tensor(opened, method, parts, expected):
    norm = torch.ones(2).bfloat16()
    left_out = {"q.input_scale": torch.ones(1), "k.k_scale": torch.ones(1), "q.input_global_scale": torch.ones(1)}
    found = opened(parts | left_out | {"norm.weight": norm}, {"quant_method": method, "format": "pack-quantized"})
    assert found.specs == {
        "q.weight": TensorSpec(torch.bfloat16, tuple(expected.shape)),
        "norm.weight": TensorSpec(torch.bfloat16, (2,)),
    }
    tensors = read(found)
    assert torch.equal(tensors["q.weight"], expected)
    assert torch.equal(tensors["norm.weight"], norm)


def test_the_size_of_blocks_comes_from_the_config(opened):
    weight, scale = torch.ones(6, 4).to(torch.float8_e4m3fn), torch.tensor([[1.0], [2.0]])
    parts = {"q.weight": weight, "q.weight_scale_inv": scale}
    groups = {
        "config_groups": {"group_0": {"weights": {"block_structure": [4, 4]}}},
        "quant_method": "compressed-tensors",
    }
    for settings in ({"quant_method": "fp8", "weight_block_size": [4, 4]}, groups):
        assert read(opened(parts, settings))["q.weight"][:, 0].tolist() == [1, 1, 1, 1, 2, 2]
    assert read(opened(parts, {"quant_method": "fp8"}))["q.weight"][:, 0].tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dequantised_weights_have_the_dtype_that_the_config_names(opened, key):
    parts = {"q.weight": FP8, "q.weight_scale": torch.ones(1)}
    assert opened(parts, {"quant_method": "fp8"}, **{key: "float16"}).specs["q.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 8}, -7.0),  # 1 − (7 + 1)
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, -6.0),
        ({"quant_method": "awq", "bits": 4, "version": "GEMM"}, -6.0),
    ],
)
def test_gptq_and_awq_have_no_tensor_called_weight(opened, tmp_path, settings, first):
    ones, sevens = 0x11111111, 0x77777777
    packed = torch.full((1, 8) if settings["quant_method"] == "gptq" else (8, 1), ones, dtype=torch.int32)
    parts = {"q.qweight": packed, "q.qzeros": torch.full((1, 1), sevens, dtype=torch.int32)}
    parts |= {"q.scales": torch.ones(1, 8).half(), "q.bias": torch.ones(8).half()}
    found = opened(parts | {"q.g_idx": torch.zeros(8, dtype=torch.int32)}, settings, torch_dtype="float16")
    assert found.specs["q.weight"] == TensorSpec(torch.float16, (8, 8))
    assert set(found.specs) == {"q.weight", "q.bias"}
    assert torch.equal(read(found)["q.weight"], torch.full((8, 8), first))
    beside = "quant_config.json" if settings["quant_method"] == "awq" else "quantize_config.json"
    (tmp_path / beside).write_text(json.dumps({k: v for k, v in settings.items() if k != "quant_method"}))
    assert torch.equal(read(opened(parts))["q.weight"], torch.full((8, 8), first))
    (tmp_path / beside).unlink()
    with pytest.raises(ValueError, match=r"config\.json does not say how q\.qweight is quantised"):
        opened(parts)
    del parts["q.qzeros"]
    with pytest.raises(ValueError, match=r"the tensor q\.qzeros is missing"):
        opened(parts, settings)


def test_8_bit_floats_without_a_scale_are_plain_numbers_unless_the_config_says_quantised(opened):
    assert torch.equal(read(opened({"q.weight": FP8}))["q.weight"], FP8.float())
    with pytest.raises(ValueError, match=r"tensor q\.weight of .* has no scale; download the model again"):
        opened({"q.weight": FP8}, {"quant_method": "fp8"})


def test_buffers_are_left_out(opened):
    buffers = {
        "embeddings.position_ids": torch.arange(4)[None],
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "h.0.attn.rotary_emb.inv_freq": torch.ones(2),
        "h.0.attn.kv_scale": torch.tensor(1.0),
    }
    assert set(opened(buffers | {"w": torch.ones(2)}).specs) == {"w"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "hqq"},
            "is quantised by hqq, which is not read; take the model it was made from, or one that",
        ),
        ({"quant_method": "gptq", "bits": 3}, r"quantised by gptq, 3 bits, form ''; read are \(2, 4, 8\) bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "form 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "quantised by awq, 4 bits, form 'gemv'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantised by bitsandbytes"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "compressed-tensors' format marlin-24, which is",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "has sparse weights in the format sparse-24-bitmask, which are not read",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            "has weights that are transformed",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(opened, settings, message):
    with pytest.raises(ValueError, match=message):
        opened({"w": torch.ones(2)}, settings)


def test_parts_that_do_not_fit_name_their_tensor(opened):
    parts = {"q.weight": torch.ones(3, 3).to(torch.float8_e4m3fn), "q.weight_scale": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"tensor q\.weight of .*: scales \(2, 2\) do not divide values \(3, 3\)"):
        read(opened(parts, {"quant_method": "fp8"}))


@pytest.mark.parametrize(("embedding", "head"), [("model.embed_tokens", "lm_head"), ("gpt_neox.embed_in", "embed_out")])
def test_a_head_is_its_own_only_if_both_are_stored_and_differ(opened, embedding, head):
    names, weight = (f"{embedding}.weight", f"{head}.weight"), torch.rand(3, 2)
    assert not has_own_head(opened({names[0]: weight}))
    assert not has_own_head(opened(dict.fromkeys(names, weight) | {names[1]: weight.clone()}))
    assert has_own_head(opened({names[0]: weight, names[1]: weight + 1}))
