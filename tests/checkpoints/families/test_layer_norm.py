"""Settings of families with LayerNorm, parallel layers or ungated MLPs, as transformers reads them."""

from collections.abc import Callable
from typing import Any

import pytest

WINDOW = 12
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
        (
            "gpt_neox",
            {"rotary_pct": 1.0, "rotary_emb_base": 500, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
        ),
        ("gpt_neox", {"attention_bias": False, "layer_norm_eps": 1e-2, "num_hidden_layers": 1, "vocab_size": 131}),
        ("stablelm", {}),
        ("stablelm", {"qk_layernorm": True, "partial_rotary_factor": 0.5, "num_key_value_heads": 1}),
        ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True, "rope_parameters": LINEAR}),
        ("cohere", {"logit_scale": 0.5, "tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": 10}),
        ("cohere", {"attention_bias": True, "rope_parameters": LINEAR}),
        ("cohere2", {"sliding_window": WINDOW, "num_hidden_layers": 5, "attention_bias": True}),
        ("cohere2", {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("nemotron", {"head_dim": 20, "partial_rotary_factor": 0.75}),
        ("nemotron", {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 1.0, "norm_eps": 1e-2}),
        ("apertus", {"attention_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("phi", {"partial_rotary_factor": 0.25, "tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("phi", {"hidden_size": 80, "partial_rotary_factor": 0.4, "num_key_value_heads": None, "hidden_act": "gelu"}),
        ("apertus", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ],
)
def test_settings_mean_what_they_do_in_transformers(
    model_type: str, settings: dict[str, Any], open_family: Callable, same_logits: Callable
) -> None:
    opened = open_family(model_type, **settings)
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)


def older_neox(config: dict[str, Any]) -> None:
    del config["rope_parameters"], config["attention_bias"]
    config |= {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_scaling": {"type": "linear", "factor": 2.0}}


def neox_with_others_names(config: dict[str, Any]) -> None:
    """Of these two keys of other families NeoX knows nothing."""
    del config["rope_parameters"]
    config |= {"rope_theta": 500.0, "partial_rotary_factor": 1.0}


def older_cohere2(config: dict[str, Any]) -> None:
    del config["layer_types"]
    config["sliding_window_pattern"] = 2


@pytest.mark.parametrize(
    ("model_type", "settings", "edit"),
    [
        ("gpt_neox", {}, older_neox),
        ("gpt_neox", {}, neox_with_others_names),
        ("stablelm", {"num_key_value_heads": 4}, lambda c: c.update(rope_scaling=None, rope_theta=500.0)),
        ("cohere", {}, lambda c: (c.pop("rope_parameters"), c.pop("logit_scale"), c.pop("tie_word_embeddings"))),
        ("cohere2", {"sliding_window": WINDOW}, older_cohere2),
        ("nemotron", {}, lambda c: (c.pop("rope_parameters"), c.update(rope_theta=500.0, partial_rotary_factor=0.25))),
        ("phi", {}, lambda c: (c.pop("rope_parameters"), c.update(rope_theta=500.0, partial_rotary_factor=0.25))),
    ],
)
def test_configs_mean_what_transformers_reads_in_them(
    model_type: str, settings: dict[str, Any], edit: Any, open_family: Callable, same_logits: Callable
) -> None:
    opened = open_family(model_type, edit=edit, **settings)
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)
