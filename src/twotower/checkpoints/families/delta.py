"""Models of gated delta nets beside gated attention: Qwen3-Next and Qwen3.5."""

from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.families.decoder import (
    ATTENTION,
    MLP,
    REST,
    decoder_fields,
    one_type,
    read_rope,
    refuse,
    rows,
)
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, need
from twotower.checkpoints.families.mixture import NO_CORRECTION, expert_block, softmax_experts
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType

_KINDS = {"linear_attention": "G", "full_attention": "*"}
# Where config.json doesn't say
_USUAL: dict[str, dict[str, int]] = {
    "qwen3_next": {"intermediate_size": 5632, "num_key_value_heads": 2, "num_experts": 512},
    "qwen3_5_text": {"intermediate_size": 12288, "num_key_value_heads": 4},
    "qwen3_5_moe_text": {"intermediate_size": 5632, "num_key_value_heads": 2, "num_experts": 256},
}


def _qwen_next(raw: Settings) -> dict[str, Any]:
    """Three of four layers are gated delta nets, and RoPE turns a quarter of each head, unless the config says else."""
    refuse(raw, hidden_act=("silu",))
    count, interval = need(raw, "num_hidden_layers"), raw.get("full_attention_interval", 4)
    usual = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(count)]
    types = raw.get("layer_types") or usual
    refuse({"layer_types": sorted(set(types) - set(_KINDS))}, layer_types=([],))
    given = {"head_dim": 256, **_USUAL[raw["model_type"]], **raw}
    step, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
    experts = given.get("num_experts", 0)
    mlps = ["-" if not experts or i in dense or (i + 1) % step else "E" for i in range(count)]
    fields = decoder_fields(given) | {
        "pattern": "".join(_KINDS[name] + mlp for name, mlp in zip(types, mlps, strict=True)),
        "use_rope": False,
        "norm_offset": 1.0,
        "qk_norm": "head",
        "attention_gate": True,
        "mamba_num_heads": raw.get("linear_num_value_heads", 32),
        "mamba_head_dim": raw.get("linear_value_head_dim", 128),
        "mamba_num_groups": raw.get("linear_num_key_heads", 16),
        "mamba_state_size": raw.get("linear_key_head_dim", 128),
        "conv_kernel": raw.get("linear_conv_kernel_dim", 4),
        **one_type(AttentionType(rope_parameters=read_rope(raw, part=0.25))),
    }
    if not experts:
        return fields
    width, active = need(raw, "moe_intermediate_size"), need(raw, "num_experts_per_tok")
    shared = {"shared_expert_intermediate_size": need(raw, "shared_expert_intermediate_size")}
    normalise = bool(raw.get("norm_topk_prob", True))
    return fields | shared | softmax_experts(experts, width, active, normalise=normalise) | {"shared_expert_gate": True}


def _block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """Queries come with gates, head by head. A delta net's projections are two tensors, whose rows lie by key heads, in
    Qwen3-Next, and four in Qwen3.5."""
    c, mixer = config, "0.mixer"
    groups, keys, values = c.mamba_num_groups, c.mamba_num_groups * c.mamba_state_size, c.mamba_width

    def queries(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        heads = tensor.unflatten(0, (c.num_attention_heads, 2, c.head_dim))
        names = (f"{mixer}.q_proj", f"{mixer}.gate_proj")
        return {f"{name}.{suffix}": heads[:, i].flatten(0, 1) for i, name in enumerate(names)}

    def by_key_heads(names: str, sizes: list[int]) -> Part:
        def part(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
            pieces = tensor.unflatten(0, (groups, -1)).split([size // groups for size in sizes], dim=1)
            return {f"{mixer}.{n}_proj.{suffix}": x.flatten(0, 1) for n, x in zip(names, pieces, strict=True)}

        return part

    def taps(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        q, k, v = tensor.split([keys, keys, values])
        return {f"{mixer}.conv1d.{suffix}": torch.cat((v, k, q))}

    parts: dict[str, Part] = {
        **ATTENTION,
        **MLP,
        **expert_block(config, raw),
        "self_attn.q_proj": queries,
        "linear_attn.in_proj_qkvz": by_key_heads("qkvz", [keys, keys, values, values]),
        "linear_attn.in_proj_ba": by_key_heads("ba", [c.mamba_num_heads] * 2),
        "linear_attn.in_proj_qkv": rows([f"{mixer}.{n}_proj" for n in "qkv"], [keys, keys, values]),
        "linear_attn.in_proj_z": f"{mixer}.z_proj",
        "linear_attn.in_proj_b": f"{mixer}.b_proj",
        "linear_attn.in_proj_a": f"{mixer}.a_proj",
        "linear_attn.conv1d": taps,
    }
    parts |= {f"linear_attn.{name}": f"{mixer}.{name}" for name in ("dt_bias", "A_log", "norm", "out_proj")}
    return parts


FAMILIES = (
    Family(
        model_types=("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        fields=_qwen_next,
        block=_block,
        rest=REST,
        zeros=NO_CORRECTION,
    ),
)
