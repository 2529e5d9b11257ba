"""Decoders with LayerNorm, parallel layers or ungated MLPs: GPT-2, GPT-NeoX (Pythia), StableLM, Cohere, Nemotron
(Minitron), and Apertus, whose MLP is ungated."""

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
    every,
    half_rotated,
    half_rotation,
    one_type,
    read_rope,
    refuse,
)
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, need
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType


def _gpt2(raw: Settings) -> dict[str, Any]:
    refuse(raw, scale_attn_by_inverse_layer_idx=(False,))
    width, heads = need(raw, "n_embd", "hidden_size"), need(raw, "n_head", "num_attention_heads")
    return {
        "hidden_size": width,
        "pattern": "*-" * need(raw, "n_layer", "num_hidden_layers"),
        "norm_type": "layer",
        "norm_bias": True,
        "layer_norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
        "num_positions": raw.get("n_positions", 1024),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "attention_bias": True,
        "attention_scale": None if raw.get("scale_attn_weights", True) else 1.0,
        "intermediate_size": raw.get("n_inner") or 4 * width,
        "mlp_hidden_act": activation({"hidden_act": raw.get("activation_function", "gelu_new")}, "gelu_new"),
        "mlp_bias": True,
    }


def _gpt2_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """GPT-2 stores its weights transposed (inputs first), and queries, keys and values as one."""

    def transposed(*names: str) -> Part:
        def part(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
            pieces = tensor.chunk(len(names), dim=-1)
            return {
                f"{name}.{suffix}": piece.t() if piece.ndim == 2 else piece
                for name, piece in zip(names, pieces, strict=True)
            }

        return part

    return {
        "ln_1": "0.norm",
        "attn.c_attn": transposed("0.mixer.q_proj", "0.mixer.k_proj", "0.mixer.v_proj"),
        "attn.c_proj": transposed("0.mixer.o_proj"),
        "ln_2": "1.norm",
        "mlp.c_fc": transposed("1.mixer.up_proj"),
        "mlp.c_proj": transposed("1.mixer.down_proj"),
    }


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
    def by_heads(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        """Each head's query, key and value rows lie side by side."""
        parts = tensor.unflatten(0, (config.num_attention_heads, 3, -1)).unbind(1)
        return {f"0.mixer.{name}_proj.{suffix}": part.flatten(0, 1) for name, part in zip("qkv", parts, strict=True)}

    return {
        "input_layernorm": "0.norm",
        "attention.query_key_value": by_heads,
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
        "sliding_attention": AttentionType(window=raw.get("sliding_window", 4096), rope_parameters=read_rope(raw)),
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


_GPT2_REST: dict[str, Part] = {
    "wte": "embeddings",
    "wpe": "position_embeddings",
    "ln_f": "norm_f",
    "lm_head": "lm_head",
}
_NEOX_REST: dict[str, Part] = {"embed_in": "embeddings", "final_layer_norm": "norm_f", "embed_out": "lm_head"}

FAMILIES = (
    Family(
        model_types=("gpt2",),
        fields=_gpt2,
        block=_gpt2_block,
        rest=_GPT2_REST,
        layers_name="h",
        ignored=r"\.attn\.(bias|masked_bias)$",
    ),
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
    Family(model_types=("nemotron",), fields=_nemotron, block=_block, rest=REST),
    Family(
        model_types=("apertus",),
        fields=_apertus,
        block=_apertus_block,
        rest=REST,
        ignored=r"act_fn\.(beta|eps)$",
    ),
)
