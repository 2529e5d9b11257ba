"""Writing tiny GGUF files as llama.cpp's converter (conversion/*.py) does, with the gguf package's names."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

Write = Callable[..., Path]
Writer = gguf.GGUFWriter

# Where the converter's name of an architecture is not transformers'.
ARCHITECTURES = {
    "gpt_neox": "gptneox",
    "gemma3_text": "gemma3",
    "olmo3": "olmo2",
    "cohere": "command-r",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
}


def base_metadata(writer: Writer, c: Any) -> None:
    """What the converter writes of every architecture."""
    rope = c.rope_parameters if getattr(c, "rope_parameters", None) else {}
    rope = rope.get("full_attention", rope)
    keys = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": getattr(c, "intermediate_size", 4 * c.hidden_size),
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": getattr(c, "num_key_value_heads", c.num_attention_heads),
        "attention.key_length": getattr(c, "head_dim", None),
        "attention.value_length": getattr(c, "head_dim", None),
        "attention.layer_norm_rms_epsilon": getattr(c, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": next(
            (getattr(c, n) for n in ("layer_norm_eps", "layer_norm_epsilon", "norm_eps") if hasattr(c, n)), None
        ),
        "rope.freq_base": rope.get("rope_theta"),
        "expert_count": next((getattr(c, n) for n in ("num_local_experts", "num_experts") if hasattr(c, n)), None),
        "expert_used_count": getattr(c, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(c, "moe_intermediate_size", None),
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        keys["rope.scaling.type"], keys["rope.scaling.factor"] = rope["rope_type"], rope["factor"]
        keys["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    if "partial_rotary_factor" in rope:
        keys["rope.dimension_count"] = int(rope["partial_rotary_factor"] * c.hidden_size // c.num_attention_heads)
    put(writer, keys)


def put(writer: Writer, keys: dict[str, Any]) -> None:
    """Writes the architecture's settings that are not None."""
    for key, value in keys.items():
        name = f"{writer.arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
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
        case "gemma2" | "gemma3_text":
            caps = ("attn_logit_softcapping", "final_logit_softcapping")
            return {name: getattr(c, name) for name in caps} | {"attention.sliding_window": window}
        case "olmo3" | "exaone4":
            return {"attention.sliding_window": window, "attention.sliding_window_pattern": slides}
        case "phi3":
            return {"attention.sliding_window": window or 0}
        case "cohere" | "cohere2":
            return {"logit_scale": c.logit_scale, "attention.sliding_window": window, "rope.scaling.type": "none"}
        case "gpt_oss":
            return {"attention.sliding_window": window}
        case "granite" | "granitemoe":
            scales = {"attention.scale": c.attention_multiplier, "embedding_scale": c.embedding_multiplier}
            return scales | {"residual_scale": c.residual_multiplier, "logit_scale": c.logits_scaling}
        case "stablelm" | "gpt_neox":
            return {"use_parallel_residual": c.use_parallel_residual}
    return {}


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """LlamaModel.permute: neighbouring rows are those that RoPE turns together."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def changed(c: Any, name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor as the converter's modify_tensors gives it."""
    kind = c.model_type
    heads = {"q_proj": c.num_attention_heads, "k_proj": getattr(c, "num_key_value_heads", 0)}.get(name.split(".")[-2])
    if kind in ("llama", "mixtral", "granite", "granitemoe", "smollm3") and heads:
        value = permuted(value, heads)
    if kind.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
        value = value + 1
    if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        value = value.T
    if kind == "gpt_neox" and "query_key_value" in name:
        value = np.concatenate(list(value.reshape(c.num_attention_heads, 3, -1, *value.shape[1:]).swapaxes(0, 1)))
        value = value.reshape(-1, *value.shape[2:])
    if ".experts." in name:
        yield from stacked_experts(kind, name, value)
        return
    if name.endswith("sinks"):
        name += ".weight"
    if kind == "granitemoe":
        name = name.replace("router.weight", "router.layer.weight")
    if ".norms." in name:  # StableLM's norms of heads, stacked once all are there
        return
    yield name, value


def stacked_experts(kind: str, name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """transformers holds a layer's experts as one tensor: gates and ups behind each other or, in gpt-oss, in turns and
    with inputs first."""
    stem, _, last = name.rpartition(".")
    stem = stem.replace("block_sparse_moe", "mlp")
    end = "bias" if last.endswith("_bias") else "weight"
    if kind == "gpt_oss" and end == "weight":
        value = value.swapaxes(-1, -2)
    if last.startswith("down_proj"):
        yield f"{stem}.down_proj.{end}", value
        return
    axis = 1 if end == "bias" else -2
    halves = (value[:, ::2], value[:, 1::2]) if kind == "gpt_oss" else np.split(value, 2, axis)
    for half, part in zip(halves, ("gate", "up"), strict=True):
        yield f"{stem}.{part}_proj.{end}", half


def stacked_norms(state: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    stems = dict.fromkeys(name.split(".norms.")[0] for name in state if ".norms." in name)
    for stem in stems:
        count = sum(name.startswith(stem + ".norms.") for name in state)
        yield stem + ".weight", np.stack([state[f"{stem}.norms.{i}.weight"] for i in range(count)])


def write_model(
    path: Path,
    model: Any,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Callable[[Writer], None] = lambda w: None,
    arch: str = "",
    parts: int = 0,
    **own: Any,
) -> Path:
    """Writes a transformers model: matrices as `kind`, vectors as F32, and what `extra` adds. With `parts` as the most
    tensors of a file, the model is split."""
    c = model.config
    architecture = ARCHITECTURES.get(c.model_type, c.model_type)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), c.num_hidden_layers
    )
    writer = Writer(path, arch or architecture, split_max_tensors=parts)
    base_metadata(writer, c)
    put(writer, own_metadata(c) | own)
    extra(writer)
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    pairs = [pair for name, value in state.items() for pair in changed(c, name, value)]
    for name, value in [*pairs, *stacked_norms(state)]:
        if name in ("lm_head.weight", "embed_out.weight") and c.tie_word_embeddings:
            continue
        stored = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else kind
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(theirs, gguf.quantize(np.ascontiguousarray(value), stored), raw_dtype=stored)
    return finish(writer, path)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write_model` to a file of the test's own."""
    return functools.partial(write_model, tmp_path / "model.gguf")


def finish(writer: Writer, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def write_metadata(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file with metadata alone, and perhaps tensors."""

    def make(extra: Callable[[Writer], None], name: str = "metadata.gguf", **options: Any) -> Path:
        writer = Writer(tmp_path / name, "llama", **options)
        extra(writer)
        return finish(writer, tmp_path / name)

    return make
