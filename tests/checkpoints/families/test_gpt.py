"""Settings of GPT-2 and the decoders made after it, as transformers reads them."""

from collections.abc import Callable
from typing import Any

import pytest

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gpt2", GPT),
        ("gpt2", GPT | {"activation_function": "relu", "layer_norm_epsilon": 1e-2, "tie_word_embeddings": False}),
        ("gpt2", GPT | {"scale_attn_weights": False, "reorder_and_upcast_attn": True, "n_layer": 1}),
        ("gpt2", GPT | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3}),
        ("opt", {"ffn_dim": 80, "activation_function": "gelu", "max_position_embeddings": 40}),
        ("gpt_bigcode", GPT | {"multi_query": False, "n_inner": 80, "activation_function": "relu"}),
        ("gpt_bigcode", GPT | {"scale_attn_weights": False, "tie_word_embeddings": False}),
        (
            "gpt_neo",
            {"attention_types": [[["local"], 1], [["global"], 3]], "num_layers": 4, "num_heads": 4, "window_size": 5},
        ),
        ("gptj", GPT | {"rotary_dim": 8, "n_inner": 80, "activation_function": "gelu"}),
        ("gptj", GPT | {"n_embd": 56, "n_head": 1, "rotary_dim": 46, "layer_norm_epsilon": 1e-2}),
        ("gptj", GPT | {"rotary_dim": 2, "tie_word_embeddings": True}),
        ("codegen", GPT | {"rotary_dim": 8, "n_inner": 80}),
        ("codegen", GPT | {"n_embd": 64, "rotary_dim": 10, "tie_word_embeddings": True}),
    ],
)
def test_settings_mean_what_they_do_in_transformers(
    model_type: str, settings: dict[str, Any], open_family: Callable, same_logits: Callable
) -> None:
    opened = open_family(model_type, **settings)
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)


@pytest.mark.parametrize(
    ("model_type", "settings", "left_out"),
    [
        ("gpt2", GPT, ("layer_norm_epsilon", "activation_function", "n_inner")),
        ("gptj", GPT | {"n_embd": 256, "rotary_dim": 64}, ("rotary_dim", "layer_norm_epsilon", "tie_word_embeddings")),
    ],
)
def test_what_a_config_leaves_out_is_as_in_transformers(
    model_type: str, settings: dict[str, Any], left_out: tuple[str, ...], open_family: Callable, same_logits: Callable
) -> None:
    opened = open_family(model_type, edit=lambda c: [c.pop(key) for key in left_out], factor=3, **settings)
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)


def test_what_is_computed_otherwise_is_refused(open_family: Callable) -> None:
    with pytest.raises(ValueError, match="do_layer_norm_before is False, must be True"):
        open_family("opt", ffn_dim=48, do_layer_norm_before=False)


@pytest.mark.parametrize("tied", [False, True])
def test_both_heads_have_the_backbones_bias_and_the_masks_row(tied: bool, open_family: Callable) -> None:
    opened = open_family("gptj", **GPT, rotary_dim=4, tie_word_embeddings=tied)
    bias = opened.theirs.lm_head.bias
    for head in (opened.ours.context_lm_head, opened.ours.lm_head):
        assert head.linear.bias.tolist()[:-1] == bias.tolist()
    assert opened.ours.config.trained_positions == 40
    logits = opened.ours.denoise([[97] * 4], opened.ours.prefill(opened.ids[:1]))
    assert bool((logits[..., 97] == float("-inf")).all())


def test_gpt2_has_no_text_behind_its_last_position(open_family: Callable) -> None:
    opened = open_family("gpt2", **GPT)
    with pytest.raises(ValueError, match=r"41 tokens, must have at most the model's 40 positions"):
        opened.ours.extend([[5]], opened.ours.prefill(opened.ids[:1]))
