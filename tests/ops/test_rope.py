import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from twotower.ops.rope import Rotation, frequencies, rotate
from twotower.rope import Rope


def test_rotate_turns_pairs_of_halves_by_the_angle() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(1, 3, 2, 6, dtype=torch.float64), torch.randn(1, 3, 1, 3, dtype=torch.float64)
    out = rotate(x, Rotation(angle.cos(), angle.sin()))
    for token in range(3):
        for head in range(2):
            for j in range(3):
                number = complex(x[0, token, head, j], x[0, token, head, j + 3])
                turned = number * complex(math.cos(angle[0, token, 0, j]), math.sin(angle[0, token, 0, j]))
                torch.testing.assert_close(out[0, token, head, j].item(), turned.real, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(out[0, token, head, j + 3].item(), turned.imag, rtol=1e-12, atol=1e-12)


def test_numbers_of_a_head_behind_the_turned_ones_stay() -> None:
    x, angle = torch.randn(1, 3, 2, 10), torch.randn(1, 3, 1, 3)
    turned = rotate(x, Rotation(angle.cos(), angle.sin()))
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert torch.equal(turned[..., :6], rotate(x[..., :6], Rotation(angle.cos(), angle.sin())))


def test_a_length_class_has_the_frequencies_of_all_its_lengths() -> None:
    divisors = {"short_factor": (1.0, 2.0), "long_factor": (3.0, 5.0)}
    for kind, classes in (("default", {0}), ("yarn", {0}), ("longrope", {0, 33}), ("dynamic", {0, *range(33, 41)})):
        rope = Rope(rope_type=kind, factor=4.0, original_max_position_embeddings=32, **divisors)
        assert {rope.length_class(length) for length in range(41)} == classes
        for length in range(41):
            assert torch.equal(frequencies(rope, 4, length), frequencies(rope, 4, rope.length_class(length)))


SCALED = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 32.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5},
    {"rope_type": "dynamic", "factor": 3.0},
    {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0 + j / 8 for j in range(8)],
        "long_factor": [2.0 + j for j in range(8)],
    },
]


@pytest.mark.parametrize("length", [20, 64, 200])
@pytest.mark.parametrize("raw", SCALED)
def test_frequencies_are_those_of_transformers(raw: dict[str, Any], length: int) -> None:
    given = {"rope_theta": 5000.0, "original_max_position_embeddings": 64, **raw}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=64, rope_parameters=given
    )
    expected, _ = ROPE_INIT_FUNCTIONS[raw["rope_type"]](config, seq_len=length)
    rope = Rope(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
    torch.testing.assert_close(frequencies(rope, 16, length), expected, rtol=1e-6, atol=0)  # float32, another order
