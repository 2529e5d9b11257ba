"""llama.cpp's architectures in the words of Hugging Face's config.json and tensor names.

Each entry follows llama.cpp's converter (conversion/*.py) backwards; what the converter leaves out of the file is what
llama.cpp computes with (src/models/*.cpp).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from twotower.checkpoints.gguf.names import Undo, each, less_one, side_by_side, transposed, turned
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
        experts = {"num_local_experts": file.setting("expert_count"), "sliding_window": None}
        return {"model_type": "mixtral", "num_experts_per_tok": file.setting("expert_used_count"), **experts}
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
_LESS_ONE_REST: dict[str, Undo] = _REST | {"output_norm": less_one("model.norm")}
_WINDOW = ("attention.sliding_window",)
_SCALES = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(settings=_llama, block=_BLOCK | _TURNED, reads=_WINDOW),
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
