"""Decoders with LayerNorm, parallel layers or ungated MLPs: GPT-NeoX (Pythia), StableLM, Cohere, Nemotron (Minitron),
Phi 1 and 2, and Apertus, whose MLP is ungated."""

from typing import Any

from torch import Tensor

from twotower.checkpoints.families.decoder import (
    ATTENTION,
    MLP,
    REST,
    by_kv_heads,
    by_layer_types,
    copies,
    decoder_fields,
    every,
    half_rotated,
    half_rotation,
    one_type,
    projections,
    read_rope,
    read_window,
)
from twotower.checkpoints.families.family import Family, Part, Parts, Settings
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType


def _gpt_neox(raw: Settings) -> dict[str, Any]:
    names = {"rope_theta": raw.get("rotary_emb_base"), "partial_rotary_factor": raw.get("rotary_pct")}
    raw = {"attention_bias": True, "hidden_act": "gelu", **raw, "num_key_value_heads": None, **names}
    return decoder_fields(raw) | {
        "mlp_bias": True,
        "norm_type": "layer",
        "norm_bias": True,
        "layer_norm_epsilon": raw.get("layer_norm_eps", 1e-5),
        "gated_mlp": False,
        "parallel": "*-" if raw.get("use_parallel_residual", True) else "",
        **one_type(AttentionType(rope_parameters=read_rope(raw, part=0.25))),
    }


def _gpt_neox_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {
        "input_layernorm": "0.norm",
        "attention.query_key_value": by_kv_heads(config),
        "attention.dense": "0.mixer.o_proj",
        "post_attention_layernorm": "1.norm",
        "mlp.dense_h_to_4h": "1.mixer.up_proj",
        "mlp.dense_4h_to_h": "1.mixer.down_proj",
    }


def _stablelm(raw: Settings) -> dict[str, Any]:
    fields = decoder_fields({"num_key_value_heads": 32, **raw, "attention_bias": raw.get("use_qkv_bias", False)})
    return fields | {
        "norm_type": "layer",
        "norm_bias": True,
        "layer_norm_epsilon": raw.get("layer_norm_eps", 1e-5),
        "qk_norm": "each" if raw.get("qk_layernorm", False) else None,
        "parallel": "*-" if raw.get("use_parallel_residual", False) else "",
        **one_type(AttentionType(rope_parameters=read_rope(raw, part=0.25))),
    }


def _stablelm_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    parts: dict[str, Part] = ATTENTION | MLP
    if config.parallel:  # one norm for both layers
        parts |= {"input_layernorm": copies("0.norm", "1.norm")}
    for name, count in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        for i in range(count):
            parts[f"self_attn.{name}_layernorm.norms.{i}.weight"] = f"0.mixer.{name}_norm.weight[{i}]"
    return parts


def _cohere(raw: Settings) -> dict[str, Any]:
    fields = decoder_fields({"tie_word_embeddings": True, **raw}) | _cohere_shared(raw)
    kind = AttentionType(rope_parameters=read_rope(raw, theta=500000.0))
    return fields | {"qk_norm": "each" if raw.get("use_qk_norm", False) else None} | one_type(kind)


def _cohere2(raw: Settings) -> dict[str, Any]:
    """Layers that see everything have no RoPE."""
    types = raw.get("layer_types") or every(raw.get("sliding_window_pattern", 4), raw)
    kinds = {
        "full_attention": AttentionType(),
        "sliding_attention": AttentionType(window=read_window(raw, 4096), rope_parameters=read_rope(raw)),
    }
    fields = decoder_fields({"tie_word_embeddings": True, **raw})
    return fields | _cohere_shared(raw) | by_layer_types(types, kinds)


def _cohere_shared(raw: Settings) -> dict[str, Any]:
    return {
        "norm_type": "layer",
        "layer_norm_epsilon": raw.get("layer_norm_eps", 1e-5),
        "logit_scale": float(raw.get("logit_scale", 0.0625)),
        "parallel": "*-",
    }


