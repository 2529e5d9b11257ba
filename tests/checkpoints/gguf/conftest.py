"""Writing tiny GGUF files as llama.cpp's converter (conversion/*.py) does, with the gguf package's names."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

Write = Callable[..., Path]
Writer = gguf.GGUFWriter

_SPEC = importlib.util.spec_from_file_location("written_metadata", Path(__file__).with_name("written_metadata.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
metadata = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(metadata)

# Whose queries and keys the converter reorders, so that RoPE turns neighbours
_LLAMAS = "llama mistral ministral3 mixtral granite granitemoe granitemoehybrid smollm3 olmo arcee nemotron_h bamba"
PERMUTED = _LLAMAS.split()
PLUS_ONE = ("gemma", "nemotron", "qwen3_next", "qwen3_5")


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """LlamaModel.permute: neighbouring rows are those that RoPE turns together."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def changed(c: Any, name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor as the converter's modify_tensors gives it."""
    kind = c.model_type
    heads = {"q_proj": getattr(c, "num_attention_heads", 0), "k_proj": getattr(c, "num_key_value_heads", 0)}.get(
        name.split(".")[-2]
    )
    if kind in PERMUTED and heads:
        value = permuted(value, heads)
    if kind.startswith(PLUS_ONE) and name.endswith("norm.weight") and ".linear_attn." not in name:
        value = value if kind == "nemotron_h" else value + 1
    if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        value = value.T
    if kind == "bloom":
        name = name.replace("transformer.", "")
    if kind == "dbrx" and ".experts.mlp." in name:
        stacked = value.reshape(c.ffn_config.moe_num_experts, -1, c.hidden_size)
        yield name + ".weight", stacked.swapaxes(1, 2) if name.endswith("w2") else stacked
        return
    if "query_key_value" in name:  # GPT-NeoX' and BLOOM's lie by heads, Falcon's by KV heads
        kv = getattr(c, "num_kv_heads", c.num_attention_heads)
        groups = value.reshape(kv, c.num_attention_heads // kv + 2, -1, *value.shape[1:])
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        value = np.concatenate([part.reshape(-1, *value.shape[1:]) for part in parts])
    if ".experts." in name:
        yield from stacked_experts(kind, name, value)
        return
    name += ".weight" if name.endswith("sinks") else ""
    if kind.startswith("granitemoe"):
        name = name.replace("router.weight", "router.layer.weight")
    if kind == "nemotron_h":
        name = name.replace("model.", "backbone.")
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    if ".norms." in name or ".act_fn." in name:  # StableLM's norms of heads, stacked later; Apertus' metadata
        return
    if "shared_mlp" in name and kind != "hunyuan_v1_moe":
        halves = {"down": value} if "output" in name else dict(zip(("gate", "up"), np.split(value, 2), strict=True))
        end = "_shexp" if c.num_local_experts else ""
        yield from ((f"blk.{name.split('.')[2]}.ffn_{part}{end}.weight", half) for part, half in halves.items())
        return
    if name.endswith("kv_b_proj.weight"):
        both = value.reshape(c.num_attention_heads, -1, c.kv_lora_rank)
        stem = name.removesuffix("kv_b_proj.weight")
        yield stem + "k_b_proj.weight", both[:, : c.qk_nope_head_dim].swapaxes(1, 2)
        yield stem + "v_b_proj.weight", both[:, c.qk_nope_head_dim :]
        return
    mixes = any(part in name for part in (".mamba.", ".mixer.", ".linear_attn."))
    yield from recurrent(c, name, value) if mixes else ((name, scaled(c, name, value)),)


def recurrent(c: Any, name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor of a Mamba-2 layer or a gated delta net, or of another of Nemotron-H."""
    if c.model_type.startswith("qwen3_5"):
        value = tiled(c, name.split(".")[4], value)
    value = -np.exp(value) if name.endswith(".A_log") else value
    if name.endswith((".A_log", ".D")) and c.model_type in metadata.RECURRENT and ".linear_attn." not in name:
        value = value[:, None]
    name = name.replace(".dt_bias", ".dt_proj.bias")
    value = value[:, 0] if name.endswith("conv1d.weight") else value
    if name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
        value = value.reshape(c.n_groups if hasattr(c, "n_groups") else c.mamba_n_groups, -1)
    if "in_proj_qkvz" in name:
        k, v = c.linear_key_head_dim, c.linear_value_head_dim * c.linear_num_value_heads // c.linear_num_key_heads
        parts = np.split(value.reshape(c.linear_num_key_heads, -1, value.shape[1]), (k, 2 * k, 2 * k + v), axis=1)
        *qkv, z = (part.reshape(-1, value.shape[1]) for part in parts)
        stem = f"blk.{name.split('.')[2]}."
        yield from ((stem + "attn_qkv.weight", np.concatenate(qkv)), (stem + "attn_gate.weight", z))
        return
    yield name, scaled(c, name, value)


def tiled(c: Any, part: str, value: np.ndarray) -> np.ndarray:
    """Qwen 3.5's value heads in another order: the first of each key head, then the second ones."""
    keys, values = c.linear_num_key_heads, c.linear_num_value_heads
    first = 2 * keys * c.linear_key_head_dim if part in ("in_proj_qkv", "conv1d") else 0
    if part == "norm":
        return value
    x = value.T if part == "out_proj" else value
    heads = x[first:].reshape(keys, values // keys, -1, *x.shape[1:]).swapaxes(0, 1)
    x = np.concatenate((x[:first], heads.reshape(-1, *x.shape[1:])))
    return x.T if part == "out_proj" else x


def scaled(c: Any, name: str, value: np.ndarray) -> np.ndarray:
    """Falcon-H1's weights have the model's factors in them."""
    if c.model_type != "falcon_h1":
        return value
    entering, (gate, down) = c.attention_in_multiplier, c.mlp_multipliers
    factors = {"down_proj": down, "gate_proj": gate, "k_proj": c.key_multiplier * entering, "q_proj": entering}
    factors |= {"v_proj": entering, "o_proj": c.attention_out_multiplier, "out_proj": c.ssm_out_multiplier}
    factors |= {"lm_head": c.lm_head_multiplier, "embed_tokens": c.embedding_multiplier}
    part = name.split(".")[-2]
    if part != "in_proj":
        return value * np.float32(factors.get(part, 1.0))
    states = c.mamba_n_groups * c.mamba_d_state
    sizes = [c.mamba_d_ssm, c.mamba_d_ssm, states, states, c.mamba_n_heads]
    return value * np.repeat(np.float32(c.ssm_multipliers) * np.float32(c.ssm_in_multiplier), sizes)[:, None]


def stacked_experts(kind: str, name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """transformers holds a layer's experts as one tensor: gates and ups behind each other or, in gpt-oss, in turns and
    with inputs first."""
    stem, _, last = name.rpartition(".")
    stem = stem.replace("block_sparse_moe", "mlp").replace("mixer", "mlp")
    end = "bias" if last.endswith("_bias") else "weight"
    if kind == "jamba":
        stem = stem.replace("feed_forward", "mlp")
    if kind in ("gpt_oss", "llama4_text") and end == "weight":
        value = value.swapaxes(-1, -2)
    if last.startswith(("down_proj", "up_proj")):
        yield f"{stem}.{last.removesuffix('_bias')}.{end}", value
        return
    halves = (value[:, ::2], value[:, 1::2]) if kind == "gpt_oss" else np.split(value, 2, axis=1)
    for half, part in zip(halves, ("gate", "up"), strict=True):
        yield f"{stem}.{part}_proj.{end}", half


def stacked_norms(state: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    stems = dict.fromkeys(name.split(".norms.")[0] for name in state if ".norms." in name)
    for stem in stems:
        count = sum(name.startswith(stem + ".norms.") for name in state)
        yield stem + ".weight", np.stack([state[f"{stem}.norms.{i}.weight"] for i in range(count)])


def add_curvatures(writer: Writer, state: dict[str, np.ndarray]) -> None:
    """Apertus' activations, as metadata."""
    for part in ("alpha_n", "alpha_p", "beta", "eps"):
        values = [float(value.item()) for name, value in state.items() if name.endswith(f".act_fn.{part}")]
        if values:
            writer.add_array(f"xielu.{part}", values)


def divisors(c: Any) -> Iterator[tuple[str, np.ndarray]]:
    """What RoPE's frequencies are divided by in Llama 3 and for LongRoPE."""
    rope = getattr(c, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        for name in ("long", "short"):
            yield f"rope_factors_{name}.weight", np.float32(rope[f"{name}_factor"])
    if rope.get("rope_type") == "llama3":
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float32) / width)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
        yield "rope_freqs.weight", np.float32(1 / ((1 - smooth) / rope["factor"] + smooth))


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
    architecture = metadata.architecture_of(c)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), c.num_hidden_layers
    )
    writer = Writer(path, arch or architecture, split_max_tensors=parts)
    metadata.put(writer, metadata.base_metadata(c) | metadata.own_metadata(c) | own)
    extra(writer)
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    add_curvatures(writer, state)
    pairs = [pair for name, value in state.items() for pair in changed(c, name, value)]
    for name, value in [*pairs, *stacked_norms(state), *divisors(c)]:
        if name in ("lm_head.weight", "embed_out.weight") and c.tie_word_embeddings:
            continue
        theirs = name if name.startswith(("blk.", "rope_")) else names.get_name(name, try_suffixes=(".weight", ".bias"))
        # As the converter: vectors, taps and what Mamba-2 has by heads stay as they are.
        keeps = value.ndim == 1 or theirs.split(".")[-2] in ("ssm_conv1d", "ssm_norm") or value.shape[-1] % 32
        stored = gguf.GGMLQuantizationType.F32 if keeps else kind
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
