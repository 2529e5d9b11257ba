"""Models of Mamba-2 layers, alone or beside attention: Mamba-2, Bamba, Granite 4, Falcon-H1."""

from typing import Any

from torch import Tensor

from twotower.checkpoints.families.decoder import (
    ATTENTION,
    REST,
    copies,
    decoder_fields,
    one_type,
    read_rope,
    refuse,
    rows,
)
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, need, whole
from twotower.checkpoints.families.llama import granite_fields
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType

_MIXER = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj")
_MAMBA: dict[str, Part] = {f"mamba.{name}": f"0.mixer.{name}" for name in _MIXER}
_HYBRID_REST: dict[str, Part] = REST | {"final_layernorm": "norm_f"}
_KINDS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"}


def mamba_fields(raw: Settings, width: int) -> dict[str, Any]:
    """The fields of Mamba-2 layers of an inner width, in the words of Bamba."""
    refuse(raw, hidden_act=("silu",))
    heads = raw.get("mamba_n_heads", 128)
    head = raw.get("mamba_d_head", "auto")
    return {
        "mamba_num_heads": heads,
        "mamba_head_dim": width // heads if head in ("auto", None) else head,
        "mamba_state_size": raw.get("mamba_d_state", 256),
        "mamba_num_groups": raw.get("mamba_n_groups", 1),
        "conv_kernel": raw.get("mamba_d_conv", 4),
        "use_conv_bias": raw.get("mamba_conv_bias", True),
        "use_bias": raw.get("mamba_proj_bias", False),
        "time_step_limit": _limit(raw),
    }


def _limit(raw: Settings) -> tuple[float, float]:
    low, high = raw.get("time_step_limit") or (0.0, float("inf"))
    return float(low), float(high)


def _mamba2(raw: Settings) -> dict[str, Any]:
    refuse(raw, hidden_act=("silu",))
    return {
        "hidden_size": need(raw, "hidden_size"),
        "pattern": "M" * need(raw, "num_hidden_layers"),
        "layer_norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": raw.get("residual_in_fp32", True),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "mamba_num_heads": raw.get("num_heads", 128),
        "mamba_head_dim": raw.get("head_dim") or 64,
        "mamba_state_size": raw.get("state_size", 128),
        "mamba_num_groups": raw.get("n_groups", 8),
        "conv_kernel": raw.get("conv_kernel", 4),
        "use_conv_bias": raw.get("use_conv_bias", True),
        "use_bias": raw.get("use_bias", False),
        "time_step_limit": _limit(raw),
    }


def _mamba2_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {"norm": "0.norm"} | {f"mixer.{name}": f"0.mixer.{name}" for name in _MIXER}


def _bamba(raw: Settings) -> dict[str, Any]:
    """RoPE turns half of each head, whatever the config says."""
    attends = raw.get("attn_layer_indices") or ()
    count, width = need(raw, "num_hidden_layers"), raw.get("mamba_expand", 2) * need(raw, "hidden_size")
    fields = decoder_fields({"num_key_value_heads": 8, "rms_norm_eps": 1e-5, **raw}) | {"use_rope": False}
    rope = read_rope(raw, part=0.5)
    return (
        fields
        | mamba_fields(raw, width)
        | {"pattern": "".join("*-" if i in attends else "M-" for i in range(count))}
        | {"mlp_bias": bool(raw.get("mlp_bias", False))}
        | one_type(AttentionType(rope_parameters=rope))
    )


def _bamba_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return ATTENTION | _MAMBA | _feed_forward(1)


def _feed_forward(layer: int) -> dict[str, Part]:
    parts: dict[str, Part] = {f"feed_forward.{n}_proj": f"{layer}.mixer.{n}_proj" for n in ("gate", "up", "down")}
    return parts | {"pre_ff_layernorm": f"{layer}.norm"}


def _granite(raw: Settings) -> dict[str, Any]:
    """Each layer is Mamba-2 or attention and then an MLP, which with experts is the shared one."""
    count = need(raw, "num_hidden_layers")
    types = raw.get("layer_types") or raw.get("layers_block_type") or ["mamba"] * count
    refuse({"layer_types": sorted(set(types) - set(_KINDS))}, layer_types=([],))
    experts = raw.get("num_local_experts", 8)
    shared = whole(raw, "shared_intermediate_size", 1024)
    fields = granite_fields({"intermediate_size": 11008, **raw})
    if raw.get("position_embedding_type") != "rope":
        fields = fields | {"use_rope": False, "attention_types": ()}
    fields |= mamba_fields(raw, raw.get("mamba_expand", 2) * need(raw, "hidden_size"))
    fields |= {"pattern": "".join(_KINDS[name] + ("E" if experts else "-") for name in types)}
    if not experts:
        return fields | {"intermediate_size": shared}
    return fields | {
        "num_experts": experts,
        "num_experts_per_tok": raw.get("num_experts_per_tok", 2),
        "expert_intermediate_size": fields["intermediate_size"],
        "shared_expert_intermediate_size": shared,
        "router": "softmax",
    }


