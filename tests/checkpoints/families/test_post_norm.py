"""Settings of families with norms behind attention and MLP, as transformers reads them."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from twotower.checkpoints.families.known import find_family

WINDOW = 12
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("olmo2", {"attention_bias": True, "num_key_value_heads": 1, "rope_parameters": YARN}),
        ("olmo2", {"tie_word_embeddings": True, "num_key_value_heads": 4, "num_hidden_layers": 1}),
        ("olmo3", {"sliding_window": WINDOW, "num_hidden_layers": 5, "attention_bias": True}),
        ("olmo3", {"sliding_window": WINDOW, "layer_types": ["full_attention"] + ["sliding_attention"] * 3}),
        ("exaone4", {"sliding_window": WINDOW, "num_hidden_layers": 7}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4, "rope_parameters": LINEAR}),
        ("gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", GEMMA | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}),
        ("gemma2", GEMMA | {"layer_types": ["full_attention"] * 4, "attention_bias": True, "rope_parameters": LINEAR}),
        ("gemma2", GEMMA | {"head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": False}),
        ("gemma3_text", GEMMA | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}),
        ("gemma3_text", GEMMA | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": YARN}}),
        ("glm4", {"head_dim": 16, "attention_bias": False, "partial_rotary_factor": 1.0}),
        ("glm4", {"head_dim": 12, "partial_rotary_factor": 0.25}),
        ("glm4", {"head_dim": 16, "partial_rotary_factor": 0.25, "tie_word_embeddings": True}),
    ],
)
def test_settings_mean_what_they_do_in_transformers(
    model_type: str, settings: dict[str, Any], open_family: Callable, same_logits: Callable
) -> None:
    opened = open_family(model_type, **settings)
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)


def older_gemma3(config: dict[str, Any]) -> None:
    del config["rope_parameters"], config["layer_types"]
    config |= {"rope_theta": 700.0, "rope_local_base_freq": 50.0, "sliding_window_pattern": 3}
    config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}


def older_olmo3(config: dict[str, Any]) -> None:
    """As allenai/Olmo-3-7B has it. Another `rope_theta` transformers 5.24 would give to full attention alone, against
    the release that the models came with and llama.cpp, which know one for both kinds."""
    del config["rope_parameters"], config["layer_types"]
    config |= {"rope_theta": 500000, "rope_scaling": YARN | {"attention_factor": 1.2, "rope_theta": 500000}}


def counted_exaone4(config: dict[str, Any]) -> None:
    del config["layer_types"]
    config["sliding_window_pattern"] = 3


@pytest.mark.parametrize(
    ("model_type", "settings", "edit"),
    [
        ("gemma3_text", GEMMA, older_gemma3),
        ("gemma3_text", GEMMA, lambda c: [c.pop(key) for key in ("rope_parameters", "layer_types")]),
        (
            "gemma2",
            GEMMA,
            lambda c: [c.pop(key) for key in ("layer_types", "attn_logit_softcapping", "rope_parameters")],
        ),
        ("olmo3", {"sliding_window": WINDOW}, older_olmo3),
        ("exaone4", {"sliding_window": WINDOW, "num_hidden_layers": 7}, counted_exaone4),
        ("glm4", {"head_dim": 16}, lambda c: [c.pop(key) for key in ("rope_parameters", "attention_bias")]),
    ],
)
def test_configs_mean_what_transformers_reads_in_them(
    model_type: str, settings: dict[str, Any], edit: Any, open_family: Callable, same_logits: Callable
) -> None:
    opened = open_family(model_type, edit=edit, **settings)
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)


def test_exaones_pattern_of_letters_ends_with_a_layer_that_sees_everything(open_family: Callable) -> None:
    """transformers 5.24 fails at such a pattern; its documentation says what one means."""
    given = {"sliding_window": WINDOW, "num_hidden_layers": 5}
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    listed = open_family("exaone4", **given, layer_types=types)
    raw = {"sliding_window_pattern": "LLG"}
    content = json.loads((listed.source / "config.json").read_text())
    del content["layer_types"]
    assert find_family(content).fields(content | raw) == find_family(content).fields(content | {"layer_types": types})
