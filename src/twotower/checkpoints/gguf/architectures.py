"""llama.cpp's architectures in the words of Hugging Face's config.json and tensor names.

Each entry follows llama.cpp's converter (conversion/*.py) backwards; what the converter leaves out of the file is what
llama.cpp computes with (src/models/*.cpp).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from twotower.checkpoints.gguf.names import Undo, each, less_one, row, side_by_side, transposed, turned, whole
from twotower.checkpoints.gguf.reader import GgufFile
from twotower.checkpoints.gguf.rope import decimal

# Settings that change what is computed. An architecture that does not read one that a file has is refused.
SWITCHES = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.sliding_window",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
)
_HEADS, _KV_HEADS = "num_attention_heads", "num_key_value_heads"

_BLOCK: dict[str, Undo] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_REST: dict[str, Undo] = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_TURNED: dict[str, Undo] = {
    "attn_q": turned("self_attn.q_proj", _HEADS),
    "attn_k": turned("self_attn.k_proj", _KV_HEADS),
}
_BEHIND: dict[str, Undo] = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA: dict[str, Undo] = {
    "attn_norm": less_one("input_layernorm"),
    "attn_q_norm": less_one("self_attn.q_norm"),
    "attn_k_norm": less_one("self_attn.k_norm"),
    "post_attention_norm": less_one("post_attention_layernorm"),
    "ffn_norm": less_one("pre_feedforward_layernorm"),
    "post_ffw_norm": less_one("post_feedforward_layernorm"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a file is a Hugging Face model. `settings` gives further keys of config.json, of which `model_type` names the
    family, and may replace those that all architectures have; `reads` are the `SWITCHES` that it heeds."""

    settings: Callable[[GgufFile, Mapping[str, Any]], Mapping[str, Any]]
    block: Mapping[str, Undo] = dataclasses.field(default_factory=lambda: _BLOCK)
    rest: Mapping[str, Undo] = dataclasses.field(default_factory=lambda: _REST)
    layers: str = "model.layers"
    reads: tuple[str, ...] = ()


def _plain(model_type: str) -> Callable[[GgufFile, Mapping[str, Any]], Mapping[str, Any]]:
    return lambda file, raw: {"model_type": model_type}


