"""Models of Mamba-1 layers, alone or beside attention: Mamba, FalconMamba and Jamba."""

import math
from typing import Any

from torch import Tensor

from twotower.checkpoints.families.decoder import ATTENTION, REST, decoder_fields, refuse
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, whole
from twotower.checkpoints.families.mixture import NO_CORRECTION, expert_parts, softmax_experts
from twotower.config import TwoTowerConfig


def _steps(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
    return {"0.mixer.dt_proj.weight" if suffix == "weight" else "0.mixer.dt_bias": tensor}


_NAMES = ("in_proj", "conv1d", "x_proj", "A_log", "D", "out_proj")
_MIXER: dict[str, Part] = {name: f"0.mixer.{name}" for name in _NAMES} | {"dt_proj": _steps}
_NORMS = ("dt_norm.weight", "b_norm.weight", "c_norm.weight")


def _rank(raw: Settings, key: str) -> int:
    usual = math.ceil(whole(raw, "hidden_size") / 16)
    return usual if raw.get(key) == "auto" else whole(raw, key, usual)


def _mamba(raw: Settings) -> dict[str, Any]:
    """A width that is given wins over `expand`, which says 16 in FalconMamba's own file, where 2 is meant."""
    refuse(raw, hidden_act=("silu",))
    hidden = whole(raw, "hidden_size")
    return {
        "hidden_size": hidden,
        "pattern": "S" * whole(raw, "num_hidden_layers"),
        "layer_norm_epsilon": raw.get("layer_norm_epsilon") or 1e-5,
        "residual_in_fp32": raw.get("residual_in_fp32", True),
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
        "mamba_num_heads": whole(raw, "intermediate_size", hidden * whole(raw, "expand", 2)),
        "mamba_head_dim": 1,
        "mamba_state_size": whole(raw, "state_size", 16),
        "mamba_dt_rank": _rank(raw, "time_step_rank"),
        "conv_kernel": whole(raw, "conv_kernel", 4),
        "use_conv_bias": raw.get("use_conv_bias", True),
        "use_bias": raw.get("use_bias", False),
    }


def _falcon_mamba(raw: Settings) -> dict[str, Any]:
    return _mamba(raw) | {"mamba_inner_epsilon": raw.get("mixer_rms_eps", 1e-6)}


def _mamba_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return {"norm": "0.norm"} | {f"mixer.{name}": part for name, part in _MIXER.items()}


def _places(raw: Settings, name: str, period: int, offset: int) -> list[bool]:
    """For each layer whether it is the one of its period at the offset."""
    period, offset = whole(raw, f"{name}_period", period), whole(raw, f"{name}_offset", offset, least=0)
    return [i % period == offset for i in range(whole(raw, "num_hidden_layers"))]


def _jamba(raw: Settings) -> dict[str, Any]:
    """Each layer is Mamba-1 or attention without positions, and then an MLP or experts, both as wide."""
    refuse(raw, hidden_act=("silu",))
    experts = whole(raw, "num_experts", 16)
    attends, routes = _places(raw, "attn_layer", 8, 4), _places(raw, "expert_layer", 2, 1)
    layers = zip(attends, routes, strict=True)
    pattern = "".join("S*"[attends] + ("E" if routes and experts > 1 else "-") for attends, routes in layers)
    fields = decoder_fields({"num_key_value_heads": 8, **raw})
    fields |= {
        "pattern": pattern,
        "use_rope": False,
        "attention_bias": False,
        "mamba_num_heads": whole(raw, "mamba_expand", 2) * whole(raw, "hidden_size"),
        "mamba_head_dim": 1,
        "mamba_state_size": whole(raw, "mamba_d_state", 16),
        "mamba_dt_rank": _rank(raw, "mamba_dt_rank"),
        "mamba_inner_epsilon": fields["layer_norm_epsilon"],
        "conv_kernel": whole(raw, "mamba_d_conv", 4),
        "use_conv_bias": raw.get("mamba_conv_bias", True),
        "use_bias": raw.get("mamba_proj_bias", False),
    }
    if "E" not in pattern:
        return fields
    active = whole(raw, "num_experts_per_tok", 2)
    return fields | softmax_experts(experts, fields["intermediate_size"], active, normalise=False)


def _jamba_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    parts: dict[str, Part] = {f"mamba.{name}": part for name, part in _MIXER.items()}
    parts |= {f"mamba.{name}_layernorm": f"0.mixer.{name}_norm" for name in ("dt", "b", "c")}
    parts |= {f"feed_forward.{n}_proj": f"1.mixer.{n}_proj" for n in ("gate", "up", "down")}
    parts |= {"feed_forward.router": "1.mixer.gate", "pre_ff_layernorm": "1.norm"}
    return ATTENTION | parts | expert_parts(config, "feed_forward.experts")


_MAMBA_REST: dict[str, Part] = {"embeddings": "embeddings", "embedding": "embeddings", "norm_f": "norm_f"}
_MAMBA_REST |= {"lm_head": "lm_head"}
FAMILIES = (
    Family(model_types=("mamba",), fields=_mamba, block=_mamba_block, rest=_MAMBA_REST),
    Family(model_types=("falcon_mamba",), fields=_falcon_mamba, block=_mamba_block, rest=_MAMBA_REST, ones=_NORMS),
    Family(
        model_types=("jamba",),
        fields=_jamba,
        block=_jamba_block,
        rest=REST | {"final_layernorm": "norm_f"},
        zeros=NO_CORRECTION,
    ),
)
