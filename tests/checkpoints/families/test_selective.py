"""Families of Mamba-1 and RG-LRU layers against transformers, in float32.

How far weights are from those drawn is limited by rounding: with weights five times as large, transformers' logits of a
Mamba and ours are 1e-4 of their scale apart, and either more than 1e-3 from ours in float64. Without a norm the
states feed back on their own step sizes. At these factors both are within 5e-6 of float64.
"""

from collections.abc import Callable
from typing import Any

import pytest

import twotower
from twotower.checkpoints.families.known import find_family

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"state_size": 5, "time_step_rank": 3}
JAMBA = {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 5, "mamba_dt_rank": 3}
GEMMA = {"lru_width": 48, "attention_window_size": 12, "block_types": ["recurrent", "attention"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", MAMBA),
    "mamba with other sizes": (
        "mamba",
        MAMBA
        | {
            "expand": 3,
            "intermediate_size": 96,
            "time_step_rank": "auto",
            "conv_kernel": 3,
            "use_bias": True,
            "use_conv_bias": False,
        }
        | {"tie_word_embeddings": False, "layer_norm_epsilon": 0.01},
    ),
    "falcon mamba": ("falcon_mamba", MAMBA | {"mixer_rms_eps": 0.1, "expand": 16, "intermediate_size": 48}),
    "jamba": ("jamba", JAMBA | EXPERTS | {"expert_layer_period": 2, "expert_layer_offset": 0}),
    "jamba without experts": (
        "jamba",
        JAMBA
        | {"num_experts": 1, "mamba_expand": 3, "mamba_d_conv": 2, "mamba_proj_bias": True, "mamba_conv_bias": False}
        | {"mamba_dt_rank": "auto", "tie_word_embeddings": True, "rms_norm_eps": 0.01, "num_key_value_heads": 1},
    ),
    "recurrent gemma": ("recurrent_gemma", GEMMA),
    "recurrent gemma with other sizes": (
        "recurrent_gemma",
        GEMMA
        | {"lru_width": None, "conv1d_width": 3, "num_key_value_heads": 1, "attention_bias": True}
        | {"block_types": ["recurrent"] * 2 + ["attention"], "logits_soft_cap": 2.0, "tie_word_embeddings": False},
    ),
}
LENGTH = 150  # beyond two chunks


@pytest.fixture(scope="module", params=MODELS)
def opened(request: pytest.FixtureRequest, open_family: Callable) -> Any:
    model_type, settings = MODELS[request.param]
    edit = _leave_out_the_width if request.param == "mamba with other sizes" else None
    factor = 1.5 if model_type == "mamba" else 3
    return open_family(model_type, edit=edit, length=LENGTH, factor=factor, max_position_embeddings=256, **settings)


def _leave_out_the_width(config: dict[str, Any]) -> None:
    """`expand` then gives it."""
    del config["intermediate_size"]


def test_logits_are_those_of_transformers(opened: Any, same_logits: Callable) -> None:
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)


def test_so_they_are_token_by_token_and_in_blocks(opened: Any, same_logits: Callable) -> None:
    state = opened.ours.prefill(opened.ids[:, :30], capacity=LENGTH)
    for end in (31, 32, 48, 55, 120, LENGTH):
        same_logits(state.next_logits, opened.logits[:, state.length - 1])
        state = opened.ours.extend(opened.ids[:, state.length : end], state)
    same_logits(state.next_logits, opened.logits[:, -1])


def test_so_they_are_from_the_first_token(opened: Any, same_logits: Callable) -> None:
    """Which is not added to an RG-LRU's state as others are."""
    state = opened.ours.prefill(opened.ids[:, :0], capacity=4)
    for length in range(1, 4):
        state = opened.ours.extend(opened.ids[:, length - 1 : length], state)
        same_logits(state.next_logits, opened.logits[:, length - 1])


@pytest.mark.parametrize("length", [0, LENGTH - 1])
def test_the_denoiser_starts_as_the_backbone(length: int, opened: Any, same_logits: Callable) -> None:
    """Of a block of one token, which sees nothing later, it gives the backbone's logits; of a text's first as well."""
    state = opened.ours.prefill(opened.ids[:, :length], capacity=LENGTH)
    same_logits(opened.ours.denoise(opened.ids[:, length : length + 1], state, t=0.5)[:, 0], opened.logits[:, length])


def test_verified_text_is_the_backbones_and_the_engines(opened: Any) -> None:
    prompt = opened.ids[0, :20].tolist()
    params = [
        twotower.SamplingParams(mode=mode, max_new_tokens=20, ignore_eos=True)
        for mode in ("ar", "verified", "diffusion")
    ]
    texts = [twotower.generate(opened.ours, [prompt], p)[0].token_ids for p in params]
    assert texts[0] == texts[1]
    engine = twotower.Engine(opened.ours)
    assert [result.token_ids for result in engine.generate([prompt] * 3, params)] == texts


def test_the_reference_runs_them_and_says_so(opened: Any) -> None:
    name = "RG-LRU" if "R" in opened.ours.config.pattern else "Mamba-1"
    assert f"lacks {name} layers" in str(opened.fastest.backends) or "compiler" in str(opened.fastest.backends)


NEEDED = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("model_type", "setting", "message"),
    [
        ("jamba", {"attn_layer_period": 0}, "attn_layer_period 0, must be a whole number of at least 1"),
        ("jamba", {"expert_layer_offset": -1}, "expert_layer_offset -1, must be a whole number of at least 0"),
        ("jamba", {"mamba_dt_rank": "big"}, "mamba_dt_rank 'big', must be a whole number"),
        ("jamba", {"mamba_expand": 2.5}, r"mamba_expand 2.5, must be a whole number"),
        ("jamba", {"num_experts": True}, "num_experts True, must be a whole number"),
        ("mamba", {"state_size": [16]}, r"state_size \[16\], must be a whole number"),
        ("mamba", {"hidden_act": "relu"}, "hidden_act is 'relu', must be 'silu'"),
        ("falcon_mamba", {"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ("recurrent_gemma", {"lru_width": 33}, "lru_width 33, must be a multiple of num_attention_heads 4"),
        ("recurrent_gemma", {"block_types": ["lstm"]}, r"block_types \['lstm'\], must be a list of recurrent and att"),
        ("recurrent_gemma", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear', must be 'def"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(model_type: str, setting: dict[str, Any], message: str) -> None:
    raw = NEEDED | {"model_type": model_type} | setting
    with pytest.raises(ValueError, match=message):
        find_family(raw).fields(raw)