def _cohere_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """One norm serves both layers, and RoPE turns neighbouring pairs."""
    parts: dict[str, Part] = ATTENTION | MLP | {"input_layernorm": copies("0.norm", "1.norm")}
    for name, count in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        parts[f"self_attn.{name}_proj"] = half_rotation(f"0.mixer.{name}_proj", count, config.head_dim)
        parts[f"self_attn.{name}_norm"] = _turned_norm(f"0.mixer.{name}_norm", count)
    return parts


def _turned_norm(name: str, num_heads: int) -> Part:
    def part(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        turned = half_rotated(tensor.flatten(), num_heads, tensor.shape[-1])
        return {f"{name}.{suffix}": turned.view(tensor.shape)}

    return part


def _nemotron(raw: Settings) -> dict[str, Any]:
    fields = decoder_fields({"hidden_act": "relu2", **raw})
    return fields | {
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "norm_type": "layer",
        "norm_bias": True,
        "norm_offset": 1.0,
        "layer_norm_epsilon": raw.get("norm_eps", 1e-5),
        "gated_mlp": False,
        **one_type(AttentionType(rope_parameters=read_rope(raw, part=0.5))),
    }


def _phi(raw: Settings) -> dict[str, Any]:
    normed = bool(raw.get("qk_layernorm", False))
    return decoder_fields({"hidden_act": "gelu_new", **raw}) | {
        "norm_type": "layer",
        "norm_bias": True,
        "layer_norm_epsilon": raw.get("layer_norm_eps", 1e-5),
        "head_bias": True,
        "attention_bias": True,
        "qk_norm": "head" if normed else None,
        "qk_norm_bias": normed,
        "mlp_bias": True,
        "gated_mlp": False,
        "parallel": "*-",
        **one_type(AttentionType(rope_parameters=read_rope(raw, part=0.5))),
    }


def _phi_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """One norm serves both layers."""
    return projections("self_attn", "dense") | {
        "input_layernorm": copies("0.norm", "1.norm"),
        "self_attn.q_layernorm": "0.mixer.q_norm",
        "self_attn.k_layernorm": "0.mixer.k_norm",
        "mlp.fc1": "1.mixer.up_proj",
        "mlp.fc2": "1.mixer.down_proj",
    }


def _apertus(raw: Settings) -> dict[str, Any]:
    usual = {"rope_type": "llama3", "rope_theta": 12000000.0, "factor": 8.0, "low_freq_factor": 1.0}
    usual |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    given = {"rms_norm_eps": 1e-5, "hidden_act": "xielu", "rope_parameters": usual, **raw}
    kind = AttentionType(rope_parameters=read_rope(given, theta=12000000.0))
    fields = decoder_fields(given) | {"gated_mlp": False, "qk_norm": "head"}
    return fields | one_type(kind)


def _apertus_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return (
        ATTENTION
        | MLP
        | {
            "attention_layernorm": "0.norm",
            "feedforward_layernorm": "1.norm",
            "mlp.act_fn.alpha_p": "1.mixer.alpha_p",
            "mlp.act_fn.alpha_n": "1.mixer.alpha_n",
        }
    )


def _block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return ATTENTION | MLP


_NEOX_REST: dict[str, Part] = {"embed_in": "embeddings", "final_layer_norm": "norm_f", "embed_out": "lm_head"}

FAMILIES = (
    Family(
        model_types=("gpt_neox",),
        fields=_gpt_neox,
        block=_gpt_neox_block,
        rest=_NEOX_REST,
        ignored=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
    ),
    Family(model_types=("stablelm",), fields=_stablelm, block=_stablelm_block, rest=REST, zeros=("o_proj.bias",)),
    Family(model_types=("cohere",), fields=_cohere, block=_cohere_block, rest=REST),
    Family(model_types=("cohere2",), fields=_cohere2, block=_cohere_block, rest=REST),
    Family(model_types=("phi",), fields=_phi, block=_phi_block, rest=REST | {"final_layernorm": "norm_f"}),
    Family(model_types=("nemotron",), fields=_nemotron, block=_block, rest=REST),
    Family(
        model_types=("apertus",),
        fields=_apertus,
        block=_apertus_block,
        rest=REST,
        ignored=r"act_fn\.(beta|eps)$",
    ),
)
