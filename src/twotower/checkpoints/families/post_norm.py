"""Decoders with norms behind attention and MLP: OLMo 2 and 3, EXAONE 4, Gemma 2 and 3, GLM 4."""

from typing import Any

from twotower.checkpoints.families.decoder import (
    ATTENTION,
    MLP,
    REST,
    by_layer_types,
    decoder_fields,
    every,
    one_type,
    read_rope,
    read_window,
    refuse,
    windowed,
)
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, need
from twotower.checkpoints.families.llama import neighbours_block
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType, Rope

# Without a norm before attention, and the usual name of the MLP's norm means the one behind attention.
_BEHIND: dict[str, Part] = {"post_attention_layernorm": "0.post_norm", "post_feedforward_layernorm": "1.post_norm"}
_AROUND: dict[str, Part] = _BEHIND | {"pre_feedforward_layernorm": "1.norm"}


def _olmo2(raw: Settings) -> dict[str, Any]:
    fields = decoder_fields({"rms_norm_eps": 1e-5, **raw})
    return fields | {"pre_norm": False, "post_norm": True, "qk_norm": "all"}


def _olmo3(raw: Settings) -> dict[str, Any]:
    types = raw.get("layer_types") or every(4, raw)
    full, sliding = _two_ropes(raw, 500000.0, raw.get("rope_theta") or 500000.0)
    given = {"sliding_window": 4096, **raw}
    return _olmo2(raw) | windowed(given, types, full=full, sliding=sliding)


def _exaone4(raw: Settings) -> dict[str, Any]:
    """With windows, the layers that see everything have no RoPE."""
    window = read_window(raw, 4096)
    period = raw.get("sliding_window_pattern", 4)
    types = raw.get("layer_types")
    if types is None and isinstance(period, str):  # "LLLG"
        types = [
            "sliding_attention" if period[i % len(period)] == "L" else "full_attention"
            for i in range(need(raw, "num_hidden_layers"))
        ]
        types[-1] = "full_attention"
    elif types is None:
        types = every(period if window is not None else 1, raw)
    rope = read_rope(raw)
    kinds = {
        "full_attention": AttentionType(rope_parameters=rope if window is None else None),
        "sliding_attention": AttentionType(window=window, rope_parameters=rope),
    }
    fields = decoder_fields({"rms_norm_eps": 1e-5, "num_key_value_heads": 32, **raw})
    fields |= {"attention_bias": False, "pre_norm": False, "post_norm": True, "qk_norm": "head"}
    return fields | by_layer_types(types, kinds)


def _gemma(raw: Settings, types: list[str], full: Rope, sliding: Rope) -> dict[str, Any]:
    """Gemma's norms multiply by 1 + weight, and its embeddings are scaled by √width."""
    refuse(raw, use_bidirectional_attention=(None, False))
    given = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, **raw}
    given = {"num_key_value_heads": 4, **given}
    fields = decoder_fields(given)
    fields |= windowed({"sliding_window": 4096, **raw}, types, full=full, sliding=sliding)
    return fields | {
        "post_norm": True,
        "norm_offset": 1.0,
        "embedding_scale": need(raw, "hidden_size") ** 0.5,
        "attention_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
    }


def _gemma2(raw: Settings) -> dict[str, Any]:
    count = need(raw, "num_hidden_layers")
    usual = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    rope = read_rope(raw)
    caps = {"attention_softcap": raw.get("attn_logit_softcapping", 50.0)}
    caps["logit_softcap"] = raw.get("final_logit_softcapping", 30.0)
    return _gemma(raw, raw.get("layer_types") or usual, rope, rope) | caps


def _vaultgemma(raw: Settings) -> dict[str, Any]:
    """Gemma 2 without the norms behind."""
    return _gemma2(raw) | {"post_norm": False}


def _gemma3(raw: Settings) -> dict[str, Any]:
    types = raw.get("layer_types") or every(raw.get("sliding_window_pattern", 6), raw)
    full, sliding = _two_ropes(raw, 1000000.0, raw.get("rope_local_base_freq") or 10000.0)
    cap = raw.get("final_logit_softcapping")  # transformers and llama.cpp cap no scores
    return _gemma(raw, types, full, sliding) | {"qk_norm": "head", "logit_softcap": cap}


def _glm4(raw: Settings) -> dict[str, Any]:
    fields = decoder_fields(
        {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-07, **raw}
    )
    kind = AttentionType(rope_parameters=read_rope(raw, part=0.5))
    return fields | {"post_norm": True} | one_type(kind)


def _two_ropes(raw: Settings, full_theta: float, sliding_theta: float) -> tuple[Rope, Rope]:
    """RoPE of full and of sliding attention: scaling is for full attention alone."""
    given = raw.get("rope_parameters") or {}
    full = {**(given.get("full_attention") or {}), **(raw.get("rope_scaling") or {})}
    rest = {key: value for key, value in raw.items() if key != "rope_scaling"}
    sliding = {"rope_theta": sliding_theta, **(given.get("sliding_attention") or {})}
    return (
        read_rope({**rest, "rope_parameters": full}, theta=full_theta),
        read_rope({**rest, "rope_parameters": sliding}),
    )


def _behind(config: TwoTowerConfig, raw: Settings) -> Parts:
    return ATTENTION | MLP | _BEHIND


def _before(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {**ATTENTION, **MLP, "pre_feedforward_layernorm": "1.norm"}


def _around(config: TwoTowerConfig, raw: Settings) -> Parts:
    return ATTENTION | MLP | _AROUND


def _glm4_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    behind = {"post_self_attn_layernorm": "0.post_norm", "post_mlp_layernorm": "1.post_norm"}
    return {**neighbours_block(config, raw), **behind}


FAMILIES = (
    Family(model_types=("olmo2",), fields=_olmo2, block=_behind, rest=REST),
    Family(model_types=("olmo3",), fields=_olmo3, block=_behind, rest=REST),
    Family(model_types=("exaone4",), fields=_exaone4, block=_behind, rest=REST),
    Family(model_types=("gemma2",), fields=_gemma2, block=_around, rest=REST),
    Family(model_types=("vaultgemma",), fields=_vaultgemma, block=_before, rest=REST),
    Family(model_types=("gemma3_text",), fields=_gemma3, block=_around, rest=REST),
    Family(model_types=("glm4",), fields=_glm4, block=_glm4_block, rest=REST, zeros=("o_proj.bias",)),
)
