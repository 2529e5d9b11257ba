"""Decoders with LayerNorm and RoPE from before Llama, and those that kept it: Starcoder 2, OLMo, Falcon."""

from typing import Any

from twotower.checkpoints.families.decoder import (
    ATTENTION,
    MLP,
    REST,
    activation,
    by_kv_heads,
    copies,
    decoder_fields,
    one_type,
    read_rope,
    refuse,
    windowed,
)
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, need
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType


def _starcoder2(raw: Settings) -> dict[str, Any]:
    biased = bool(raw.get("use_bias", True))
    given = {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2, "tie_word_embeddings": True, **raw}
    rope = read_rope(raw)
    types = ["sliding_attention"] * need(raw, "num_hidden_layers")
    return decoder_fields(given) | {
        "norm_type": "layer",
        "norm_bias": True,
        "layer_norm_epsilon": raw.get("norm_epsilon", 1e-5),
        "attention_bias": biased,
        "mlp_bias": biased,
        "gated_mlp": False,
        **windowed(raw, types, full=rope, sliding=rope),
    }


def _starcoder2_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return ATTENTION | MLP | {"mlp.c_fc": "1.mixer.up_proj", "mlp.c_proj": "1.mixer.down_proj"}


def _olmo(raw: Settings) -> dict[str, Any]:
    """LayerNorms without weights, which are ones for us."""
    fields = decoder_fields(raw) | {"norm_type": "layer", "layer_norm_epsilon": 1e-5}
    return fields | {"clip_qkv": raw.get("clip_qkv")}


def _olmo_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return ATTENTION | MLP


def _falcon(raw: Settings) -> dict[str, Any]:
    """One KV head, one for each head, or, in the newer architecture, groups of them."""
    refuse(raw, alibi=(False, None))  # Falcon rounds what ALiBi adds to bfloat16, whatever the model is run in
    newer, biased = raw.get("new_decoder_architecture", False), bool(raw.get("bias", False))
    if newer:
        refuse(raw, parallel_attn=(True, None))
    heads, width = need(raw, "num_attention_heads", "n_head"), need(raw, "hidden_size", "n_embed")
    kv = raw.get("num_kv_heads") or heads if newer else 1 if raw.get("multi_query", True) else heads
    return {
        "hidden_size": width,
        "pattern": "*-" * need(raw, "num_hidden_layers", "n_layer"),
        "norm_type": "layer",
        "norm_bias": True,
        "layer_norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "parallel": "*-" if newer or raw.get("parallel_attn", True) else "",
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": width // heads,
        "attention_bias": biased,
        "intermediate_size": raw.get("ffn_hidden_size") or 4 * width,
        "mlp_hidden_act": activation(raw, "gelu", ("activation",)),
        "mlp_bias": biased,
        **one_type(AttentionType(rope_parameters=read_rope(raw))),
    }


def _falcon_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {
        "input_layernorm": copies("0.norm", "1.norm") if config.parallel else "0.norm",
        "post_attention_layernorm": "1.norm",
        "ln_attn": "0.norm",
        "ln_mlp": "1.norm",
        "self_attention.query_key_value": by_kv_heads(config),
        "self_attention.dense": "0.mixer.o_proj",
        "mlp.dense_h_to_4h": "1.mixer.up_proj",
        "mlp.dense_4h_to_h": "1.mixer.down_proj",
    }


_FALCON_REST: dict[str, Part] = {"word_embeddings": "embeddings", "ln_f": "norm_f", "lm_head": "lm_head"}
FAMILIES = (
    Family(model_types=("starcoder2",), fields=_starcoder2, block=_starcoder2_block, rest=REST),
    Family(model_types=("olmo",), fields=_olmo, block=_olmo_block, rest=REST, ones=(".norm.weight", "norm_f.weight")),
    Family(model_types=("falcon",), fields=_falcon, block=_falcon_block, rest=_FALCON_REST, layers_name="h"),
)
