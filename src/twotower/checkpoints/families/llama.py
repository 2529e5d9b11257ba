"""Llama and the decoders that differ from it in few settings: Mistral, Ministral, Qwen 2 and 3, SmolLM 3, Granite,
Seed-OSS, Gemma, Arcee, Helium, EXAONE 3, ERNIE 4.5, GLM, Phi 3 and 4, HunYuan."""

from typing import Any

from twotower.checkpoints.families.decoder import (
    ATTENTION,
    MLP,
    REST,
    by_layer,
    decoder_fields,
    half_rotation,
    head_width,
    one_type,
    projections,
    read_rope,
    read_window,
    refuse,
    rows,
    windowed,
)
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, need
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType


def _block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return ATTENTION | MLP


def _llama(raw: Settings) -> dict[str, Any]:
    refuse(raw, rope_interleaved=(None, False), attn_logit_softcapping=(None,), final_logit_softcapping=(None,))
    return decoder_fields(raw) | {"mlp_bias": bool(raw.get("mlp_bias", False))}


def _mistral(raw: Settings) -> dict[str, Any]:
    """Every layer has the window, which is 4,096 where the config has no such key."""
    return _ministral({**raw, "layer_types": None})


def _ministral(raw: Settings) -> dict[str, Any]:
    given = {"sliding_window": 4096, "num_key_value_heads": 8, **raw}
    types = raw.get("layer_types") or ["sliding_attention"] * need(raw, "num_hidden_layers")
    rope = read_rope(raw)
    return decoder_fields(given) | {"attention_bias": False} | windowed(given, types, full=rope, sliding=rope)


