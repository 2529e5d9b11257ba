"""llama.cpp's architectures of dense decoders."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.gguf.architecture import (
    BLOCK,
    PARTIAL,
    REST,
    SCALES,
    TURNED,
    WINDOW,
    Architecture,
    plain,
    windows,
)
from twotower.checkpoints.gguf.names import Undo, each, less_one, side_by_side, transposed
from twotower.checkpoints.gguf.reader import GgufFile


def two_ropes(file: GgufFile, raw: Mapping[str, Any], sliding_theta: float) -> dict[str, Any]:
    """RoPE's scaling is that of layers which see everything."""
    theta = file.number("rope.freq_base_swa", sliding_theta)
    both = {"full_attention": raw["rope_parameters"], "sliding_attention": {"rope_theta": theta}}
    return {"rope_parameters": both}


def _gemma2(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return _gemma_shared(file, raw, "gemma2", largest=46) | windows(file, 2)


def _gemma3(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    shared = _gemma_shared(file, raw, "gemma3_text", largest=62)
    return shared | windows(file, 6) | two_ropes(file, raw, 10000.0)


def _gemma_shared(file: GgufFile, raw: Mapping[str, Any], model_type: str, largest: int) -> dict[str, Any]:
    """llama.cpp knows by the number of layers which model scales its scores by the width of a head as it would be."""
    fair = raw["hidden_size"] // raw["num_attention_heads"]
    scalar = fair if raw["num_hidden_layers"] == largest else raw["head_dim"]
    caps = {name: None if file.setting(name) is None else file.number(name) for name in _CAPS}
    return {"model_type": model_type, "query_pre_attn_scalar": scalar, **caps}


def _olmo2(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    if not file.setting("attention.sliding_window"):
        return {"model_type": "olmo2"}
    theta = raw["rope_parameters"]["rope_theta"]
    return {"model_type": "olmo3"} | windows(file, 4) | two_ropes(file, raw, theta)


def _exaone4(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    if not file.setting("attention.sliding_window"):
        return {"model_type": "exaone4", "sliding_window": None}
    return {"model_type": "exaone4"} | windows(file, 4)


def _phi3(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "phi3", "sliding_window": file.count("attention.sliding_window", 0) or None}


def granite(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Granite 3, and 4 without Mamba layers."""
    if not file.flag("rope.scaling.finetuned", True):
        raise file.wrong("rope.scaling.finetuned", "true, which means that there is RoPE", "take another model")
    return granite_scales(file, raw) | {"model_type": "granite"}


def granite_scales(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, float]:
    """Granite's multipliers. Without a scale of its own, attention has the usual one."""
    return {
        "attention_multiplier": file.number("attention.scale", 0.0) or raw["head_dim"] ** -0.5,
        "embedding_multiplier": file.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": file.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": file.number("logit_scale", 0.0) or 1.0,
    }


def _cohere(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    normed = "blk.0.attn_q_norm.weight" in file.tensors
    return {"model_type": "cohere", "logit_scale": file.number("logit_scale", 1.0), "use_qk_norm": normed}


def _cohere2(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "cohere2", "logit_scale": file.number("logit_scale", 1.0)} | windows(file, 4)


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
        "n_positions": file.count("context_length", least=1),
        "layer_norm_epsilon": raw["layer_norm_eps"],
    }


def _gpt_bigcode(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return _gpt2(file, raw) | {"model_type": "gpt_bigcode", "multi_query": raw["num_key_value_heads"] == 1}


def _gpt_neox(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    parallel = file.flag("use_parallel_residual", True)
    return {"model_type": "gpt_neox", "attention_bias": True, "use_parallel_residual": parallel}


def _nemotron(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "nemotron", "norm_eps": raw["layer_norm_eps"], "hidden_act": "relu2"}


def _starcoder2(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The file says nothing of windows, and llama.cpp has none."""
    own = {"norm_epsilon": raw["layer_norm_eps"], "use_bias": raw["attention_bias"]}
    return own | {"model_type": "starcoder2", "sliding_window": None}


def _bloom(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"n_layer": raw["num_hidden_layers"], "n_head": raw["num_attention_heads"]}
    return {"model_type": "bloom", "layer_norm_epsilon": raw["layer_norm_eps"]} | sizes


def _mpt(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    width = raw["hidden_size"]
    if raw["intermediate_size"] % width:
        raise file.wrong("feed_forward_length", f"a multiple of the width {width}")
    attention = {
        "alibi": file.number("attention.max_alibi_bias", 0.0) > 0,
        "alibi_bias_max": file.number("attention.max_alibi_bias", 0.0) or None,
        "clip_qkv": file.number("attention.clamp_kqv", 0.0) or None,
    }
    return {
        "model_type": "mpt",
        "d_model": width,
        "n_heads": raw["num_attention_heads"],
        "n_layers": raw["num_hidden_layers"],
        "expansion_ratio": raw["intermediate_size"] // width,
        "layer_norm_epsilon": raw["layer_norm_eps"],
        "attn_config": attention,
    }


def _falcon(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """All have their KV heads as the newer models do, and blocks with one norm or two."""
    return {
        "model_type": "falcon",
        "alibi": False,
        "new_decoder_architecture": True,
        "num_kv_heads": raw["num_key_value_heads"],
        "num_ln_in_parallel_attn": 2 if "blk.0.attn_norm_2.weight" in file.tensors else 1,
        "layer_norm_epsilon": raw["layer_norm_eps"],
        "ffn_hidden_size": raw["intermediate_size"],
        "bias": "blk.0.attn_qkv.bias" in file.tensors,
    }


def _falcon_norm(tensor: Tensor, suffix: str, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    name = "ln_mlp" if raw["num_ln_in_parallel_attn"] == 2 else "input_layernorm"
    return {f"{name}.{suffix}": tensor}


def _by_kv_heads(tensor: Tensor, suffix: str, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Queries, keys and values one after the other, which the model stores by KV heads."""
    kv, p = raw["num_key_value_heads"], raw["head_dim"]
    sizes = [tensor.shape[0] - 2 * kv * p, kv * p, kv * p]
    groups = torch.cat([part.unflatten(0, (kv, -1)) for part in tensor.split(sizes)], dim=1)
    return {f"self_attention.query_key_value.{suffix}": groups.flatten(0, 1)}


def _ernie(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "ernie4_5", "use_bias": raw["attention_bias"]}


def _apertus_given(file: GgufFile) -> dict[str, Tensor]:
    """The curvatures of the activation, one pair for each layer, are metadata."""
    count = file.count("block_count", least=1)
    fixed = {"xielu.beta": 0.5, "xielu.eps": -1e-6}
    lists = {key: file.metadata.get(key) for key in ("xielu.alpha_p", "xielu.alpha_n", *fixed)}
    found: dict[str, Tensor] = {}
    for key, values in lists.items():
        values = [values] * count if isinstance(values, float) else values
        if not isinstance(values, list) or len(values) != count or not all(isinstance(x, float) for x in values):
            raise ValueError(f"{file.path} has no {key} for each of {count} layers; convert the model again")
        if key in fixed and any(abs(x - fixed[key]) > 1e-3 * abs(fixed[key]) for x in values):
            raise ValueError(f"{file.path} has {key} {values[0]}, must be {fixed[key]}; take another model")
        if key not in fixed:
            name = key.removeprefix("xielu.")
            found |= {f"model.layers.{i}.mlp.act_fn.{name}": torch.tensor([x]) for i, x in enumerate(values)}
    return found


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
_GPT2_BLOCK: dict[str, Undo] = {
    "attn_norm": "ln_1",
    "attn_qkv": transposed("attn.c_attn"),
    "attn_output": transposed("attn.c_proj"),
    "ffn_norm": "ln_2",
    "ffn_up": transposed("mlp.c_fc"),
    "ffn_down": transposed("mlp.c_proj"),
}
_GPT_BIGCODE: dict[str, Undo] = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
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
_FALCON: dict[str, Undo] = {
    "attn_norm": _falcon_norm,
    "attn_norm_2": "ln_attn",
    "attn_qkv": _by_kv_heads,
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_FALCON_REST: dict[str, Undo] = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_BLOOM: dict[str, Undo] = {
    "attn_norm": "input_layernorm",
    "attn_qkv": side_by_side("self_attention.query_key_value"),
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_BLOOM_REST: dict[str, Undo] = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_MPT: dict[str, Undo] = {
    "attn_norm": "norm_1",
    "attn_qkv": "attn.Wqkv",
    "attn_output": "attn.out_proj",
    "ffn_norm": "norm_2",
    "ffn_up": "ffn.up_proj",
    "ffn_down": "ffn.down_proj",
}
_MPT_REST: dict[str, Undo] = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.norm_f",
    "output": "lm_head",
}
_PHI: dict[str, Undo] = {
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
HUNYUAN: dict[str, Undo] = {
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
}
_STABLELM: dict[str, Undo] = {
    "attn_q_norm": each("self_attn.q_layernorm.norms.{}"),
    "attn_k_norm": each("self_attn.k_layernorm.norms.{}"),
}
_GATE_UP: dict[str, Undo] = {"ffn_up": "mlp.gate_up_proj"}
_PHI3: dict[str, Undo] = {"attn_qkv": "self_attn.qkv_proj"} | _GATE_UP
_GLM4: dict[str, Undo] = {
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
} | _GATE_UP
_NEMOTRON: dict[str, Undo] = {
    "attn_norm": less_one("input_layernorm"),
    "ffn_norm": less_one("post_attention_layernorm"),
}
_STARCODER2: dict[str, Undo] = {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_APERTUS: dict[str, Undo] = {"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"}
_GEMMA1: dict[str, Undo] = _GEMMA | {"ffn_norm": less_one("post_attention_layernorm")}
_LESS_ONE_REST: dict[str, Undo] = REST | {"output_norm": less_one("model.norm")}
_ALIBI = ("attention.max_alibi_bias", "attention.clamp_kqv")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")

DENSE: Mapping[str, Architecture] = {
    "qwen2": Architecture(settings=plain("qwen2")),
    "qwen3": Architecture(settings=plain("qwen3")),
    "smollm3": Architecture(settings=plain("smollm3"), block=BLOCK | TURNED),
    "granite": Architecture(settings=granite, block=BLOCK | TURNED, reads=SCALES),
    "phi3": Architecture(settings=_phi3, block=BLOCK | _PHI3, reads=WINDOW + PARTIAL),
    "gemma": Architecture(settings=plain("gemma"), block=BLOCK | _GEMMA1, rest=_LESS_ONE_REST),
    "gemma2": Architecture(settings=_gemma2, block=BLOCK | _GEMMA, rest=_LESS_ONE_REST, reads=WINDOW + _CAPS),
    "gemma3": Architecture(settings=_gemma3, block=BLOCK | _GEMMA, rest=_LESS_ONE_REST, reads=WINDOW + _CAPS),
    "olmo": Architecture(settings=plain("olmo"), block=BLOCK | TURNED),
    "olmo2": Architecture(settings=_olmo2, block=BLOCK | _BEHIND, reads=WINDOW),
    "exaone": Architecture(settings=plain("llama")),
    "exaone4": Architecture(settings=_exaone4, block=BLOCK | _BEHIND, reads=WINDOW),
    "glm4": Architecture(settings=plain("glm4"), block=BLOCK | _GLM4, reads=PARTIAL),
    "chatglm": Architecture(settings=plain("glm"), block=BLOCK | _GATE_UP, reads=PARTIAL),
    "seed_oss": Architecture(
        settings=plain("seed_oss"), block=BLOCK | {"post_attention_norm": "post_attention_layernorm"}
    ),
    "arcee": Architecture(settings=plain("arcee"), block=BLOCK | TURNED),
    "ernie4_5": Architecture(settings=_ernie),
    "apertus": Architecture(settings=plain("apertus"), block=BLOCK | _APERTUS, given=_apertus_given),
    "stablelm": Architecture(settings=_stablelm, block=BLOCK | _STABLELM, reads=PARTIAL),
    "command-r": Architecture(settings=_cohere, reads=("logit_scale",)),
    "cohere2": Architecture(settings=_cohere2, reads=("logit_scale", *WINDOW)),
    "nemotron": Architecture(settings=_nemotron, block=BLOCK | _NEMOTRON, rest=_LESS_ONE_REST, reads=PARTIAL),
    "starcoder": Architecture(settings=_gpt_bigcode, block=_GPT_BIGCODE, rest=_GPT2_REST, layers="transformer.h"),
    "starcoder2": Architecture(settings=_starcoder2, block=BLOCK | _STARCODER2),
    "bloom": Architecture(settings=_bloom, block=_BLOOM, rest=_BLOOM_REST, layers="transformer.h", rotates=False),
    "mpt": Architecture(
        settings=_mpt, block=_MPT, rest=_MPT_REST, layers="transformer.blocks", reads=_ALIBI, rotates=False
    ),
    "phi2": Architecture(
        settings=plain("phi"), block=BLOCK | _PHI, rest=REST | {"output_norm": "model.final_layernorm"}, reads=PARTIAL
    ),
    "hunyuan-dense": Architecture(settings=plain("hunyuan_v1_dense"), block=BLOCK | HUNYUAN),
    "falcon": Architecture(settings=_falcon, block=_FALCON, rest=_FALCON_REST, layers="transformer.h"),
    "gpt2": Architecture(settings=_gpt2, block=_GPT2_BLOCK, rest=_GPT2_REST, layers="transformer.h"),
    "gptneox": Architecture(
        settings=_gpt_neox, block=_NEOX_BLOCK, rest=_NEOX_REST, layers="gpt_neox.layers", reads=PARTIAL
    ),
}
