"""Decoders with LayerNorm from before Llama, and those that kept it: Starcoder 2, OLMo, OPT, GPT-Neo,
GPT-BigCode, Falcon."""

from typing import Any

from torch import Tensor

from twotower.checkpoints.families.decoder import (
    ATTENTION,
    MLP,
    REST,
    activation,
    by_layer_types,
    copies,
    decoder_fields,
    one_type,
    read_rope,
    refuse,
    rows,
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
    refuse(raw, clip_qkv=(None,))
    return decoder_fields(raw) | {"norm_type": "layer", "layer_norm_epsilon": 1e-5}


def _olmo_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return ATTENTION | MLP


def _opt(raw: Settings) -> dict[str, Any]:
    width, heads = need(raw, "hidden_size"), need(raw, "num_attention_heads")
    allowed = {"do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,), "enable_bias": (True,)}
    refuse(raw, word_embed_proj_dim=(None, width), layer_norm_elementwise_affine=(True,), **allowed)
    return {
        "hidden_size": width,
        "pattern": "*-" * need(raw, "num_hidden_layers"),
        "norm_type": "layer",
        "norm_bias": True,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "num_positions": need(raw, "max_position_embeddings"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "attention_bias": True,
        "intermediate_size": need(raw, "ffn_dim"),
        "mlp_hidden_act": activation({"hidden_act": raw.get("activation_function")}, "relu"),
        "mlp_bias": True,
    }


def _opt_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {
        **{f"self_attn.{name}_proj": f"0.mixer.{name}_proj" for name in "qkv"},
        "self_attn.out_proj": "0.mixer.o_proj",
        "self_attn_layer_norm": "0.norm",
        "final_layer_norm": "1.norm",
        "fc1": "1.mixer.up_proj",
        "fc2": "1.mixer.down_proj",
    }


def _without_two_rows(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
    """OPT's first position has row 2 of its table."""
    return {f"position_embeddings.{suffix}": tensor[2:]}


def _gpt_neo(raw: Settings) -> dict[str, Any]:
    """Layers by turns as `attention_types` lists them; scores aren't scaled."""
    width, heads = need(raw, "hidden_size"), need(raw, "num_heads")
    listed = raw.get("attention_types") or [[["global", "local"], need(raw, "num_layers") // 2]]
    kinds = {"global": AttentionType(), "local": AttentionType(window=raw.get("window_size", 256))}
    return {
        "hidden_size": width,
        "pattern": "*-" * need(raw, "num_layers"),
        "norm_type": "layer",
        "norm_bias": True,
        "layer_norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "num_positions": raw.get("max_position_embeddings", 2048),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "attention_bias": True,
        "attention_scale": 1.0,
        "intermediate_size": raw.get("intermediate_size") or 4 * width,
        "mlp_hidden_act": activation({"hidden_act": raw.get("activation_function")}, "gelu_new"),
        "mlp_bias": True,
        **by_layer_types([name for names, count in listed for name in names * count], kinds),
    }


def _gpt_neo_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {
        "ln_1": "0.norm",
        **{f"attn.attention.{name}_proj": f"0.mixer.{name}_proj" for name in "qkv"},
        "attn.attention.out_proj": "0.mixer.o_proj",
        "ln_2": "1.norm",
        "mlp.c_fc": "1.mixer.up_proj",
        "mlp.c_proj": "1.mixer.down_proj",
    }


def _gpt_bigcode(raw: Settings) -> dict[str, Any]:
    width, heads = need(raw, "n_embd", "hidden_size"), need(raw, "n_head", "num_attention_heads")
    return {
        "hidden_size": width,
        "pattern": "*-" * need(raw, "n_layer", "num_hidden_layers"),
        "norm_type": "layer",
        "norm_bias": True,
        "layer_norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "num_positions": raw.get("n_positions", 1024),
        "num_attention_heads": heads,
        "num_key_value_heads": 1 if raw.get("multi_query", True) else heads,
        "head_dim": width // heads,
        "attention_bias": True,
        "attention_scale": None if raw.get("scale_attn_weights", True) else 1.0,
        "intermediate_size": raw.get("n_inner") or 4 * width,
        "mlp_hidden_act": activation({"hidden_act": raw.get("activation_function")}, "gelu_pytorch_tanh"),
        "mlp_bias": True,
    }


def _gpt_bigcode_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {
        "ln_1": "0.norm",
        "attn.c_attn": _by_kv_heads(config, shared=raw.get("multi_query", True)),
        "attn.c_proj": "0.mixer.o_proj",
        "ln_2": "1.norm",
        "mlp.c_fc": "1.mixer.up_proj",
        "mlp.c_proj": "1.mixer.down_proj",
    }


def _by_kv_heads(config: TwoTowerConfig, *, shared: bool) -> Part:
    """Queries, keys and values in one tensor: those of each KV head side by side, or all queries first."""
    names = [f"0.mixer.{name}_proj" for name in "qkv"]
    kv, p = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // kv
    if shared:
        return rows(names, [config.num_attention_heads * p, kv * p, kv * p])

    def part(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        heads = tensor.unflatten(0, (kv, group + 2, p))
        pieces = (heads[:, :group], heads[:, group], heads[:, group + 1])
        flat = (piece.reshape(-1, *tensor.shape[1:]) for piece in pieces)
        return {f"{name}.{suffix}": piece for name, piece in zip(names, flat, strict=True)}

    return part


def _falcon(raw: Settings) -> dict[str, Any]:
    """One KV head, one for each head, or, in the newer architecture, groups of them."""
    refuse(raw, alibi=(False, None))
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
        "mlp_hidden_act": activation({"hidden_act": raw.get("activation")}, "gelu"),
        "mlp_bias": biased,
        **one_type(AttentionType(rope_parameters=read_rope(raw))),
    }


def _falcon_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {
        "input_layernorm": copies("0.norm", "1.norm") if config.parallel else "0.norm",
        "post_attention_layernorm": "1.norm",
        "ln_attn": "0.norm",
        "ln_mlp": "1.norm",
        "self_attention.query_key_value": _by_kv_heads(config, shared=False),
        "self_attention.dense": "0.mixer.o_proj",
        "mlp.dense_h_to_4h": "1.mixer.up_proj",
        "mlp.dense_4h_to_h": "1.mixer.down_proj",
    }


_TABLES: dict[str, Part] = {"wte": "embeddings", "wpe": "position_embeddings", "ln_f": "norm_f", "lm_head": "lm_head"}
_OPT_REST: dict[str, Part] = {
    "embed_tokens": "embeddings",
    "embed_positions": _without_two_rows,
    "final_layer_norm": "norm_f",
    "lm_head": "lm_head",
}
_FALCON_REST: dict[str, Part] = {"word_embeddings": "embeddings", "ln_f": "norm_f", "lm_head": "lm_head"}
FAMILIES = (
    Family(model_types=("starcoder2",), fields=_starcoder2, block=_starcoder2_block, rest=REST),
    Family(model_types=("olmo",), fields=_olmo, block=_olmo_block, rest=REST, ones=(".norm.weight", "norm_f.weight")),
    Family(model_types=("opt",), fields=_opt, block=_opt_block, rest=_OPT_REST),
    Family(
        model_types=("gpt_bigcode",),
        fields=_gpt_bigcode,
        block=_gpt_bigcode_block,
        rest=_TABLES,
        layers_name="h",
        ignored=r"\.attn\.(bias|masked_bias)$",
    ),
    Family(
        model_types=("gpt_neo",),
        fields=_gpt_neo,
        block=_gpt_neo_block,
        rest=_TABLES,
        layers_name="h",
        zeros=("q_proj.bias", "k_proj.bias", "v_proj.bias"),
        ignored=r"\.attention\.(bias|masked_bias)$",
    ),
    Family(model_types=("falcon",), fields=_falcon, block=_falcon_block, rest=_FALCON_REST, layers_name="h"),
)
