"""What the declarations of decoders have in common: blocks of attention and an MLP, in the words of transformers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.families.family import Part, Settings, need, whole
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType, Rope

# The tensors of a block, attention being its first layer and the MLP its second.
ATTENTION: dict[str, Part] = {
    "input_layernorm": "0.norm",
    "self_attn.q_proj": "0.mixer.q_proj",
    "self_attn.k_proj": "0.mixer.k_proj",
    "self_attn.v_proj": "0.mixer.v_proj",
    "self_attn.o_proj": "0.mixer.o_proj",
    "self_attn.q_norm": "0.mixer.q_norm",
    "self_attn.k_norm": "0.mixer.k_norm",
}
MLP: dict[str, Part] = {
    "post_attention_layernorm": "1.norm",
    "mlp.gate_proj": "1.mixer.gate_proj",
    "mlp.up_proj": "1.mixer.up_proj",
    "mlp.down_proj": "1.mixer.down_proj",
}
REST: dict[str, Part] = {"embed_tokens": "embeddings", "norm": "norm_f", "lm_head": "lm_head"}

# transformers' names of activations -> ours
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}


def decoder_fields(raw: Settings) -> dict[str, Any]:
    """The fields of a decoder with RMSNorms before attention and a gated MLP; attention sees everything, with RoPE."""
    num_heads = need(raw, "num_attention_heads")
    return {
        "hidden_size": need(raw, "hidden_size"),
        "pattern": "*-" * need(raw, "num_hidden_layers"),
        "layer_norm_epsilon": raw.get("rms_norm_eps") or 1e-6,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": raw.get("num_key_value_heads") or num_heads,
        "head_dim": head_width(raw),
        "attention_bias": bool(raw.get("attention_bias", False)),
        "intermediate_size": need(raw, "intermediate_size"),
        "mlp_hidden_act": activation(raw, "silu"),
        "gated_mlp": True,
        **one_type(AttentionType(rope_parameters=read_rope(raw))),
    }


def head_width(raw: Settings) -> int:
    """The width of an attention head."""
    return int(raw.get("head_dim") or need(raw, "hidden_size") // need(raw, "num_attention_heads"))


def activation(raw: Settings, default: str, keys: Sequence[str] = ("hidden_activation", "hidden_act")) -> str:
    """The activation that the first of the keys in a config.json names, in our words; raises ValueError for one that we
    don't have."""
    key = next((key for key in keys if raw.get(key) is not None), keys[-1])
    name = default if raw.get(key) is None else raw[key]
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json has {key} {name!r}, must be one of {', '.join(ACTIVATIONS)}; take another model")
    return ACTIVATIONS[name]


def refuse(raw: Settings, **allowed: Sequence[Any]) -> None:
    """Raises one ValueError that names every setting whose value is not among the allowed ones; a missing key is."""
    found = [
        f"{key} is {raw[key]!r}, must be {' or '.join(map(repr, values))}"
        for key, values in allowed.items()
        if key in raw and raw[key] not in values
    ]
    if found:
        raise ValueError(f"the model computes something that our towers don't: {'; '.join(found)}; take another model")


def one_type(kind: AttentionType) -> dict[str, Any]:
    """The fields of a tower whose attention layers all have these settings."""
    rope = kind.rope_parameters
    if kind == AttentionType(rope_parameters=rope) and rope == Rope(rope_theta=rope.rope_theta if rope else 0.0):
        return {"use_rope": True, "rope_theta": rope.rope_theta}
    return {"use_rope": False, "attention_types": (kind,)}


def by_layer(kinds: Sequence[AttentionType]) -> dict[str, Any]:
    """The fields of a tower whose attention layers have these settings, one after the other."""
    used = list(dict.fromkeys(kinds))
    if len(used) == 1:
        return one_type(used[0])
    pattern = "".join(str(used.index(kind)) for kind in kinds)
    return {"use_rope": False, "attention_types": tuple(used), "attention_pattern": pattern}


def by_layer_types(layer_types: Sequence[str], kinds: Mapping[str, AttentionType]) -> dict[str, Any]:
    """The fields of a tower whose attention layers have the settings that `kinds` has for their `layer_types`.

    Raises ValueError for a layer type that is not there."""
    strange = sorted(set(layer_types) - set(kinds))
    if strange:
        raise ValueError(f"layer_types has {strange}, must be of {sorted(kinds)}; take another model")
    return by_layer([kinds[name] for name in layer_types])


def windowed(raw: Settings, layer_types: Sequence[str], *, full: Rope | None, sliding: Rope | None) -> dict[str, Any]:
    """The fields of a tower of full and sliding attention, with the RoPE of each."""
    kinds = {
        "full_attention": AttentionType(rope_parameters=full),
        "sliding_attention": AttentionType(window=read_window(raw), rope_parameters=sliding),
    }
    return by_layer_types(layer_types, kinds)


