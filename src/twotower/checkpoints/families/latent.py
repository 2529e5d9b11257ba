"""Decoders with latent attention and fine-grained experts: DeepSeek V2 and V3."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.families.decoder import (
    ATTENTION,
    MLP,
    REST,
    decoder_fields,
    half_rotated,
    one_type,
    read_rope,
    refuse,
)
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, need
from twotower.checkpoints.families.mixture import NO_CORRECTION, expert_parts
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType, Rope


def _deepseek_v2(raw: Settings) -> dict[str, Any]:
    refuse(raw, mlp_bias=(False,), norm_topk_prob=(None, False), scoring_func=(None, "softmax"))
    refuse(raw, topk_method=("greedy", "group_limited_greedy"))
    limited = raw.get("topk_method", "greedy") == "group_limited_greedy"
    return _latent_fields({"n_shared_experts": 2, **raw}) | {
        "router": "softmax",
        "norm_topk_prob": False,
        "expert_num_groups": need(raw, "n_group") if limited else 1,
        "expert_topk_groups": need(raw, "topk_group") if limited else 1,
        "routed_scaling_factor": float(raw.get("routed_scaling_factor", 1.0)),
    }


def _deepseek_v3(raw: Settings) -> dict[str, Any]:
    refuse(raw, scoring_func=(None, "sigmoid"), topk_method=(None, "noaux_tc"))
    return _latent_fields(
        {"n_shared_experts": 1, "first_k_dense_replace": 3, "num_experts_per_tok": 8, "n_routed_experts": 256, **raw}
    ) | {
        "expert_num_groups": raw.get("n_group", 8),
        "expert_topk_groups": raw.get("topk_group", 4),
        "norm_topk_prob": bool(raw.get("norm_topk_prob", True)),
        "routed_scaling_factor": float(raw.get("routed_scaling_factor", 2.5)),
    }


def _latent_fields(raw: Settings) -> dict[str, Any]:
    """What both have in common. A head holds its turned numbers first, so RoPE turns a part of it as usual."""
    refuse(raw, moe_layer_freq=(None, 1))
    given = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, **raw}
    turned, plain = given["qk_rope_head_dim"], given["qk_nope_head_dim"]
    width = max(turned + plain, given["v_head_dim"])
    part = turned / width
    if int(width * part) < turned:
        part = math.nextafter(part, 1.0)
    rope = dataclasses.replace(read_rope(raw), partial_rotary_factor=part)
    count, dense = need(raw, "num_hidden_layers"), raw.get("first_k_dense_replace", 0)
    heads = need(raw, "num_attention_heads")
    return decoder_fields(raw) | {
        "pattern": "*-" * min(dense, count) + "*E" * max(count - dense, 0),
        "num_key_value_heads": heads,
        "head_dim": width,
        "attention_scale": (turned + plain) ** -0.5 * _score_factor(raw, rope),
        "kv_lora_rank": given["kv_lora_rank"],
        "q_lora_rank": raw.get("q_lora_rank", 1536) or 0,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": plain,
        "v_head_dim": given["v_head_dim"],
        "use_rope": False,
        **one_type(AttentionType(rope_parameters=rope)),
        "num_experts": need(raw, "n_routed_experts", "num_experts", "num_local_experts"),
        "num_experts_per_tok": need(raw, "num_experts_per_tok"),
        "expert_intermediate_size": need(raw, "moe_intermediate_size"),
        "shared_expert_intermediate_size": need(raw, "moe_intermediate_size") * (raw["n_shared_experts"] or 0),
    }


def _score_factor(raw: Settings, rope: Rope) -> float:
    """With scaled RoPE `mscale_all_dim` also multiplies scores, by the square of what yarn multiplies cosines by."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    by = given.get("mscale_all_dim") or 0
    if rope.rope_type == "default" or not by or rope.factor <= 1:
        return 1.0
    return float((0.1 * by * math.log(rope.factor) + 1.0) ** 2)


def _block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """Attention's projections to heads have the numbers that RoPE turns last, in neighbouring pairs; ours first, in
    halves."""
    turned, heads = config.qk_rope_head_dim, config.num_attention_heads
    interleaved = bool(raw.get("rope_interleave", True)) or raw.get("model_type") == "deepseek_v2"

    def halves(rows: Tensor) -> Tensor:
        return half_rotated(rows, 1, turned) if interleaved else rows

    def queries(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        parts = tensor.unflatten(0, (heads, -1))
        placed = [torch.cat((halves(head[-turned:]), head[:-turned])) for head in parts]
        return {f"0.mixer.q_proj.{suffix}": torch.cat(placed)}

    def latents(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        return {f"0.mixer.kv_a_proj.{suffix}": torch.cat((tensor[:-turned], halves(tensor[-turned:])))}

    parts: dict[str, Part] = ATTENTION | MLP | expert_parts(config, "mlp.experts")
    for name in ("gate_proj", "up_proj", "down_proj"):
        parts[f"mlp.shared_experts.{name}"] = f"1.mixer.shared_experts.{name}"
    return parts | {
        "self_attn.q_proj": queries,
        "self_attn.q_a_proj": "0.mixer.q_a_proj",
        "self_attn.q_a_layernorm": "0.mixer.q_a_norm",
        "self_attn.q_b_proj": queries,
        "self_attn.kv_a_proj_with_mqa": latents,
        "self_attn.kv_a_layernorm": "0.mixer.kv_a_norm",
        "self_attn.kv_b_proj": "0.mixer.kv_b_proj",
        "mlp.gate": "1.mixer.gate",
        "mlp.gate.e_score_correction_bias": "1.mixer.gate.e_score_correction_bias",
    }


FAMILIES = (
    Family(model_types=("deepseek_v2",), fields=_deepseek_v2, block=_block, rest=REST, zeros=NO_CORRECTION),
    Family(model_types=("deepseek_v3",), fields=_deepseek_v3, block=_block, rest=REST, zeros=NO_CORRECTION),
)