def _granite_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """Gate and up projections are one tensor, and all experts are."""
    shared, width = ("1.mixer.shared_experts", config.shared_expert_intermediate_size)
    if not config.num_experts:
        shared, width = "1.mixer", config.intermediate_size

    def ups(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        found = {}
        for j, expert in enumerate(tensor):
            for name, part in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                found[f"1.mixer.experts.{j}.{name}.{suffix}"] = part
        return found

    def downs(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        return {f"1.mixer.experts.{j}.down_proj.{suffix}": expert for j, expert in enumerate(tensor)}

    parts: dict[str, Part] = {
        "post_attention_layernorm": "1.norm",
        "shared_mlp.input_linear": rows([f"{shared}.gate_proj", f"{shared}.up_proj"], [width] * 2),
        "shared_mlp.output_linear": f"{shared}.down_proj",
        "block_sparse_moe.input_linear": ups,
        "block_sparse_moe.output_linear": downs,
        "block_sparse_moe.router.layer": "1.mixer.gate",
    }
    return ATTENTION | _MAMBA | parts


def _falcon_h1(raw: Settings) -> dict[str, Any]:
    """Each layer is Mamba-2 and attention side by side and then an MLP, with factors (µP) everywhere.

    Factors of what enters a projection without a bias are factors of what leaves it.
    """
    fields = decoder_fields({"num_key_value_heads": 8, "rms_norm_eps": 1e-5, **raw})
    mamba = mamba_fields(raw, raw.get("mamba_d_ssm", 1024) or raw.get("mamba_expand", 2) * need(raw, "hidden_size"))
    entering = {"attention_bias": "attention_in_multiplier", "mamba_proj_bias": "ssm_in_multiplier"}
    for bias, factor in entering.items():
        if raw.get(bias) and raw.get(factor, 1.0) != 1.0:
            refuse(raw, **{factor: (1.0,)})
    refuse(raw, projectors_bias=(bool(raw.get("mamba_proj_bias", False)),))
    attends, enters = raw.get("attention_in_multiplier", 1.0), raw.get("ssm_in_multiplier", 1.0)
    gate, down = raw.get("mlp_multipliers") or (1.0, 1.0)
    norm = "before_gate" if raw.get("mamba_norm_before_gate", True) else "after_gate"
    return (
        fields
        | mamba
        | {
            "pattern": "M*-" * need(raw, "num_hidden_layers"),
            "parallel": "M*",
            "embedding_scale": float(raw.get("embedding_multiplier", 1.0)),
            "logit_scale": float(raw.get("lm_head_multiplier", 1.0)),
            "attention_scale": fields["head_dim"] ** -0.5 * raw.get("key_multiplier", 1.0) * attends**2,
            "attention_output_scale": float(raw.get("attention_out_multiplier", 1.0) * attends),
            "mamba_norm": norm if raw.get("mamba_rms_norm", False) else None,
            "mamba_scales": tuple(enters * factor for factor in raw.get("ssm_multipliers") or [1.0] * 5),
            "mamba_output_scale": float(raw.get("ssm_out_multiplier", 1.0)),
            "mlp_bias": bool(raw.get("mlp_bias", False)),
            "glu_gate_scale": float(gate),
            "mlp_output_scale": float(down),
        }
    )


def _falcon_h1_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    attention: dict[str, Part] = {f"self_attn.{name}_proj": f"1.mixer.{name}_proj" for name in "qkvo"}
    return _MAMBA | attention | _feed_forward(2) | {"input_layernorm": copies("0.norm", "1.norm")}


FAMILIES = (
    Family(
        model_types=("mamba2",),
        fields=_mamba2,
        block=_mamba2_block,
        rest={"embeddings": "embeddings", "embedding": "embeddings", "norm_f": "norm_f", "lm_head": "lm_head"},
    ),
    Family(model_types=("bamba",), fields=_bamba, block=_bamba_block, rest=_HYBRID_REST),
    Family(
        model_types=("granitemoehybrid",),
        fields=_granite,
        block=_granite_block,
        rest=REST,
        zeros=("e_score_correction_bias",),
    ),
    Family(model_types=("falcon_h1",), fields=_falcon_h1, block=_falcon_h1_block, rest=_HYBRID_REST),
)