def read_window(raw: Settings, default: int | None = None) -> int | None:
    """The window that a config.json has, None where it is null, `default` where it is missing."""
    if "sliding_window" not in raw:
        return default
    return None if raw["sliding_window"] is None else whole(raw, "sliding_window")


def every(n: int, raw: Settings) -> list[str]:
    """Layer types of which each n-th is full attention and the others are sliding."""
    count = need(raw, "num_hidden_layers")
    return ["full_attention" if (i + 1) % n == 0 else "sliding_attention" for i in range(count)]


def read_rope(
    raw: Settings, layer_type: str | None = None, *, theta: float = 10000.0, part: float | None = None
) -> Rope:
    """RoPE of a config.json, for one of its layer types where it has several; `theta` and `part` are the family's
    defaults. As transformers reads it: the older `rope_scaling` wins over `rope_parameters`, which wins over keys
    beside it; a family without a default `part` turns whole heads, whatever a file says. Raises ValueError for a kind
    of scaling that we don't have, or one that lacks a number.
    """
    if part is not None:
        part = part if raw.get("partial_rotary_factor") is None else raw["partial_rotary_factor"]
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if layer_type is not None and isinstance(given.get(layer_type), Mapping):
        given = given[layer_type]
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = {"mrope": "default", "su": "longrope"}.get(kind, kind)
    positions = raw.get("max_position_embeddings") or 0
    original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or positions
    # For "dynamic" transformers takes the positions that the model has now.
    length = 0 if kind in ("default", "linear") else positions if kind == "dynamic" else original
    if kind not in ("default", "linear") and not length:
        raise ValueError(f"RoPE is scaled by {dict(given)}, which needs original_max_position_embeddings; add it")
    factor = given.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = max(positions, length) / length
    if kind == "default":
        factor = 1.0
    if factor is None:
        raise ValueError(f"RoPE is scaled by {dict(given)}, which needs a factor; add it")
    names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "short_factor", "long_factor")
    found: dict[str, Any] = {}
    for name in names if kind != "default" else ():
        value = given.get(name)
        if value is not None:
            found[name] = tuple(value) if isinstance(value, list) else value
    return Rope(
        rope_theta=float(given.get("rope_theta") or raw.get("rope_theta") or theta),
        rope_type=kind,
        partial_rotary_factor=1.0 if part is None else given.get("partial_rotary_factor") or part,
        factor=float(factor),
        original_max_position_embeddings=length,
        attention_factor=_attention_factor(given, kind, float(factor), length),
        **found,
    )


def _attention_factor(given: Mapping[str, Any], kind: str, factor: float, length: int) -> float:
    """What cosines and sines are multiplied by where the config doesn't say (arXiv 2309.00071, arXiv 2402.13753)."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    every_dimension = given.get("mscale_all_dim")
    if given.get("mscale") and every_dimension:
        return scale(given["mscale"]) / scale(every_dimension)
    return scale(1.0)


def rows(names: Sequence[str], sizes: Sequence[int]) -> Part:
    """A projection whose rows are several of ours, one after the other."""

    def part(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        pieces = tensor.split(list(sizes))
        return {f"{name}.{suffix}": piece for name, piece in zip(names, pieces, strict=True)}

    return part


def projections(prefix: str, output: str) -> dict[str, Part]:
    """Attention's projections under a prefix, where that of the output has another name."""
    inputs: dict[str, Part] = {f"{prefix}.{name}_proj": f"0.mixer.{name}_proj" for name in "qkv"}
    return inputs | {f"{prefix}.{output}": "0.mixer.o_proj"}


def by_kv_heads(config: TwoTowerConfig) -> Part:
    """Queries, keys and values in one tensor, those of each KV head side by side."""
    kv, p = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // kv

    def part(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        heads = tensor.unflatten(0, (kv, group + 2, p))
        pieces = (heads[:, :group], heads[:, group], heads[:, group + 1])
        flat = (piece.reshape(-1, *tensor.shape[1:]) for piece in pieces)
        return {f"0.mixer.{name}_proj.{suffix}": piece for name, piece in zip("qkv", flat, strict=True)}

    return part


def copies(*names: str) -> Part:
    """A tensor that is several of ours."""
    return lambda tensor, suffix: {f"{name}.{suffix}": tensor for name in names}


def half_rotation(name: str, num_heads: int, turned: int) -> Part:
    """A projection to heads, of which the first `turned` numbers are rotated by pairs (0, 1), (2, 3), …; see
    `half_rotated`."""
    return lambda tensor, suffix: {f"{name}.{suffix}": half_rotated(tensor, num_heads, turned)}


def half_rotated(tensor: Tensor, num_heads: int, turned: int) -> Tensor:
    """Reorders the rows (h·p, …) of a projection for our RoPE, which rotates the pairs (i, i + turned/2) of a head.

    Attention only uses products of queries and keys, so reordering both alike changes no result.
    """
    heads = tensor.unflatten(0, (num_heads, -1))  # (h, p, …)
    pairs = heads[:, :turned].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((pairs, heads[:, turned:]), dim=1).flatten(0, 1)
