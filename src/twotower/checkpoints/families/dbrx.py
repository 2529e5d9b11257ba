"""DBRX: LayerNorms without biases, clamped queries, keys and values, and experts in one tensor row by row."""

from typing import Any

from torch import Tensor

from twotower.checkpoints.families.decoder import activation, one_type, read_rope, refuse, rows
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, whole
from twotower.checkpoints.families.mixture import NO_CORRECTION, softmax_experts
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType


def _dbrx(raw: Settings) -> dict[str, Any]:
    """The base of RoPE is in `attn_config`, which transformers 5 passes over."""
    attention, mixture = raw.get("attn_config") or {}, raw.get("ffn_config") or {}
    refuse(mixture, moe_normalize_expert_weights=(None, 1.0))
    width, heads = whole(raw, "d_model", 2048), whole(raw, "n_heads", 16)
    base = {"rope_theta": attention["rope_theta"]} if "rope_theta" in attention else {}
    rope = read_rope({**raw, "rope_parameters": {**(raw.get("rope_parameters") or {}), **base}})
    count, active = whole(mixture, "moe_num_experts", 4), whole(mixture, "moe_top_k", 1)
    normalise = mixture.get("moe_normalize_expert_weights", 1.0) is not None
    return {
        "hidden_size": width,
        "pattern": "*E" * whole(raw, "n_layers", 24),
        "norm_type": "layer",
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "num_attention_heads": heads,
        "num_key_value_heads": whole(attention, "kv_n_heads", 1),
        "head_dim": width // heads,
        "clip_qkv": attention.get("clip_qkv"),
        "mlp_hidden_act": activation(mixture.get("ffn_act_fn") or {}, "silu", ("name",)),
        "gated_mlp": True,
        **softmax_experts(count, whole(mixture, "ffn_hidden_size", 3584), active, normalise=normalise),
        **one_type(AttentionType(rope_parameters=rope)),
    }


def _block(config: TwoTowerConfig, raw: Settings) -> Parts:
    query, kv = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))

    def experts(name: str, *, transposed: bool = False) -> Part:
        def part(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
            pieces = tensor.unflatten(0, (config.num_experts, -1))
            pieces = pieces.mT if transposed else pieces
            return {f"1.mixer.experts.{j}.{name}.weight": piece for j, piece in enumerate(pieces)}

        return part

    return {
        "norm_attn_norm.norm_1": "0.norm",
        "norm_attn_norm.attn.Wqkv": rows([f"0.mixer.{name}_proj" for name in "qkv"], [query, kv, kv]),
        "norm_attn_norm.attn.out_proj": "0.mixer.o_proj",
        "norm_attn_norm.norm_2": "1.norm",
        "ffn.router.layer": "1.mixer.gate",
        "ffn.experts.mlp.w1": experts("gate_proj"),
        "ffn.experts.mlp.v1": experts("up_proj"),
        "ffn.experts.mlp.w2": experts("down_proj", transposed=True),
    }


_REST: dict[str, Part] = {"wte": "embeddings", "norm_f": "norm_f", "lm_head": "lm_head"}
FAMILIES = (
    Family(model_types=("dbrx",), fields=_dbrx, block=_block, rest=_REST, layers_name="blocks", zeros=NO_CORRECTION),
)
