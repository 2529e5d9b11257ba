"""llama.cpp's architectures with mixtures of experts, and Llama's, which may have them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.gguf.architecture import (
    BLOCK,
    MIXES,
    SCALES,
    SIZES,
    TURNED,
    WINDOW,
    Architecture,
    experts,
    windows,
)
from twotower.checkpoints.gguf.dense import HUNYUAN, granite
from twotower.checkpoints.gguf.names import Joined, Undo, blocks, each, nothing, row, whole
from twotower.checkpoints.gguf.reader import GgufFile

# Experts of the Llama 4 without norms of queries and keys
_NOT_NORMED = 128
_SOFTMAX, _SIGMOID = 1, 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_*


def _llama(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Llama, Mistral and Mixtral. One with biases on queries, keys and values alone is what Qwen 2 computes."""
    if file.setting("expert_count"):
        return {"model_type": "mixtral", "sliding_window": None} | experts(file)
    if file.setting("attention.sliding_window"):
        return {"model_type": "mistral", "sliding_window": file.count("attention.sliding_window")}
    half_biased = raw["attention_bias"] and "blk.0.attn_output.bias" not in file.tensors
    return {"model_type": "qwen2" if half_biased else "llama"}


def _mistral3(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Ministral 3, whose queries grow with a text; without that a Llama or Mixtral."""
    growth = file.number("attention.temperature_scale", 0.0)
    if not growth:
        return _llama(file, raw)
    period = file.count("rope.scaling.original_context_length", least=1)
    own = {"llama_4_scaling_beta": growth, "original_max_position_embeddings": period}
    return {"model_type": "ministral3", "sliding_window": None, "rope_parameters": {**raw["rope_parameters"], **own}}


def _llama4(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp knows the chunks, what queries grow by and which layers have no RoPE, and by the number of experts
    whether queries and keys have norms."""
    if file.setting("attention.sliding_window") is not None:
        raise file.wrong("attention.sliding_window", "left out", "take the model's Hugging Face folder instead")
    found = experts(file)
    return found | {
        "model_type": "llama4_text",
        "intermediate_size_mlp": raw["intermediate_size"],
        "moe_layers": blocks(file, "ffn_gate_inp"),
        "use_qk_norm": found["num_local_experts"] != _NOT_NORMED,
    }


def _hunyuan(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    found = experts(file)
    if shared_width(file) != found["intermediate_size"]:
        raise file.wrong("expert_shared_feed_forward_length", f"{found['intermediate_size']}, as wide as other experts")
    return found | {"model_type": "hunyuan_v1_moe", "moe_topk": found["num_experts_per_tok"]}


def _dbrx(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    if abs(raw["layer_norm_eps"] - 1e-5) > 1e-9:
        raise file.wrong("attention.layer_norm_epsilon", "1e-05")
    found = experts(file)
    counts = {"moe_num_experts": found["num_experts"], "moe_top_k": found["num_experts_per_tok"]}
    return {
        "model_type": "dbrx",
        "d_model": raw["hidden_size"],
        "n_heads": raw["num_attention_heads"],
        "n_layers": raw["num_hidden_layers"],
        "attn_config": {
            "kv_n_heads": raw["num_key_value_heads"],
            "clip_qkv": file.number("attention.clamp_kqv", 0.0) or None,
        },
        "ffn_config": counts | {"ffn_hidden_size": found["intermediate_size"]},
    }


def qwen_experts(file: GgufFile, raw: Mapping[str, Any], *, normalise: bool) -> dict[str, Any]:
    """llama.cpp knows by the architecture whether the weights of the chosen experts are made to sum to 1."""
    mixed = blocks(file, "ffn_gate_inp")
    return experts(file) | {
        "intermediate_size": raw["intermediate_size"],
        "norm_topk_prob": file.flag("expert_weights_norm", normalise),
        "mlp_only_layers": [i for i in range(raw["num_hidden_layers"]) if i not in mixed],
        "shared_expert_intermediate_size": shared_width(file),
    }


def shared_width(file: GgufFile) -> int:
    """The width of the shared experts together; 0 without."""
    shared = next((t for name, t in file.tensors.items() if name.endswith("ffn_up_shexp.weight")), None)
    return 0 if shared is None else shared.shape[0]


def _qwen2_moe(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    own = {"model_type": "qwen2_moe", "qkv_bias": raw["attention_bias"]}
    return qwen_experts(file, raw, normalise=False) | own


def _qwen3_moe(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return qwen_experts(file, raw, normalise=True) | {"model_type": "qwen3_moe"}


def _olmoe(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "olmoe", "norm_topk_prob": False} | experts(file)


def _granitemoe(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    own = {"model_type": "granitemoe", "shared_intermediate_size": shared_width(file)}
    return granite(file, raw) | experts(file) | own


def _gpt_oss(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The model does not round where YaRN's ramp begins and ends, which the file does not say."""
    rope = raw["rope_parameters"] | {"truncate": False}
    return {"model_type": "gpt_oss", "rope_parameters": rope} | windows(file, 2) | experts(file)


def _deepseek(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Version 3 routes by sigmoids, 2 by a softmax. Files since latents are cached have the widths of heads under keys
    that end in "_mla"; the other widths are then those of the latents."""
    found = experts(file)
    gating = file.count("expert_gating_func", _SOFTMAX)
    corrected = bool(blocks(file, "exp_probs_b"))
    if gating not in (_SOFTMAX, _SIGMOID) or (gating == _SOFTMAX and corrected):
        rule = f"{_SIGMOID}, as its exp_probs_b says" if corrected else f"{_SOFTMAX} or {_SIGMOID}"
        fix = 'write "scoring_func": "sigmoid" into its config.json and convert it again'
        raise file.wrong("expert_gating_func", rule, fix if corrected else "take another file")
    mixed, dense, count = blocks(file, "ffn_gate_inp"), blocks(file, "ffn_gate"), raw["num_hidden_layers"]
    if [*dense, *mixed][:count] != list(range(count)):
        raise ValueError(f"{file.path} has blocks without experts behind some that have them; take another model")
    turned = file.count("rope.dimension_count", least=2)
    end = "_mla" if file.setting("attention.key_length_mla") is not None else ""
    width = file.count(f"attention.key_length{end}", least=turned + 1)
    return found | {
        "model_type": "deepseek_v3" if gating == _SIGMOID else "deepseek_v2",
        "intermediate_size": raw["intermediate_size"],
        "q_lora_rank": file.count("attention.q_lora_rank", 0) if blocks(file, "attn_q_a") else None,
        "kv_lora_rank": file.count("attention.kv_lora_rank", least=1),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": width - turned,
        "v_head_dim": file.count(f"attention.value_length{end}", least=1),
        "first_k_dense_replace": len(dense),
        "n_shared_experts": shared_width(file) // found["moe_intermediate_size"],
        "scoring_func": "sigmoid" if gating == _SIGMOID else "softmax",
        "topk_method": _choice(file, gating),
        "n_group": file.count("expert_group_count", 1) or 1,
        "topk_group": file.count("expert_group_used_count", 1) or 1,
        "norm_topk_prob": file.flag("expert_weights_norm", False),
        "routed_scaling_factor": file.number("expert_weights_scale", 0.0) or 1.0,
        "rope_parameters": _deepseek_rope(file, raw["rope_parameters"]),
    }


def _choice(file: GgufFile, gating: int) -> str:
    if gating == _SIGMOID:
        return "noaux_tc"
    return "group_limited_greedy" if file.count("expert_group_count", 1) > 1 else "greedy"


def _deepseek_rope(file: GgufFile, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The converter writes a tenth of mscale_all_dim, which is also mscale: cosines and sines keep their length, and
    scores are multiplied by its square."""
    every_dimension = file.number("rope.scaling.yarn_log_multiplier", 0.0)
    if rope["rope_type"] != "yarn" or not every_dimension:
        return dict(rope)
    own = {"attention_factor": file.number("rope.scaling.attn_factor", 1.0)}
    return {**rope, **own, "mscale_all_dim": float(f"{10 * every_dimension:.6g}")}


def _keys_and_values(values: Tensor, keys: Tensor, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Values (h, v, r) and keys (h, r, k) of the heads, made of latents (r): a head's keys (k, r), then its values."""
    return {"self_attn.kv_b_proj.weight": torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)}


def _inputs_first(ups: Tensor, gates: Tensor, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Gates and ups (e, f, d) as one tensor (e, d, 2f)."""
    return {"feed_forward.experts.gate_up_proj": torch.cat((gates, ups), dim=-2).mT}


EXPERTS: dict[str, Undo] = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": each("mlp.experts.{}.gate_proj"),
    "ffn_up_exps": each("mlp.experts.{}.up_proj"),
    "ffn_down_exps": each("mlp.experts.{}.down_proj"),
    "ffn_gate_up_exps": whole("mlp.experts.gate_up_proj"),
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": row("mlp.shared_expert_gate"),
}
_MIXTRAL: dict[str, Undo] = {
    "ffn_gate_exps": each("mlp.experts.{}.w1"),
    "ffn_up_exps": each("mlp.experts.{}.w3"),
    "ffn_down_exps": each("mlp.experts.{}.w2"),
}
_GRANITEMOE: dict[str, Undo] = {
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": each("block_sparse_moe.experts.{}.gate_proj"),
    "ffn_up_exps": each("block_sparse_moe.experts.{}.up_proj"),
    "ffn_down_exps": each("block_sparse_moe.experts.{}.down_proj"),
    "ffn_gate_up_exps": "block_sparse_moe.input_linear",
    "ffn_gate_shexp": "shared_mlp.gate_proj",
    "ffn_up_shexp": "shared_mlp.up_proj",
    "ffn_down_shexp": "shared_mlp.output_linear",
}
_GPT_OSS: dict[str, Undo] = {
    "attn_sinks": whole("self_attn.sinks"),
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
}
_DEEPSEEK: dict[str, Undo] = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": nothing,
    "attn_v_b": Joined("attn_k_b", _keys_and_values),
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b": whole("mlp.gate.e_score_correction_bias"),
}

_LLAMA4: dict[str, Undo] = {
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "ffn_gate_inp": "feed_forward.router",
    "ffn_gate_exps": nothing,
    "ffn_up_exps": Joined("ffn_gate_exps", _inputs_first),
    "ffn_down_exps": lambda tensor, suffix, raw: {"feed_forward.experts.down_proj": tensor.mT},
    "ffn_gate_shexp": "feed_forward.shared_expert.gate_proj",
    "ffn_up_shexp": "feed_forward.shared_expert.up_proj",
    "ffn_down_shexp": "feed_forward.shared_expert.down_proj",
}
_DBRX: dict[str, Undo] = {
    "attn_norm": "norm_attn_norm.norm_1",
    "attn_qkv": "norm_attn_norm.attn.Wqkv",
    "attn_output": "norm_attn_norm.attn.out_proj",
    "attn_output_norm": "norm_attn_norm.norm_2",
    "ffn_gate_inp": "ffn.router.layer",
    "ffn_gate_exps": lambda tensor, suffix, raw: {"ffn.experts.mlp.w1": tensor.flatten(0, 1)},
    "ffn_up_exps": lambda tensor, suffix, raw: {"ffn.experts.mlp.v1": tensor.flatten(0, 1)},
    "ffn_down_exps": lambda tensor, suffix, raw: {"ffn.experts.mlp.w2": tensor.mT.flatten(0, 1)},
}
_DBRX_REST: dict[str, Undo] = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.norm_f",
    "output": "lm_head",
}
_HUNYUAN: dict[str, Undo] = {
    "ffn_gate_inp": "mlp.gate.wg",
    "ffn_gate_shexp": "mlp.shared_mlp.gate_proj",
    "ffn_up_shexp": "mlp.shared_mlp.up_proj",
    "ffn_down_shexp": "mlp.shared_mlp.down_proj",
}

MIXTURES: Mapping[str, Architecture] = {
    "llama": Architecture(settings=_llama, block=BLOCK | TURNED | EXPERTS | _MIXTRAL, reads=WINDOW + MIXES),
    "mistral3": Architecture(
        settings=_mistral3,
        block=BLOCK | TURNED | EXPERTS | _MIXTRAL,
        reads=("attention.temperature_scale", *MIXES),
    ),
    "dbrx": Architecture(
        settings=_dbrx,
        block=_DBRX,
        rest=_DBRX_REST,
        layers="transformer.blocks",
        reads=("attention.clamp_kqv", *MIXES),
    ),
    "hunyuan-moe": Architecture(settings=_hunyuan, block=BLOCK | EXPERTS | HUNYUAN | _HUNYUAN, reads=MIXES),
    "llama4": Architecture(settings=_llama4, block=BLOCK | _LLAMA4, reads=MIXES),
    "qwen2moe": Architecture(settings=_qwen2_moe, block=BLOCK | EXPERTS, reads=MIXES),
    "qwen3moe": Architecture(settings=_qwen3_moe, block=BLOCK | EXPERTS, reads=MIXES),
    "olmoe": Architecture(settings=_olmoe, block=BLOCK | EXPERTS, reads=MIXES),
    "granitemoe": Architecture(settings=_granitemoe, block=BLOCK | TURNED | _GRANITEMOE, reads=SCALES + MIXES),
    "gpt-oss": Architecture(settings=_gpt_oss, block=BLOCK | EXPERTS | _GPT_OSS, reads=WINDOW + MIXES),
    "deepseek2": Architecture(settings=_deepseek, block=BLOCK | EXPERTS | _DEEPSEEK, reads=MIXES + SIZES),
}
