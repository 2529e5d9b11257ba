"""Decoders with ALiBi in the place of positions: BLOOM and MPT."""

import math
from typing import Any

from twotower.checkpoints.families.decoder import by_kv_heads, refuse, rows
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, need
from twotower.config import TwoTowerConfig


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """2^(-8/n), 2^(-16/n), … for the largest power of two n up to the heads, and every other one of 2n's for the rest
    of them (arXiv 2108.12409)."""
    n = 2 ** math.floor(math.log2(num_heads))
    rest = [2.0 ** (-8 * i / (2 * n)) for i in range(1, 2 * (num_heads - n), 2)]
    return (*(2.0 ** (-8 * i / n) for i in range(1, n + 1)), *rest)


def _fields(width: int, heads: int, count: int, *, biased: bool) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "pattern": "*-" * count,
        "norm_type": "layer",
        "norm_bias": biased,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "attention_bias": biased,
        "mlp_bias": biased,
    }


def _bloom(raw: Settings) -> dict[str, Any]:
    refuse(raw, apply_residual_connection_post_layernorm=(False,))
    width, heads = need(raw, "hidden_size", "n_embed"), need(raw, "n_head", "num_attention_heads")
    return _fields(width, heads, need(raw, "n_layer", "num_hidden_layers"), biased=True) | {
        "layer_norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "embedding_norm": True,
        "alibi_slopes": alibi_slopes(heads),
        "intermediate_size": 4 * width,
        "mlp_hidden_act": "gelu_tanh",
    }


def _bloom_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {
        "input_layernorm": "0.norm",
        "self_attention.query_key_value": by_kv_heads(config),
        "self_attention.dense": "0.mixer.o_proj",
        "post_attention_layernorm": "1.norm",
        "mlp.dense_h_to_4h": "1.mixer.up_proj",
        "mlp.dense_4h_to_h": "1.mixer.down_proj",
    }


def _mpt(raw: Settings) -> dict[str, Any]:
    """In slopes of heads that are no power of two, those of the next one are taken in another order than BLOOM's."""
    attention = raw.get("attn_config") or {}
    refuse(raw, no_bias=(True,), logit_scale=(None,), embedding_fraction=(1.0,))
    refuse(attention, alibi=(True,), qk_ln=(False,), prefix_lm=(False,), attn_type=("multihead_attention",))
    width, heads = raw.get("d_model", 2048), raw.get("n_heads", 16)
    n = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-attention.get("alibi_bias_max", 8) * i / n) for i in range(1, n + 1)]
    return _fields(width, heads, raw.get("n_layers", 24), biased=False) | {
        "layer_norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "attention_scale": attention.get("softmax_scale"),
        "alibi_slopes": tuple(slopes if n == heads else (slopes[1::2] + slopes[::2])[:heads]),
        "clip_qkv": attention.get("clip_qkv") or None,
        "intermediate_size": raw.get("expansion_ratio", 4) * width,
        "mlp_hidden_act": "gelu",
    }


def _mpt_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {
        "norm_1": "0.norm",
        "attn.Wqkv": rows([f"0.mixer.{name}_proj" for name in "qkv"], [config.hidden_size] * 3),
        "attn.out_proj": "0.mixer.o_proj",
        "norm_2": "1.norm",
        "ffn.up_proj": "1.mixer.up_proj",
        "ffn.down_proj": "1.mixer.down_proj",
    }


_BLOOM_REST: dict[str, Part] = {
    "word_embeddings": "embeddings",
    "word_embeddings_layernorm": "embedding_norm",
    "ln_f": "norm_f",
    "lm_head": "lm_head",
}
_MPT_REST: dict[str, Part] = {"wte": "embeddings", "norm_f": "norm_f", "lm_head": "lm_head"}
FAMILIES = (
    Family(model_types=("bloom",), fields=_bloom, block=_bloom_block, rest=_BLOOM_REST, layers_name="h"),
    Family(model_types=("mpt",), fields=_mpt, block=_mpt_block, rest=_MPT_REST, layers_name="blocks"),
)
