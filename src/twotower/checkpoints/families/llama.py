"""Single-tower Llama-family directories: model types llama, mistral and qwen2.

Each of their layers becomes two of ours, attention `*` and gated MLP `-`.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.backbone import Backbone, llama_config
from twotower.checkpoints.hf.float_tensors import open_floats
from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.checkpoints.hf.tokenizer_file import read_tokenizer_text
from twotower.config import TwoTowerConfig

MODEL_TYPES = ("llama", "mistral", "qwen2")

# Name in a layer of the source -> which of our two layers it goes to, and its name there.
_LAYER_NAMES = {
    "input_layernorm": (0, "norm"),
    "self_attn.q_proj": (0, "mixer.q_proj"),
    "self_attn.k_proj": (0, "mixer.k_proj"),
    "self_attn.v_proj": (0, "mixer.v_proj"),
    "self_attn.o_proj": (0, "mixer.o_proj"),
    "post_attention_layernorm": (1, "norm"),
    "mlp.gate_proj": (1, "mixer.gate_proj"),
    "mlp.up_proj": (1, "mixer.up_proj"),
    "mlp.down_proj": (1, "mixer.down_proj"),
}
_TOP_NAMES = {
    "model.embed_tokens.weight": "embeddings.weight",
    "model.norm.weight": "norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}
# Settings that change what is computed -> the values under which our towers compute the same. A missing key is fine.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1.0),
    "rope_interleaved": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}


def open_llama(directory: Path, raw: Mapping[str, Any], documents: Mapping[str, bytes]) -> Backbone:
    """Opens a Llama-family directory whose config.json is `raw`.

    qwen2 has biases on queries, keys and values only, ours on the output projection too, which gets zeros. Raises
    ValueError for a setting under which the model computes something that our towers don't.
    """
    check_switches(raw)
    config = _config(raw)
    num_layers = config.num_layers // 2
    ours = dict(_TOP_NAMES)
    for i in range(num_layers):
        for theirs, (kind, name) in _LAYER_NAMES.items():
            for part in ("weight", "bias"):
                ours[f"model.layers.{i}.{theirs}.{part}"] = f"layers.{2 * i + kind}.{name}.{part}"
    # Models saved without their head have names without this prefix.
    ours |= {name.removeprefix("model."): renamed for name, renamed in ours.items()}
    files = open_floats(directory, raw)
    stored = [n for n in files.specs if n != "lm_head.weight" or not config.tie_word_embeddings]
    specs = {ours.get(name, name): files.specs[name] for name in stored}
    zero_biases = {}
    if raw["model_type"] == "qwen2":
        dtype = specs["embeddings.weight"].dtype if "embeddings.weight" in specs else torch.float32
        zero = TensorSpec(dtype, (config.hidden_size,))
        zero_biases = {f"layers.{2 * i}.mixer.o_proj.bias": zero for i in range(num_layers)}

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in files.stream(stored):
            yield ours[name], tensor
        for name, spec in zero_biases.items():
            yield name, torch.zeros(spec.shape, dtype=spec.dtype)

    return Backbone(
        config=config,
        specs=specs | zero_biases,
        stream=stream,
        tokenizer=read_tokenizer_text(directory),
        documents=documents,
    )


def check_switches(raw: Mapping[str, Any]) -> None:
    """Raises one ValueError that names every setting of a Llama-family config.json under which the model computes
    something that our towers don't."""
    found = [
        f"{key} is {raw[key]!r}, must be {' or '.join(map(repr, allowed))}"
        for key, allowed in _REQUIRED.items()
        if key in raw and raw[key] not in allowed
    ]
    rope = _rope(raw)
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        found.append(f"RoPE is scaled by {rope}, must be of rope_type 'default'")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        found.append(f"RoPE turns only a part of each head ({rope}), must turn all of it")
    if set(raw.get("layer_types") or ()) - {"full_attention"}:
        found.append(f"layer_types has {sorted(set(raw['layer_types']))}, must be 'full_attention' throughout")
    # transformers' defaults: mistral uses a sliding window if the key is missing, qwen2 none if its switch is missing.
    window = raw.get("sliding_window", 4096 if raw["model_type"] == "mistral" else None)
    slides = raw.get("use_sliding_window", raw["model_type"] != "qwen2")
    length = raw.get("max_position_embeddings", math.inf)
    if slides and window is not None and window < length:
        found.append(f"sliding_window is {window}, must be null or at least max_position_embeddings {length}")
    if found:
        raise ValueError(f"the model computes something that our towers don't: {'; '.join(found)}; take another model")


def _config(raw: Mapping[str, Any]) -> TwoTowerConfig:
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if key not in raw
    ]
    if missing:
        raise ValueError(f"config.json lacks {missing}; a Llama-family config needs them")
    num_heads = raw["num_attention_heads"]
    kept = ("torch_dtype", "dtype", "pad_token_id", "max_position_embeddings")
    carried = {key: raw[key] for key in kept if raw.get(key) is not None}
    return llama_config(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_llama_layers=raw["num_hidden_layers"],
        num_attention_heads=num_heads,
        num_key_value_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // num_heads,
        # transformers' own defaults, for keys that it leaves out of some files
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(_rope(raw).get("rope_theta", raw.get("rope_theta", 10000.0))),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=raw["model_type"] == "qwen2" or raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        **carried,
    )


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """RoPE's settings: `rope_parameters`. Before transformers 5 it was called `rope_scaling`, without the base."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}
