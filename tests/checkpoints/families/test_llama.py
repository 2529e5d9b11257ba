"""Settings of the families near Llama, as transformers reads them."""

from collections.abc import Callable
from typing import Any

import pytest

WINDOW = 12
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
GROWING = {"llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 7, "rope_theta": 500.0}
ALPHA = {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 500.0}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 1}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 10, "tie_word_embeddings": True, "vocab_size": 131}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16, "truncate": False}}),
        ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
        ("mistral", {"sliding_window": None, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("mistral", {"sliding_window": 30, "max_position_embeddings": 24}),
        ("qwen2", SLIDING | {"max_window_layers": 28}),
        ("qwen2", SLIDING | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("qwen2", {"sliding_window": WINDOW, "num_hidden_layers": 7}),
        ("qwen3", {"head_dim": 10, "attention_bias": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
        ("smollm3", SLIDING),
        ("smollm3", SLIDING | {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "mlp_bias": True}),
        ("smollm3", {"no_rope_layers": [0, 0, 0, 0]}),
        ("smollm3", {"no_rope_layer_interval": 2, "rope_parameters": YARN}),
        ("seed_oss", {"head_dim": 16, "attention_bias": False}),
        ("seed_oss", {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True}),
        ("granite", {"attention_multiplier": 0.2, "tie_word_embeddings": True}),
        ("phi3", {"sliding_window": None, "head_dim": 10, "num_key_value_heads": 1}),
        ("phi3", {"sliding_window": None, "hidden_size": 40, "partial_rotary_factor": 0.5}),  # 5 of 10: 3 pairs
        (
            "ministral3",
            {"head_dim": 10, "num_key_value_heads": 1, "rope_parameters": GROWING | {"rope_type": "default"}},
        ),
        ("ministral3", {"head_dim": 16, "rope_parameters": YARN | GROWING, "sliding_window": WINDOW}),
        ("hunyuan_v1_dense", {"head_dim": 16, "num_key_value_heads": 1, "attention_bias": True, "rms_norm_eps": 1e-2}),
        ("hunyuan_v1_dense", {"head_dim": 10, "tie_word_embeddings": True, "rope_parameters": ALPHA}),
    ],
)
def test_settings_mean_what_they_do_in_transformers(
    model_type: str, settings: dict[str, Any], open_family: Callable, same_logits: Callable
) -> None:
    opened = open_family(model_type, **settings)
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)


def without(*keys: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        for key in keys:
            config.pop(key, None)
        config.update(changes)

    return edit


@pytest.mark.parametrize(
    ("model_type", "settings", "edit"),
    [
        # As transformers 4 wrote them
        ("llama", {}, without("rope_parameters", rope_theta=500.0, rope_scaling=None)),
        ("llama", {}, without("rope_parameters", rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0})),
        ("qwen2", {}, without("rope_parameters", rope_theta=500.0, rope_scaling={"type": "yarn", "factor": 4.0})),
        ("llama", {}, without(rope_scaling={"rope_type": "linear", "factor": 4.0})),
        # What a family's code doesn't read
        ("llama", {}, without(partial_rotary_factor=0.5)),
        ("qwen3", {"head_dim": 16}, without(partial_rotary_factor=0.5, mlp_bias=True)),
        # Keys that are not there
        ("llama", {"num_key_value_heads": 4}, without("num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act")),
        ("llama", {"num_key_value_heads": 4}, without(num_key_value_heads=None, head_dim=None)),
        ("mistral", {"num_key_value_heads": 8, "num_attention_heads": 8}, without("num_key_value_heads", "head_dim")),
        ("smollm3", {"tie_word_embeddings": True}, without("tie_word_embeddings", "no_rope_layers", "layer_types")),
        ("qwen3", {"head_dim": 128}, without("head_dim", "rope_parameters", "layer_types")),
        ("seed_oss", {"head_dim": 16}, without("attention_bias", "rope_parameters")),
        (
            "ministral3",
            {"num_key_value_heads": 2, "head_dim": 128},
            without("rope_parameters", "head_dim", "rms_norm_eps"),
        ),
        ("hunyuan_v1_dense", {"head_dim": 16}, without("rope_parameters", "rms_norm_eps", rope_scaling=ALPHA)),
        ("phi3", {"sliding_window": None}, without("sliding_window", "original_max_position_embeddings")),
    ],
)
def test_configs_mean_what_transformers_reads_in_them(
    model_type: str, settings: dict[str, Any], edit: Any, open_family: Callable, same_logits: Callable
) -> None:
    opened = open_family(model_type, edit=edit, **settings)
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)


def test_layers_of_hunyuan_that_transformers_does_not_know_are_refused(open_family: Callable) -> None:
    with pytest.raises(ValueError, match="use_qk_norm is False, must be True"):
        open_family("hunyuan_v1_dense", head_dim=16, use_qk_norm=False)
