"""The metadata that llama.cpp's converter (conversion/*.py) writes for a model of transformers."""

import math
from typing import Any

import gguf

Writer = gguf.GGUFWriter

# Where the converter's name of an architecture is not transformers'.
_OTHERS = """bamba:granitehybrid cohere:command-r deepseek_v2:deepseek2 deepseek_v3:deepseek2 falcon_h1:falcon-h1
falcon_mamba:mamba gemma3_text:gemma3 glm:chatglm gpt_bigcode:starcoder gpt_neox:gptneox gpt_oss:gpt-oss
granitemoehybrid:granitehybrid hunyuan_v1_dense:hunyuan-dense hunyuan_v1_moe:hunyuan-moe phi:phi2
llama4_text:llama4 ministral3:mistral3 mistral:llama mixtral:llama olmo3:olmo2
qwen2_moe:qwen2moe qwen3_5_moe_text:qwen35moe qwen3_5_text:qwen35 qwen3_moe:qwen3moe qwen3_next:qwen3next"""
ARCHITECTURES = dict(pair.split(":") for pair in _OTHERS.split())
RECURRENT = ("mamba2", "falcon_h1", "bamba", "granitemoehybrid", "nemotron_h")
RECURRENT += ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def architecture_of(c: Any) -> str:
    """The converter's name. Granite 4 without Mamba layers is Granite 3's architecture there."""
    if c.model_type == "nemotron_h" and "moe" in c.layers_block_type:
        return "nemotron_h_moe"
    if c.model_type == "granitemoehybrid" and "linear_attention" not in c.layer_types:
        return "granitemoe" if c.num_local_experts else "granite"
    return ARCHITECTURES.get(c.model_type, c.model_type)


