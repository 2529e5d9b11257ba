"""Settings of decoders with ALiBi, as transformers reads them."""

from collections.abc import Callable
from typing import Any

import pytest

from twotower.checkpoints.families.known import find_family

BLOOM = {"n_layer": 2, "n_head": 4}
MPT = {"d_model": 48, "n_heads": 4, "n_layers": 2}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bloom", BLOOM | {"layer_norm_epsilon": 1e-2, "tie_word_embeddings": False}),
        ("bloom", BLOOM | {"hidden_size": 48, "n_head": 6}),
        ("bloom", BLOOM | {"n_head": 1}),
        ("mpt", MPT | {"n_heads": 6, "layer_norm_epsilon": 1e-2}),
        ("mpt", MPT | {"attn_config": {"softmax_scale": 0.2, "clip_qkv": 0.5}, "tie_word_embeddings": False}),
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
        ("bloom", BLOOM | {"apply_residual_connection_post_layernorm": True}, "post_layernorm is True, must be False"),
        ("mpt", MPT | {"attn_config": {"alibi": False}}, "alibi is False, must be True"),
        ("mpt", MPT | {"attn_config": {"qk_ln": True}}, "qk_ln is True, must be False"),
    ],
)
def test_what_is_computed_otherwise_is_refused(
    model_type: str, settings: dict[str, Any], says: str, open_family: Callable
) -> None:
    with pytest.raises(ValueError, match=says):
        open_family(model_type, **settings)


def test_a_bias_of_another_size_makes_other_slopes() -> None:
    """As in MPT's own code: transformers reads `alibi_bias_max` and goes on with 8."""
    raw = MPT | {"model_type": "mpt", "attn_config": {"alibi_bias_max": 4}}
    assert find_family(raw).fields(raw)["alibi_slopes"] == (0.5, 0.25, 0.125, 0.0625)