def _llama(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Llama, Mistral and Mixtral. One with biases on queries, keys and values alone is what Qwen 2 computes."""
    if file.setting("expert_count"):
        return {"model_type": "mixtral", "sliding_window": None} | _experts(file)
    if file.setting("attention.sliding_window"):
        return {"model_type": "mistral", "sliding_window": file.setting("attention.sliding_window")}
    half_biased = raw["attention_bias"] and "blk.0.attn_output.bias" not in file.tensors
    return {"model_type": "qwen2" if half_biased else "llama"}


def _windows(file: GgufFile, period: int, *, first_full: bool = False) -> dict[str, Any]:
    """The window, and which layers have it: as the file says, or all but every `period`-th."""
    count = file.setting("block_count")
    pattern = file.setting("attention.sliding_window_pattern", period)
    if isinstance(pattern, int):
        pattern = [(i + 1) % pattern != 0 for i in range(count)]
    types = ["sliding_attention" if slides else "full_attention" for slides in pattern[:count]]
    return {"sliding_window": file.setting("attention.sliding_window"), "layer_types": types}


def _two_ropes(file: GgufFile, raw: Mapping[str, Any], sliding_theta: float) -> dict[str, Any]:
    """RoPE's scaling is that of layers which see everything."""
    theta = decimal(file.setting("rope.freq_base_swa", sliding_theta))
    both = {"full_attention": raw["rope_parameters"], "sliding_attention": {"rope_theta": theta}}
    return {"rope_parameters": both}


def _gemma2(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return _gemma_shared(file, raw, "gemma2", largest=46) | _windows(file, 2)


def _gemma3(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    shared = _gemma_shared(file, raw, "gemma3_text", largest=62)
    return shared | _windows(file, 6) | _two_ropes(file, raw, 10000.0)


def _gemma_shared(file: GgufFile, raw: Mapping[str, Any], model_type: str, largest: int) -> dict[str, Any]:
    """llama.cpp knows by the number of layers which model scales its scores by the width of a head as it would be."""
    fair = raw["hidden_size"] // raw["num_attention_heads"]
    scalar = fair if raw["num_hidden_layers"] == largest else raw["head_dim"]
    caps = {name: file.setting(name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    caps = {name: None if value is None else decimal(value) for name, value in caps.items()}
    theirs = {"attn_logit_softcapping": caps["attn_logit_softcapping"]}
    theirs["final_logit_softcapping"] = caps["final_logit_softcapping"]
    return {"model_type": model_type, "query_pre_attn_scalar": scalar, **theirs}


def _olmo2(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    if not file.setting("attention.sliding_window"):
        return {"model_type": "olmo2"}
    theta = raw["rope_parameters"]["rope_theta"]
    return {"model_type": "olmo3"} | _windows(file, 4) | _two_ropes(file, raw, theta)


def _exaone4(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    if not file.setting("attention.sliding_window"):
        return {"model_type": "exaone4", "sliding_window": None}
    return {"model_type": "exaone4"} | _windows(file, 4)


def _phi3(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "phi3", "sliding_window": file.setting("attention.sliding_window") or None}


def _granite(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Without a scale of its own, attention has the usual one."""
    return {
        "model_type": "granite",
        "attention_multiplier": decimal(file.setting("attention.scale") or raw["head_dim"] ** -0.5),
        "embedding_multiplier": decimal(file.setting("embedding_scale") or 1.0),
        "residual_multiplier": decimal(file.setting("residual_scale") or 1.0),
        "logits_scaling": decimal(file.setting("logit_scale") or 1.0),
    }


def _cohere(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    normed = "blk.0.attn_q_norm.weight" in file.tensors
    return {"model_type": "cohere", "logit_scale": decimal(file.setting("logit_scale", 1.0)), "use_qk_norm": normed}


def _cohere2(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "cohere2", "logit_scale": decimal(file.setting("logit_scale", 1.0))} | _windows(file, 4)


def _stablelm(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "stablelm",
        "use_qkv_bias": raw["attention_bias"],
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in file.tensors,
    }


def _gpt2(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": raw["hidden_size"],
        "n_layer": raw["num_hidden_layers"],
        "n_head": raw["num_attention_heads"],
        "n_inner": raw["intermediate_size"],
        "n_positions": file.setting("context_length"),
        "layer_norm_epsilon": raw["layer_norm_eps"],
    }


def _gpt_neox(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    parallel = file.setting("use_parallel_residual", True)
    return {"model_type": "gpt_neox", "attention_bias": True, "use_parallel_residual": parallel}


def _nemotron(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "nemotron", "norm_eps": raw["layer_norm_eps"], "hidden_act": "relu2"}


def _experts(file: GgufFile) -> dict[str, Any]:
    """The experts of a mixture, under both of the names that families have for their number."""
    stack = next((t for name, t in file.tensors.items() if name.endswith("ffn_down_exps.weight")), None)
    if stack is None:
        raise ValueError(f"{file.path} lacks blk.0.ffn_down_exps.weight, its experts; convert the model again")
    count = stack.shape[0]
    return {
        "num_local_experts": count,
        "num_experts": count,
        "num_experts_per_tok": file.setting("expert_used_count"),
        "intermediate_size": stack.shape[2],
        "moe_intermediate_size": stack.shape[2],
    }


def _qwen_moe(file: GgufFile, raw: Mapping[str, Any], model_type: str, *, normalise: bool) -> dict[str, Any]:
    """llama.cpp knows by the architecture whether the weights of the chosen experts are made to sum to 1."""
    layers = range(raw["num_hidden_layers"])
    experts = _experts(file) | {"intermediate_size": raw["intermediate_size"]}
    return experts | {
        "model_type": model_type,
        "norm_topk_prob": file.setting("expert_weights_norm", normalise),
        "mlp_only_layers": [i for i in layers if f"blk.{i}.ffn_gate_inp.weight" not in file.tensors],
    }


def _qwen2_moe(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    shared = file.tensors.get("blk.0.ffn_down_shexp.weight")
    return _qwen_moe(file, raw, "qwen2_moe", normalise=False) | {
        "shared_expert_intermediate_size": 0 if shared is None else shared.shape[1],
        "qkv_bias": raw["attention_bias"],
    }


def _qwen3_moe(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return _qwen_moe(file, raw, "qwen3_moe", normalise=True)


def _olmoe(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "olmoe", "norm_topk_prob": False} | _experts(file)


def _granitemoe(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    shared = {"shared_intermediate_size": file.setting("expert_shared_feed_forward_length", 0)}
    return _granite(file, raw) | {"model_type": "granitemoe"} | shared | _experts(file)


def _gpt_oss(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The model does not round where YaRN's ramp begins and ends, which the file does not say."""
    rope = raw["rope_parameters"] | {"truncate": False}
    return {"model_type": "gpt_oss", "rope_parameters": rope} | _windows(file, 2) | _experts(file)


_GPT2_BLOCK: dict[str, Undo] = {
    "attn_norm": "ln_1",
    "attn_qkv": transposed("attn.c_attn"),
    "attn_output": transposed("attn.c_proj"),
    "ffn_norm": "ln_2",
    "ffn_up": transposed("mlp.c_fc"),
    "ffn_down": transposed("mlp.c_proj"),
}
_GPT2_REST: dict[str, Undo] = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_NEOX_BLOCK: dict[str, Undo] = {
    "attn_norm": "input_layernorm",
    "attn_qkv": side_by_side("attention.query_key_value"),
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_NEOX_REST: dict[str, Undo] = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
_STABLELM: dict[str, Undo] = {
    "attn_q_norm": each("self_attn.q_layernorm.norms.{}"),
    "attn_k_norm": each("self_attn.k_layernorm.norms.{}"),
}
_PHI3: dict[str, Undo] = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_GLM4: dict[str, Undo] = {
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
}
_NEMOTRON: dict[str, Undo] = {
    "attn_norm": less_one("input_layernorm"),
    "ffn_norm": less_one("post_attention_layernorm"),
}
_EXPERTS: dict[str, Undo] = {
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
_LESS_ONE_REST: dict[str, Undo] = _REST | {"output_norm": less_one("model.norm")}
_WINDOW = ("attention.sliding_window",)
_MIXES = ("expert_count",)
_SCALES = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(settings=_llama, block=_BLOCK | _TURNED | _EXPERTS | _MIXTRAL, reads=(*_WINDOW, *_MIXES)),
    "qwen2moe": Architecture(settings=_qwen2_moe, block=_BLOCK | _EXPERTS, reads=_MIXES),
    "qwen3moe": Architecture(settings=_qwen3_moe, block=_BLOCK | _EXPERTS, reads=_MIXES),
    "olmoe": Architecture(settings=_olmoe, block=_BLOCK | _EXPERTS, reads=_MIXES),
    "granitemoe": Architecture(settings=_granitemoe, block=_BLOCK | _TURNED | _GRANITEMOE, reads=(*_SCALES, *_MIXES)),
    "gpt-oss": Architecture(settings=_gpt_oss, block=_BLOCK | _EXPERTS | _GPT_OSS, reads=(*_WINDOW, *_MIXES)),
    "qwen2": Architecture(settings=_plain("qwen2")),
    "qwen3": Architecture(settings=_plain("qwen3")),
    "smollm3": Architecture(settings=_plain("smollm3"), block=_BLOCK | _TURNED),
    "granite": Architecture(settings=_granite, block=_BLOCK | _TURNED, reads=_SCALES),
    "phi3": Architecture(settings=_phi3, block=_BLOCK | _PHI3, reads=_WINDOW),
    "gemma2": Architecture(settings=_gemma2, block=_BLOCK | _GEMMA, rest=_LESS_ONE_REST, reads=_WINDOW + _CAPS),
    "gemma3": Architecture(settings=_gemma3, block=_BLOCK | _GEMMA, rest=_LESS_ONE_REST, reads=_WINDOW + _CAPS),
    "olmo2": Architecture(settings=_olmo2, block=_BLOCK | _BEHIND, reads=_WINDOW),
    "exaone4": Architecture(settings=_exaone4, block=_BLOCK | _BEHIND, reads=_WINDOW),
    "glm4": Architecture(settings=_plain("glm4"), block=_BLOCK | _GLM4),
    "seed_oss": Architecture(
        settings=_plain("seed_oss"), block=_BLOCK | {"post_attention_norm": "post_attention_layernorm"}
    ),
    "stablelm": Architecture(settings=_stablelm, block=_BLOCK | _STABLELM),
    "command-r": Architecture(settings=_cohere, reads=("logit_scale",)),
    "cohere2": Architecture(settings=_cohere2, reads=("logit_scale", *_WINDOW)),
    "nemotron": Architecture(settings=_nemotron, block=_BLOCK | _NEMOTRON, rest=_LESS_ONE_REST),
    "gpt2": Architecture(settings=_gpt2, block=_GPT2_BLOCK, rest=_GPT2_REST, layers="transformer.h"),
    "gptneox": Architecture(settings=_gpt_neox, block=_NEOX_BLOCK, rest=_NEOX_REST, layers="gpt_neox.layers"),
}