def base_metadata(c: Any) -> dict[str, Any]:
    """What the converter writes of every architecture."""

    def first(*names: str) -> Any:
        return next((getattr(c, n) for n in names if getattr(c, n, None) is not None), None)

    rope = getattr(c, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    keys = {
        "block_count": c.num_hidden_layers,
        "context_length": first("max_position_embeddings"),
        "embedding_length": c.hidden_size,
        "feed_forward_length": first("intermediate_size") or 4 * c.hidden_size,
        "attention.head_count": first("num_attention_heads"),
        "attention.head_count_kv": first("num_key_value_heads", "num_attention_heads"),
        "attention.key_length": first("head_dim"),
        "attention.value_length": first("head_dim"),
        "attention.layer_norm_rms_epsilon": first("rms_norm_eps"),
        "attention.layer_norm_epsilon": first("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
        "rope.freq_base": rope.get("rope_theta"),
        "expert_count": first("num_local_experts", "num_experts", "n_routed_experts"),
        "expert_used_count": first("num_experts_per_tok"),
        "expert_feed_forward_length": first("moe_intermediate_size"),
        "expert_group_count": first("n_group"),
        "expert_group_used_count": first("topk_group"),
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        keys["rope.scaling.type"], keys["rope.scaling.factor"] = rope["rope_type"], rope["factor"]
        keys["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    if "partial_rotary_factor" in rope:
        keys["rope.dimension_count"] = int(rope["partial_rotary_factor"] * c.hidden_size // c.num_attention_heads)
    return keys


def put(writer: Writer, keys: dict[str, Any]) -> None:
    """Writes the architecture's settings that are not None."""
    for key, value in keys.items():
        name = f"{writer.arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            (writer.add_int32 if value < 0 else writer.add_uint32 if value < 2**32 else writer.add_uint64)(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)


def own_metadata(c: Any) -> dict[str, Any]:
    """What the converter writes of one architecture."""
    slides = [kind == "sliding_attention" for kind in getattr(c, "layer_types", None) or ()]
    window = getattr(c, "sliding_window", None)
    match c.model_type:
        case "mamba" | "falcon_mamba" | "jamba":
            return selective_metadata(c)
        case "ministral3":
            scale, log = (c.rope_parameters.get(key) for key in ("llama_4_scaling_beta", "mscale_all_dim"))
            return {"attention.temperature_scale": scale, "rope.scaling.yarn_log_multiplier": log}
        case "phi":
            turned = int(c.rope_parameters["partial_rotary_factor"] * c.hidden_size) // c.num_attention_heads
            return {"rope.dimension_count": turned}
        case "bloom":
            return {"context_length": c.hidden_size}
        case "mpt":
            own = c.attn_config
            bounds = {"attention.clamp_kqv": own.clip_qkv, "attention.max_alibi_bias": float(own.alibi_bias_max)}
            return bounds | {"context_length": c.max_seq_len, "attention.layer_norm_epsilon": 1e-5}
        case "dbrx":
            attention, mixture = c.attn_config, c.ffn_config
            counts = {"expert_count": mixture.moe_num_experts, "expert_used_count": mixture.moe_top_k}
            sizes = {"attention.head_count_kv": attention.kv_n_heads, "feed_forward_length": mixture.ffn_hidden_size}
            norm = {"attention.layer_norm_epsilon": 1e-5, "context_length": c.max_seq_len}
            bases = {"rope.freq_base": attention.rope_theta, "attention.clamp_kqv": attention.clip_qkv}
            return counts | sizes | norm | bases
        case "hunyuan_v1_moe":
            width = c.intermediate_size
            return {"expert_shared_feed_forward_length": width, "expert_used_count": c.moe_topk}
        case "llama4_text":
            widths = {"feed_forward_length": c.intermediate_size_mlp, "expert_feed_forward_length": c.intermediate_size}
            return widths | {"interleave_moe_layer_step": c.interleave_moe_layer_step}
        case "gemma2" | "gemma3_text":
            caps = ("attn_logit_softcapping", "final_logit_softcapping")
            return {name: getattr(c, name) for name in caps} | {"attention.sliding_window": window}
        case "gpt_oss":
            return {"attention.sliding_window": window}
        case "olmo3" | "exaone4":
            return {"attention.sliding_window": window, "attention.sliding_window_pattern": slides}
        case "phi3":
            rope = c.rope_parameters
            if rope["rope_type"] != "longrope":
                return {"attention.sliding_window": window or 0}
            original = rope["original_max_position_embeddings"]
            factor = math.sqrt(1 + math.log(c.max_position_embeddings / original) / math.log(original))
            return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": factor}
        case "falcon":
            widths = {"context_length": 2048, "attention.head_count_kv": c.num_kv_heads, "attention.key_length": None}
            return widths | {"feed_forward_length": 4 * c.hidden_size, "attention.value_length": None}
        case "gpt_bigcode":
            return {"attention.head_count_kv": 1}
        case "olmo":
            return {"attention.layer_norm_epsilon": 1e-5}
        case kind if kind in RECURRENT:
            return recurrent_metadata(c)
        case "deepseek_v2" | "deepseek_v3":
            return latent_metadata(c)
        case "cohere" | "cohere2":
            return {"logit_scale": c.logit_scale, "attention.sliding_window": window, "rope.scaling.type": "none"}
        case "granite" | "granitemoe":
            scales = {"attention.scale": c.attention_multiplier, "embedding_scale": c.embedding_multiplier}
            return scales | {"residual_scale": c.residual_multiplier, "logit_scale": c.logits_scaling}
        case "stablelm" | "gpt_neox":
            return {"use_parallel_residual": c.use_parallel_residual}
    return {}


def recurrent_metadata(c: Any) -> dict[str, Any]:
    """Of Mamba-2 layers and gated delta nets."""
    if c.model_type.startswith("qwen"):
        widths = (c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim, c.linear_num_key_heads)
        kernel = c.linear_conv_kernel_dim
    elif c.model_type in ("mamba2", "nemotron_h"):
        mamba2 = c.model_type == "mamba2"
        heads, width = (c.num_heads, c.head_dim) if mamba2 else (c.mamba_num_heads, c.mamba_head_dim)
        widths, kernel = (heads, width, c.state_size if mamba2 else c.ssm_state_size, c.n_groups), c.conv_kernel
    else:
        widths, kernel = (c.mamba_n_heads, c.mamba_d_head, c.mamba_d_state, c.mamba_n_groups), c.mamba_d_conv
    heads, width, state, groups = widths
    keys = {"ssm.time_step_rank": heads, "ssm.inner_size": heads * width, "ssm.state_size": state}
    keys |= {"ssm.group_count": groups, "ssm.conv_kernel": kernel}
    types = getattr(c, "layers_block_type", None) or getattr(c, "layer_types", None) or ()
    attends = [c.num_key_value_heads if kind in ("attention", "full_attention") else 0 for kind in types]
    match c.model_type:
        case "mamba2":
            none = {"attention.head_count": 0, "attention.head_count_kv": None, "feed_forward_length": 0}
            lengths = {"attention.key_length": None, "attention.value_length": None, "context_length": 2**20}
            return keys | none | lengths | {"attention.layer_norm_rms_epsilon": c.layer_norm_epsilon}
        case "bamba":
            return keys | {"attention.head_count_kv": attends, "rope.scaling.finetuned": True}
        case "granitemoehybrid":
            scales = {"attention.scale": c.attention_multiplier, "embedding_scale": c.embedding_multiplier}
            scales |= {"residual_scale": c.residual_multiplier, "logit_scale": c.logits_scaling}
            scales |= {"expert_count": c.num_local_experts or None, "rope.scaling.finetuned": all(attends)}
            return scales if all(attends) else keys | scales | {"attention.head_count_kv": attends}
        case "nemotron_h":
            wide = {"moe": c.moe_intermediate_size, "mlp": 0 if "moe" in types else c.intermediate_size}
            lengths = {"feed_forward_length": [wide.get(kind, 0) for kind in types], "context_length": 2**20}
            norms = {"attention.layer_norm_epsilon": c.layer_norm_epsilon, "expert_weights_norm": c.norm_topk_prob}
            scale = {"attention.head_count_kv": attends, "expert_weights_scale": c.routed_scaling_factor}
            return keys | lengths | norms | scale | ({} if "moe" in types else {"expert_count": None})
    return keys


def selective_metadata(c: Any) -> dict[str, Any]:
    """Of Mamba-1 layers."""
    jamba = c.model_type == "jamba"
    keys = {
        "ssm.conv_kernel": c.mamba_d_conv if jamba else c.conv_kernel,
        "ssm.inner_size": c.mamba_expand * c.hidden_size if jamba else c.intermediate_size,
        "ssm.state_size": c.mamba_d_state if jamba else c.state_size,
        "ssm.time_step_rank": c.mamba_dt_rank if jamba else c.time_step_rank,
    }
    if jamba:
        kinds = c.layers_block_type
        return keys | {"attention.head_count_kv": [c.num_key_value_heads * (kind == "attention") for kind in kinds]}
    keys |= {"attention.layer_norm_rms_epsilon": c.layer_norm_epsilon, "ssm.dt_b_c_rms": c.model_type != "mamba"}
    return keys | {"context_length": 2**20, "feed_forward_length": 0, "attention.head_count": 0}


def latent_metadata(c: Any) -> dict[str, Any]:
    """Of DeepSeek: heads as they are and, under the usual keys, as they are while latents are cached."""
    rope = c.rope_parameters
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        "rope.dimension_count": c.qk_rope_head_dim,
        "leading_dense_block_count": c.first_k_dense_replace,
        "expert_shared_count": c.n_shared_experts,
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": c.norm_topk_prob or None,
        "expert_gating_func": 2 if c.model_type == "deepseek_v3" else 1,
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"] if "mscale_all_dim" in rope else None,
    }
