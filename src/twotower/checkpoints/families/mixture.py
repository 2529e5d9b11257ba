"""Decoders with mixtures of experts: Mixtral, Qwen 2 and 3 MoE, OLMoE, GraniteMoE, gpt-oss, HunYuan and Llama 4."""

from typing import Any

from torch import Tensor

from twotower.checkpoints.families.decoder import (
    ATTENTION,
    MLP,
    REST,
    by_layer_types,
    decoder_fields,
    half_rotation,
    read_rope,
    read_window,
    refuse,
    rows,
    windowed,
)
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, need, whole
from twotower.checkpoints.families.llama import HUNYUAN_NORMS, granite_fields, hunyuan_fields
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType

# Routers without a bias for choosing have one of zeros: it is what `pretrain` balances experts by.
NO_CORRECTION = ("gate.e_score_correction_bias",)
_ROUTER: dict[str, Part] = {"mlp.gate": "1.mixer.gate"}
_PROJECTIONS = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
_MIXTRALS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def expert_parts(config: TwoTowerConfig, prefix: str, names: dict[str, str] = _PROJECTIONS) -> dict[str, Part]:
    """Gated experts, one by one under a prefix and with these names for ours, or stacked as transformers holds them:
    gate_up_proj (e, 2f, d) and down_proj (e, d, f)."""
    parts: dict[str, Part] = {
        f"{prefix}.{j}.{theirs}": f"1.mixer.experts.{j}.{ours}"
        for j in range(config.num_experts)
        for theirs, ours in names.items()
    }
    return parts | {f"{prefix}.gate_up_proj": _gates_and_ups, f"{prefix}.down_proj": _downs}


