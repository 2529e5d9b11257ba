from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from twotower.checkpoints.gguf.reader import read_gguf
from twotower.checkpoints.gguf.tensors import spec_of, values_of

Kind = gguf.GGMLQuantizationType
Write = Callable[..., Path]

QUANTISED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS"),
    *("IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"),
)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_tensors_are_what_the_gguf_package_says(write_metadata: Write, name: str) -> None:
    kind = Kind[name]
    block, width = gguf.GGML_QUANT_SIZES[kind]
    rows = np.zeros((3, 2, 512 // block * width), np.uint8)
    rows[..., : width // 2] = 17  # scales and values that differ from zero, and are no NaN in any of the formats
    path = write_metadata(lambda w: w.add_tensor("experts", rows, raw_dtype=kind))
    tensor = read_gguf(path).tensors["experts"]
    assert spec_of(tensor) == (torch.float32, (3, 2, 512))
    found = values_of(tensor)
    assert found.shape == (3, 2, 512)
    assert np.array_equal(found.numpy(), gguf.dequantize(rows, kind))


def test_q4_k_against_its_equation(write_metadata: Write) -> None:
    """A super-block of 256 numbers: 8 blocks of 32 with x = d·scale·q - dmin·min, 6-bit scales and 4-bit q."""
    rng = np.random.default_rng(0)
    block = rng.integers(0, 256, 144, np.uint8)
    block[:4] = np.array([0.5, 0.25], np.float16).view(np.uint8)
    path = write_metadata(lambda w: w.add_tensor("t", block[None], raw_dtype=Kind.Q4_K))
    packed, quants = block[4:16].astype(int), block[16:].astype(int)
    expected = []
    for j in range(8):
        if j < 4:
            scale, least = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4
            least = (packed[j + 4] >> 4) | (packed[j] >> 6) << 4
        for i in range(32):
            q = quants[j // 2 * 32 + i] >> (4 * (j % 2)) & 15
            expected.append(0.5 * scale * q - 0.25 * least)
    assert values_of(read_gguf(path).tensors["t"])[0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_kept(write_metadata: Write, dtype: torch.dtype) -> None:
    value = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = {"raw_dtype": Kind.BF16} if dtype == torch.bfloat16 else {}
    raw = value.view(torch.uint8).numpy() if stored else value.numpy()
    path = write_metadata(lambda w: w.add_tensor("t", raw, **stored))
    tensor = read_gguf(path).tensors["t"]
    assert spec_of(tensor) == (dtype, (3, 5))
    assert torch.equal(values_of(tensor), value)


def test_what_can_not_be_dequantised_is_named(write_metadata: Write) -> None:
    path = write_metadata(lambda w: w.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 32), np.int32)))
    with pytest.raises(ValueError, match=r"tensor blk\.0\.ffn_up\.weight of .* is stored as I32, which"):
        spec_of(read_gguf(path).tensors["blk.0.ffn_up.weight"])
