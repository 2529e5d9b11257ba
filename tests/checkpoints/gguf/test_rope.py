import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from twotower.checkpoints.gguf.reader import read_gguf
from twotower.checkpoints.gguf.rope import rope_parameters

Write = Callable[..., Path]
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
LINEAR = DEFAULT | {"rope_type": "linear", "factor": 4.0}


@pytest.fixture
def rope(write_metadata: Write) -> Callable[..., dict[str, Any]]:
    """The settings that are read from a file with the given metadata and tensors, for heads of width 8."""

    def read(tensors: dict[str, list[float]] | None = None, **keys: Any) -> dict[str, Any]:
        def extra(writer: gguf.GGUFWriter) -> None:
            writer.add_context_length(512)
            for key, value in keys.items():
                name = "llama.rope." + key.replace("__", ".")
                if isinstance(value, str):
                    writer.add_string(name, value)
                elif isinstance(value, int):
                    writer.add_uint32(name, value)
                else:
                    writer.add_float32(name, value)
            for name, values in (tensors or {}).items():
                writer.add_tensor(name, np.array(values, np.float32))

        return rope_parameters(read_gguf(write_metadata(extra)), 8)

    return read


def test_without_settings(rope: Callable[..., dict[str, Any]]) -> None:
    assert rope() == DEFAULT
    assert rope(freq_base=500000.0)["rope_theta"] == 500000.0
    assert rope(dimension_count=2)["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize(
    "keys",
    [
        {"scaling__type": "linear", "scaling__factor": 4.0},
        {"scaling__factor": 4.0},  # llama.cpp's default type is linear
        {"scale_linear": 4.0},  # as it was called in 2023
        {"scaling__factor": 4.0, "scale_linear": 2.0},
    ],
)
def test_linear_by_each_of_its_names(rope: Callable[..., dict[str, Any]], keys: dict[str, Any]) -> None:
    assert rope(**keys) == LINEAR


@pytest.mark.parametrize(
    "keys", [{"scaling__type": "none", "scaling__factor": 4.0}, {"scaling__factor": 0.0}, {"scaling__type": "linear"}]
)
def test_what_scales_nothing(rope: Callable[..., dict[str, Any]], keys: dict[str, Any]) -> None:
    assert rope(**keys) == DEFAULT


def test_yarn(rope: Callable[..., dict[str, Any]]) -> None:
    found = rope(scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=64)
    assert found == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": pytest.approx(0.1 * math.log(4) + 1),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    # llama.cpp's default is the length of the context.
    assert rope(scaling__type="yarn", scaling__factor=4.0)["original_max_position_embeddings"] == 512
    more = rope(
        scaling__type="yarn", scaling__factor=4.0, scaling__attn_factor=0.5, scaling__yarn_beta_fast=16.0,
        scaling__yarn_log_multiplier=1.0,
    )  # fmt: skip
    assert (more["attention_factor"], more["beta_fast"]) == (0.5, 16.0), "both factors of 0.1·ln(4) + 1 cancel"


def test_divisors_of_frequencies(rope: Callable[..., dict[str, Any]]) -> None:
    """Llama 3's are a tensor; so are LongRoPE's two lists."""
    divisors = [1.0, 1.5, 4.0, 8.0]
    found = rope({"rope_freqs.weight": divisors})
    assert found == {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "long_factor": divisors,
        "short_factor": divisors,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.0,
    }
    assert rope({"rope_freqs.weight": divisors}, scaling__factor=2.0)["long_factor"] == [2.0, 3.0, 8.0, 16.0]
    both = {"rope_factors_long.weight": divisors, "rope_factors_short.weight": [1.0, 1.0, 1.0, 2.0]}
    found = rope(both, scaling__type="longrope", scaling__attn_factor=1.25, scaling__original_context_length=64)
    assert (found["long_factor"], found["short_factor"]) == (divisors, [1.0, 1.0, 1.0, 2.0])
    assert (found["attention_factor"], found["original_max_position_embeddings"]) == (1.25, 64)
    assert rope({"rope_freqs.weight": [1.0] * 4})["rope_type"] == "default"


def test_a_factor_of_attention_alone(rope: Callable[..., dict[str, Any]]) -> None:
    """llama.cpp multiplies cosines and sines by it, whatever the type."""
    found = rope(scaling__attn_factor=2.0, scaling__factor=4.0)
    assert (found["rope_type"], found["attention_factor"]) == ("longrope", 2.0)
    assert found["long_factor"] == found["short_factor"] == [4.0] * 4


@pytest.mark.parametrize(
    ("tensors", "keys", "named"),
    [
        ({}, {"scaling__type": "ntk"}, "scales RoPE by 'ntk', must be none, linear, yarn or longrope"),
        ({}, {"scaling__alpha": 2.0}, r"rope\.scaling\.alpha"),
        ({"rope_freqs.weight": [1.0, 2.0]}, {}, "has 2 divisors of RoPE's frequencies, must be 4"),
        ({"rope_freqs.weight": [1.0, 2.0, 2.0, 2.0]}, {"scaling__type": "yarn"}, "both YaRN and a tensor"),
        ({"rope_freqs.weight": [2.0] * 4, "rope_factors_long.weight": [2.0] * 4}, {}, "must have one of them"),
    ],
)
def test_what_can_not_be_expressed(
    rope: Callable[..., dict[str, Any]], tensors: dict[str, list[float]], keys: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        rope(tensors, **keys)