def _gates_and_ups(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for j, both in enumerate(tensor):
        gate, up = both.chunk(2)
        found |= {f"1.mixer.experts.{j}.gate_proj.weight": gate, f"1.mixer.experts.{j}.up_proj.weight": up}
    return found


def _downs(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
    return {f"1.mixer.experts.{j}.down_proj.weight": down for j, down in enumerate(tensor)}


def softmax_experts(count: int, width: int, active: int, *, normalise: bool) -> dict[str, Any]:
    """The fields of a softmax router and its experts. A softmax over the chosen alone is one over all, normalised."""
    return {
        "num_experts": count,
        "expert_intermediate_size": width,
        "num_experts_per_tok": active,
        "router": "softmax",
        "norm_topk_prob": normalise,
    }


def _mixtral(raw: Settings) -> dict[str, Any]:
    count = need(raw, "num_hidden_layers")
    rope = read_rope(raw, theta=1000000.0)
    experts = (whole(raw, "num_local_experts", 8), need(raw, "intermediate_size"), raw.get("num_experts_per_tok", 2))
    fields = decoder_fields({"num_key_value_heads": 8, "rms_norm_eps": 1e-5, **raw})
    fields |= {"pattern": "*E" * count, "use_rope": False}
    fields |= windowed(raw, ["sliding_attention"] * count, full=rope, sliding=rope)
    return fields | softmax_experts(*experts, normalise=True)


def _mixtral_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    parts: dict[str, Part] = ATTENTION | MLP | _ROUTER | {"block_sparse_moe.gate": "1.mixer.gate"}
    for prefix in ("block_sparse_moe.experts", "mlp.experts"):
        parts |= expert_parts(config, prefix, _MIXTRALS)
    return parts


def _qwen_moe(raw: Settings) -> dict[str, Any]:
    """What Qwen's mixtures have in common: layers without experts among those with them."""
    count, step = need(raw, "num_hidden_layers"), raw.get("decoder_sparse_step", 1)
    dense = raw.get("mlp_only_layers") or ()
    pattern = "".join("*-" if i in dense or (i + 1) % step else "*E" for i in range(count))
    width, num_experts = need(raw, "moe_intermediate_size"), _num_experts(raw)
    normalise = bool(raw.get("norm_topk_prob", False))
    experts = softmax_experts(num_experts, width, need(raw, "num_experts_per_tok"), normalise=normalise)
    return decoder_fields(raw) | {"pattern": pattern} | experts


def _num_experts(raw: Settings) -> int:
    """By its name in files of transformers 5, or of 4."""
    need(raw, "num_local_experts", "num_experts")
    return whole(raw, "num_experts" if raw.get("num_local_experts") is None else "num_local_experts")


def _qwen3_moe(raw: Settings) -> dict[str, Any]:
    """With `use_sliding_window` every layer has the window."""
    slides = raw.get("use_sliding_window", False)
    window = raw.get("sliding_window", 4096) if slides else None
    rope = read_rope(raw)
    types = ["sliding_attention"] * need(raw, "num_hidden_layers")
    attention = windowed({**raw, "sliding_window": window}, types, full=rope, sliding=rope)
    return _qwen_moe({"num_key_value_heads": 4, **raw}) | {"use_rope": False, "qk_norm": "head"} | attention


def _qwen2_moe(raw: Settings) -> dict[str, Any]:
    """With `use_sliding_window` every other layer below `max_window_layers` has the window."""
    count, slides = need(raw, "num_hidden_layers"), raw.get("use_sliding_window", False)
    below = raw.get("max_window_layers", 28) if slides else 0
    usual = ["sliding_attention" if i < below and i % 2 == 0 else "full_attention" for i in range(count)]
    types = raw.get("layer_types") or usual
    rope = read_rope(raw)
    given = {**raw, "sliding_window": raw.get("sliding_window", 4096) if slides else None}
    fields = (
        _qwen_moe({"num_key_value_heads": 16, **raw})
        | {"use_rope": False}
        | windowed(given, types, full=rope, sliding=rope)
    )
    return fields | {
        "attention_bias": bool(raw.get("qkv_bias", True)),
        "shared_expert_intermediate_size": need(raw, "shared_expert_intermediate_size"),
        "shared_expert_gate": True,
    }


def _olmoe(raw: Settings) -> dict[str, Any]:
    experts = (whole(raw, "num_experts", 64), need(raw, "intermediate_size"), raw.get("num_experts_per_tok", 8))
    fields = decoder_fields({"rms_norm_eps": 1e-5, **raw})
    fields |= {"pattern": "*E" * need(raw, "num_hidden_layers"), "qk_norm": "all", "clip_qkv": raw.get("clip_qkv")}
    return fields | softmax_experts(*experts, normalise=bool(raw.get("norm_topk_prob", False)))


def expert_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """Shared experts have one of two names, and only some families have them."""
    parts: dict[str, Part] = ATTENTION | MLP | _ROUTER | expert_parts(config, "mlp.experts")
    parts["mlp.shared_expert_gate"] = "1.mixer.shared_expert_gate"
    for name in _PROJECTIONS:
        parts[f"mlp.shared_expert.{name}"] = f"1.mixer.shared_experts.{name}"
    return parts


def _granitemoe(raw: Settings) -> dict[str, Any]:
    experts = (whole(raw, "num_local_experts", 8), need(raw, "intermediate_size"), raw.get("num_experts_per_tok", 2))
    fields = granite_fields(raw) | {"pattern": "*E" * need(raw, "num_hidden_layers")}
    shared = {"shared_expert_intermediate_size": raw.get("shared_intermediate_size", 0)}
    return fields | shared | softmax_experts(*experts, normalise=True)


def _granitemoe_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    shared = rows([f"1.mixer.shared_experts.{name}_proj" for name in ("gate", "up")], [_shared_width(config)] * 2)
    return (
        ATTENTION
        | MLP
        | expert_parts(config, "block_sparse_moe.experts")
        | {
            "block_sparse_moe.router.layer": "1.mixer.gate",
            "block_sparse_moe.router": "1.mixer.gate",
            "block_sparse_moe.input_linear": _gates_and_ups,
            "block_sparse_moe.output_linear": _downs,
            "shared_mlp.input_linear": shared,
            "shared_mlp.gate_proj": "1.mixer.shared_experts.gate_proj",  # apart in GGUF files
            "shared_mlp.up_proj": "1.mixer.shared_experts.up_proj",
            "shared_mlp.output_linear": "1.mixer.shared_experts.down_proj",
        }
    )


def _shared_width(config: TwoTowerConfig) -> int:
    return config.shared_expert_intermediate_size


def _gpt_oss(raw: Settings) -> dict[str, Any]:
    """Every attention layer has sinks and every other one a window, which the first has."""
    refuse(raw, swiglu_alpha=(1.702,))
    count = need(raw, "num_hidden_layers")
    usual = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    given = {
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "head_dim": 64,
        "sliding_window": 128,
        "num_key_value_heads": 8,
        **raw,
    }
    scaled = given.get("rope_parameters") or given.get("rope_scaling")
    rope = read_rope(given if scaled else {**given, "rope_parameters": usual}, theta=150000.0)
    types = raw.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    experts = (_num_experts(raw), need(raw, "intermediate_size"))
    active = need(raw, "num_experts_per_tok", "experts_per_token")
    fields = decoder_fields(given) | {"pattern": "*E" * count, "use_rope": False, "attention_sinks": True}
    return (
        fields
        | by_layer_types(
            types,
            {
                "full_attention": AttentionType(rope_parameters=rope),
                "sliding_attention": AttentionType(window=read_window(given), rope_parameters=rope),
            },
        )
        | softmax_experts(*experts, active, normalise=True)
        | {
            "router_bias": True,
            "mlp_bias": True,
            "mlp_hidden_act": "quick_gelu",
            "glu_limit": float(raw.get("swiglu_limit", 7.0)),
            "glu_offset": 1.0,
        }
    )


def _gpt_oss_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """Experts are stacked with their inputs first, (e, d, 2f) and (e, f, d); gate and up take turns. In GGUF files they
    are as in other families."""

    def gates_and_ups(kind: str) -> Part:
        def part(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for j, both in enumerate(tensor):
                for name, half in (("gate", both[..., ::2]), ("up", both[..., 1::2])):
                    found[f"1.mixer.experts.{j}.{name}_proj.{kind}"] = half.t() if half.ndim == 2 else half
            return found

        return part

    def downs(kind: str) -> Part:
        return lambda tensor, suffix: {
            f"1.mixer.experts.{j}.down_proj.{kind}": down.t() if down.ndim == 2 else down
            for j, down in enumerate(tensor)
        }

    return (
        ATTENTION
        | MLP
        | expert_parts(config, "mlp.experts")
        | {
            "self_attn.sinks": "0.mixer.sinks",
            "mlp.router": "1.mixer.gate",
            "mlp.experts.gate_up_proj": gates_and_ups("weight"),
            "mlp.experts.gate_up_proj_bias": gates_and_ups("bias"),
            "mlp.experts.down_proj": downs("weight"),
            "mlp.experts.down_proj_bias": downs("bias"),
        }
    )


def _hunyuan_moe(raw: Settings) -> dict[str, Any]:
    width = need(raw, "intermediate_size")
    experts = softmax_experts(whole(raw, "num_experts", 1), width, whole(raw, "moe_topk", 1), normalise=True)
    fields = hunyuan_fields(raw) | {"pattern": "*E" * need(raw, "num_hidden_layers")}
    return fields | experts | {"shared_expert_intermediate_size": width}


def _hunyuan_moe_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    shared: dict[str, Part] = {f"mlp.shared_mlp.{name}": f"1.mixer.shared_experts.{name}" for name in _PROJECTIONS}
    experts = expert_parts(config, "mlp.experts") | {"mlp.gate.wg": "1.mixer.gate"}
    return ATTENTION | MLP | HUNYUAN_NORMS | experts | shared


def _llama4(raw: Settings) -> dict[str, Any]:
    """Layers with RoPE norm queries and keys and see their chunk, the others see everything and scale queries."""
    count, step = need(raw, "num_hidden_layers"), raw.get("interleave_moe_layer_step", 1)
    mixtures = range(step - 1, count, step) if raw.get("moe_layers") is None else raw["moe_layers"]
    interval, chunk = raw.get("no_rope_layer_interval", 4), raw.get("attention_chunk_size", 8192)
    turns = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    types = raw.get("layer_types") or ["chunked_attention" if turn else "full_attention" for turn in turns]
    given = {"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, **raw}
    rope, scale = read_rope(given), {}
    if raw.get("attn_temperature_tuning", True):
        scale = {"query_growth": raw.get("attn_scale", 0.1), "query_period": int(raw.get("floor_scale", 8192))}
        scale["query_offset"] = 1
    kinds = {
        f"{name}, {turn}": AttentionType(chunk=limit, rope_parameters=rope if turn else None, **({} if turn else scale))
        for name, limit in (("chunked_attention", chunk), ("full_attention", None))
        for turn in (0, 1)
    }
    return (
        decoder_fields({**given, "intermediate_size": raw.get("intermediate_size_mlp", 16384)})
        | {"use_rope": False}
        | by_layer_types([f"{name}, {turn}" for name, turn in zip(types, turns[:count], strict=True)], kinds)
        | {
            "pattern": "".join("*E" if i in mixtures else "*-" for i in range(count)),
            "qk_norm": "head" if raw.get("use_qk_norm", True) else None,
            "qk_norm_behind_rope": bool(raw.get("use_qk_norm", True)),
            "num_experts": whole(raw, "num_local_experts", 16),
            "num_experts_per_tok": raw.get("num_experts_per_tok", 1),
            "expert_intermediate_size": need(raw, "intermediate_size"),
            "shared_expert_intermediate_size": need(raw, "intermediate_size"),
            "router": "sigmoid",
            "norm_topk_prob": False,
            "weigh_expert_inputs": True,
        }
    )


def _llama4_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """RoPE turns neighbouring pairs; norms of queries and keys have no weights, which are ones for us. Experts are
    stacked with their inputs first, (e, d, 2f) and (e, f, d)."""

    def gates_and_ups(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        return _gates_and_ups(tensor.mT, suffix)

    def downs(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        return _downs(tensor.mT, suffix)

    parts: dict[str, Part] = ATTENTION | MLP
    for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        parts[f"self_attn.{name}_proj"] = half_rotation(f"0.mixer.{name}_proj", heads, config.head_dim)
    for name in _PROJECTIONS:
        parts[f"feed_forward.{name}"] = f"1.mixer.{name}"
        parts[f"feed_forward.shared_expert.{name}"] = f"1.mixer.shared_experts.{name}"
    return parts | {
        "feed_forward.router": "1.mixer.gate",
        "feed_forward.experts.gate_up_proj": gates_and_ups,
        "feed_forward.experts.down_proj": downs,
    }


FAMILIES = (
    Family(model_types=("mixtral",), fields=_mixtral, block=_mixtral_block, rest=REST, zeros=NO_CORRECTION),
    Family(model_types=("qwen3_moe",), fields=_qwen3_moe, block=expert_block, rest=REST, zeros=NO_CORRECTION),
    Family(
        model_types=("qwen2_moe",),
        fields=_qwen2_moe,
        block=expert_block,
        rest=REST,
        zeros=(*NO_CORRECTION, "o_proj.bias"),
    ),
    Family(model_types=("olmoe",), fields=_olmoe, block=expert_block, rest=REST, zeros=NO_CORRECTION),
    Family(
        model_types=("granitemoe", "granitemoeshared"),
        fields=_granitemoe,
        block=_granitemoe_block,
        rest=REST,
        zeros=NO_CORRECTION,
    ),
    Family(model_types=("gpt_oss",), fields=_gpt_oss, block=_gpt_oss_block, rest=REST, zeros=NO_CORRECTION),
    Family(
        model_types=("hunyuan_v1_moe",),
        fields=_hunyuan_moe,
        block=_hunyuan_moe_block,
        rest=REST,
        zeros=NO_CORRECTION,
    ),
    Family(
        model_types=("llama4_text",),
        fields=_llama4,
        block=_llama4_block,
        rest=REST,
        zeros=NO_CORRECTION,
        ones=("q_norm.weight", "k_norm.weight"),
    ),
)