def _ministral3(raw: Settings) -> dict[str, Any]:
    """Every layer has the window, if there is one, and scales queries by the original lengths that a text has had."""
    usual = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384}
    usual |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or usual
    given = {"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, **raw, "rope_parameters": scaling}
    kind = AttentionType(
        window=read_window(raw),
        rope_parameters=read_rope(given),
        query_growth=need({**raw, **scaling}, "llama_4_scaling_beta"),
        query_period=need({**raw, **scaling}, "original_max_position_embeddings"),
    )
    return decoder_fields(given) | {"attention_bias": False} | one_type(kind)


def _qwen(raw: Settings) -> dict[str, Any]:
    """Windows count only with `use_sliding_window`, and then from layer `max_window_layers` on."""
    count = need(raw, "num_hidden_layers")
    slides = raw.get("use_sliding_window", False) and raw.get("sliding_window", 4096) is not None
    first = raw.get("max_window_layers", 28) if slides else count
    usual = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    types = raw.get("layer_types") or usual
    rope = read_rope(raw)
    given = {"num_key_value_heads": 32, **raw, "sliding_window": raw.get("sliding_window", 4096) if slides else None}
    return decoder_fields(given) | windowed(given, types, full=rope, sliding=rope)


def _qwen2(raw: Settings) -> dict[str, Any]:
    return _qwen(raw) | {"attention_bias": True}


def qwen3_fields(raw: Settings) -> dict[str, Any]:
    """Qwen 3's fields, which its mixtures share."""
    return _qwen({"head_dim": 128, **raw}) | {"qk_norm": "head"}


def _smollm3(raw: Settings) -> dict[str, Any]:
    """Layers whose entry in `no_rope_layers` is 0 have no RoPE."""
    count = need(raw, "num_hidden_layers")
    interval = raw.get("no_rope_layer_interval", 4)
    turns = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    slides = raw.get("use_sliding_window", False) and raw.get("sliding_window") is not None
    usual = ["full_attention" if turn or not slides else "sliding_attention" for turn in turns]
    types = raw.get("layer_types") or usual
    window = read_window(raw) if slides else None
    rope = read_rope(raw, theta=2000000.0)
    kinds: list[AttentionType] = []
    for turn, name in zip(turns, types, strict=True):
        limit = window if name == "sliding_attention" else None
        kinds.append(AttentionType(window=limit, rope_parameters=rope if turn else None))
    fields = decoder_fields({"num_key_value_heads": 4, "tie_word_embeddings": True, **raw})
    return fields | {"mlp_bias": bool(raw.get("mlp_bias", False))} | by_layer(kinds)


def _seed_oss(raw: Settings) -> dict[str, Any]:
    if raw.get("attention_out_bias", False) and not raw.get("attention_bias", True):
        raise ValueError("attention_out_bias is true and attention_bias false; take another model")
    fields = decoder_fields({"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8, **raw})
    return fields | {"mlp_bias": bool(raw.get("mlp_bias", False))}


def granite_fields(raw: Settings) -> dict[str, Any]:
    """Granite's multipliers beside a decoder's fields."""
    return decoder_fields(raw) | {
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "embedding_scale": float(raw.get("embedding_multiplier", 1.0)),
        "residual_scale": float(raw.get("residual_multiplier", 1.0)),
        "logit_scale": 1.0 / raw.get("logits_scaling", 1.0),
        "attention_scale": float(raw.get("attention_multiplier", 1.0)),
    }


def _phi3(raw: Settings) -> dict[str, Any]:
    """The names "su" and "yarn" of older files mean longrope."""
    types = ["sliding_attention"] * need(raw, "num_hidden_layers")
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if (scaling.get("rope_type") or scaling.get("type")) in ("su", "yarn"):
        raw = {**raw, "rope_scaling": {**scaling, "rope_type": "longrope"}}
    rope = read_rope(raw, part=1.0)
    fields = decoder_fields({"rms_norm_eps": 1e-5, **raw}) | {"attention_bias": False}
    return fields | windowed(raw, types, full=rope, sliding=rope)


def _phi3_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    query, kv = (count * head_width(raw) for count in (config.num_attention_heads, config.num_key_value_heads))
    names = [f"0.mixer.{part}_proj" for part in "qkv"]
    gated = rows(["1.mixer.gate_proj", "1.mixer.up_proj"], [config.intermediate_size] * 2)
    return ATTENTION | MLP | {"self_attn.qkv_proj": rows(names, (query, kv, kv)), "mlp.gate_up_proj": gated}


def _gemma(raw: Settings) -> dict[str, Any]:
    """Norms multiply by 1 + weight, embeddings are scaled by √width. The "gelu" of the first files means its tanh."""
    refuse(raw, use_bidirectional_attention=(None, False))
    usual = {"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True}
    fields = decoder_fields({**usual, **raw, "hidden_act": None, "hidden_activation": _gemma_activation(raw)})
    return fields | {"norm_offset": 1.0, "embedding_scale": need(raw, "hidden_size") ** 0.5}


def _gemma_activation(raw: Settings) -> str:
    name = raw.get("hidden_act") or "gelu"
    return "gelu_pytorch_tanh" if name == "gelu" else name


def _arcee(raw: Settings) -> dict[str, Any]:
    fields = decoder_fields({"rms_norm_eps": 1e-5, "hidden_act": "relu2", **raw})
    return fields | {"gated_mlp": False, "mlp_bias": bool(raw.get("mlp_bias", False))}


def _helium(raw: Settings) -> dict[str, Any]:
    fields = decoder_fields({"head_dim": 128, "num_key_value_heads": 20, "rms_norm_eps": 1e-8, **raw})
    kind = AttentionType(rope_parameters=read_rope(raw, theta=100000.0))
    return fields | {"mlp_bias": bool(raw.get("mlp_bias", False))} | one_type(kind)


def _glm(raw: Settings) -> dict[str, Any]:
    usual = {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-07}
    return decoder_fields({**usual, **raw}) | one_type(AttentionType(rope_parameters=read_rope(raw, part=0.5)))


def _ernie(raw: Settings) -> dict[str, Any]:
    biased = bool(raw.get("use_bias", False))
    usual = {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    kind = AttentionType(rope_parameters=read_rope(raw, theta=500000.0))
    return decoder_fields({**usual, **raw}) | {"attention_bias": biased, "mlp_bias": biased} | one_type(kind)


def _exaone(raw: Settings) -> dict[str, Any]:
    """EXAONE 3, a Llama whose keys and tensors have names of their own."""
    names = {
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }
    own = {name: raw[theirs] for name, theirs in names.items() if raw.get(theirs) is not None}
    given = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, **raw, **own}
    return decoder_fields(given) | {"mlp_bias": bool(raw.get("mlp_bias", False))}


def _exaone_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {
        "ln_1": "0.norm",
        **projections("attn.attention", "out_proj"),
        "ln_2": "1.norm",
        "mlp.c_fc_0": "1.mixer.gate_proj",
        "mlp.c_fc_1": "1.mixer.up_proj",
        "mlp.c_proj": "1.mixer.down_proj",
    }


def hunyuan_fields(raw: Settings) -> dict[str, Any]:
    """HunYuan's fields, which its mixtures share. "dynamic" RoPE with an `alpha` is the same for all texts."""
    refuse(raw, use_qk_norm=(True, None), use_cla=(False, None))
    p = head_width(raw)
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if (scaling.get("rope_type") or scaling.get("type")) == "dynamic" and scaling.get("alpha"):
        theta = scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0
        turned = {"rope_theta": theta * scaling["alpha"] ** (p / (p - 2))}
        raw = {**raw, "rope_scaling": None, "rope_parameters": turned}
    fields = decoder_fields({"rms_norm_eps": 1e-5, **raw})
    return fields | {"qk_norm": "head", "qk_norm_behind_rope": True}


HUNYUAN_NORMS: dict[str, Part] = {
    "self_attn.query_layernorm": "0.mixer.q_norm",
    "self_attn.key_layernorm": "0.mixer.k_norm",
}


def _hunyuan_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return ATTENTION | MLP | HUNYUAN_NORMS


def neighbours_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """A block whose RoPE turns neighbouring numbers of a head, and whose MLP may have both its inputs in one tensor."""
    rope = config.attention_kinds[0].rope_parameters
    assert rope is not None
    turned = rope.turned(config.head_dim)
    return (
        ATTENTION
        | MLP
        | {
            "self_attn.q_proj": half_rotation("0.mixer.q_proj", config.num_attention_heads, turned),
            "self_attn.k_proj": half_rotation("0.mixer.k_proj", config.num_key_value_heads, turned),
            "mlp.gate_up_proj": rows(["1.mixer.gate_proj", "1.mixer.up_proj"], [config.intermediate_size] * 2),
        }
    )


LLAMA = Family(model_types=("llama",), fields=_llama, block=_block, rest=REST)
FAMILIES = (
    LLAMA,
    Family(model_types=("mistral",), fields=_mistral, block=_block, rest=REST),
    Family(model_types=("ministral",), fields=_ministral, block=_block, rest=REST),
    Family(model_types=("ministral3",), fields=_ministral3, block=_block, rest=REST),
    Family(
        model_types=("qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
        fields=_qwen2,
        block=_block,
        rest=REST,
        zeros=("o_proj.bias",),
    ),
    Family(model_types=("qwen3", "qwen3_vl_text"), fields=qwen3_fields, block=_block, rest=REST),
    Family(model_types=("smollm3",), fields=_smollm3, block=_block, rest=REST),
    Family(model_types=("seed_oss",), fields=_seed_oss, block=_block, rest=REST, zeros=("o_proj.bias",)),
    Family(model_types=("granite",), fields=granite_fields, block=_block, rest=REST),
    Family(model_types=("gemma",), fields=_gemma, block=_block, rest=REST),
    Family(model_types=("arcee",), fields=_arcee, block=_block, rest=REST),
    Family(model_types=("helium",), fields=_helium, block=neighbours_block, rest=REST, zeros=("o_proj.bias",)),
    Family(
        model_types=("exaone",),
        fields=_exaone,
        block=_exaone_block,
        rest={"wte": "embeddings", "ln_f": "norm_f", "lm_head": "lm_head"},
        layers_name="h",
    ),
    Family(model_types=("ernie4_5",), fields=_ernie, block=neighbours_block, rest=REST),
    Family(model_types=("glm",), fields=_glm, block=neighbours_block, rest=REST, zeros=("o_proj.bias",)),
    Family(model_types=("phi3",), fields=_phi3, block=_phi3_block, rest=REST),
    Family(model_types=("hunyuan_v1_dense",), fields=hunyuan_fields, block=_hunyuan_block, rest=REST),
)
