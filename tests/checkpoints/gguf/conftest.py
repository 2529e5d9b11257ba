"""Writing tiny GGUF files as llama.cpp's converter (conversion/*.py) does, with the gguf package's names."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

Write = Callable[..., Path]
Writer = gguf.GGUFWriter

# Where the converter's name of an architecture is not transformers'.
_OTHERS = """bamba:granitehybrid cohere:command-r deepseek_v2:deepseek2 deepseek_v3:deepseek2 falcon_h1:falcon-h1
falcon_mamba:mamba gemma3_text:gemma3 glm:chatglm gpt_bigcode:starcoder gpt_neox:gptneox gpt_oss:gpt-oss
granitemoehybrid:granitehybrid llama4_text:llama4 ministral3:mistral3 mistral:llama mixtral:llama olmo3:olmo2
qwen2_moe:qwen2moe qwen3_5_moe_text:qwen35moe qwen3_5_text:qwen35 qwen3_moe:qwen3moe qwen3_next:qwen3next"""
ARCHITECTURES = dict(pair.split(":") for pair in _OTHERS.split())
# Whose queries and keys the converter reorders, so that RoPE turns neighbours
_LLAMAS = "llama mistral ministral3 mixtral granite granitemoe granitemoehybrid smollm3 olmo arcee nemotron_h bamba"
PERMUTED = _LLAMAS.split()
PLUS_ONE = ("gemma", "nemotron", "qwen3_next", "qwen3_5")
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
    if "query_key_value" in name:  # GPT-NeoX' lie by heads, Falcon's by KV heads
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
    if "shared_mlp" in name:
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
    if name.endswith((".A_log", ".D")) and c.model_type in RECURRENT and ".linear_attn." not in name:
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
    architecture = architecture_of(c)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), c.num_hidden_layers
    )
    writer = Writer(path, arch or architecture, split_max_tensors=parts)
    put(writer, base_metadata(c) | own_metadata(c) | own)
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
