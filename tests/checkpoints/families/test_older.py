"""Settings of decoders from before Llama, as transformers reads them."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        (
            "starcoder2",
            {"use_bias": False, "tie_word_embeddings": False, "norm_epsilon": 1e-2, "num_key_value_heads": 1},
        ),
        ("olmo", {"tie_word_embeddings": True, "num_key_value_heads": 1, "attention_bias": True}),
        ("olmo", {"clip_qkv": 0.5}),
        ("exaone", {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "tie_word_embeddings": True}),
        ("ernie4_5", {"head_dim": 16, "use_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": False}),
        ("falcon", {"multi_query": True, "bias": True}),
        ("falcon", {"multi_query": False, "parallel_attn": False, "ffn_hidden_size": 80}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1}),
        ("gemma", {"head_dim": 16, "hidden_act": "gelu", "num_key_value_heads": 1}),
        ("gemma", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": False}),
        ("arcee", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("helium", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
        ("glm", {"head_dim": 16, "attention_bias": False, "partial_rotary_factor": 0.25}),
    ],
)
def test_settings_mean_what_they_do_in_transformers(
    model_type: str, settings: dict[str, Any], open_family: Callable, same_logits: Callable
) -> None:
    opened = open_family(model_type, **settings)
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)


@pytest.mark.parametrize(
    ("model_type", "settings", "says"),
    [
        ("falcon", {"alibi": True}, "alibi is True, must be False"),
    ],
)
def test_what_is_computed_otherwise_is_refused(
    model_type: str, settings: dict[str, Any], says: str, open_family: Callable
) -> None:
    with pytest.raises(ValueError, match=says):
        open_family(model_type, **settings)
