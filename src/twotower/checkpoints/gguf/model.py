"""Reading single-tower GGUF files of the `llama` and `qwen2` architectures, as llama.cpp's converter writes them.

Letters: d width, h heads, p head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from twotower.checkpoints.backbone import Backbone, half_rotation_rows, llama_config
from twotower.checkpoints.gguf.tokenizer import tokenizer_from_gguf
from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.config import TwoTowerConfig

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

MAGIC = b"GGUF"

ARCHITECTURES = ("llama", "qwen2")
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1")
_LAYER_NAMES = {
    "attn_norm": (0, "norm"),
    "attn_q": (0, "mixer.q_proj"),
    "attn_k": (0, "mixer.k_proj"),
    "attn_v": (0, "mixer.v_proj"),
    "attn_output": (0, "mixer.o_proj"),
    "ffn_norm": (1, "norm"),
    "ffn_gate": (1, "mixer.gate_proj"),
    "ffn_up": (1, "mixer.up_proj"),
    "ffn_down": (1, "mixer.down_proj"),
}
_TOP_NAMES = {
    "token_embd.weight": "embeddings.weight",
    "output_norm.weight": "norm_f.weight",
    "output.weight": "lm_head.weight",
}
# Metadata keys, after the architecture's name, under which the model computes something that our towers don't.
_REFUSED = (
    "attention.sliding_window",
    "attention.scale",
    "expert_count",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
)


def open_gguf(path: Path) -> Backbone:
    """Opens a GGUF file. Quantised tensors become float32; F32, F16 and BF16 are kept.

    Without `output.weight` in the file, the head is tied to the embedding. Raises ValueError, naming the tensor or the
    metadata, for an architecture, a tensor type or a setting that is not supported, and ImportError without the `gguf`
    package.
    """
    reader = _open(path)
    metadata = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    architecture = metadata["general.architecture"].contents() if "general.architecture" in metadata else None
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path} has the architecture {architecture}, must be one of {list(ARCHITECTURES)}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values = {key: field.contents() for key, field in metadata.items() if len(field.data) == 1}
    config = _config(path, architecture, values, tensors)
    ours = dict(_TOP_NAMES)
    for i in range(config.num_layers // 2):
        for theirs, (kind, name) in _LAYER_NAMES.items():
            for part in ("weight", "bias"):
                ours[f"blk.{i}.{theirs}.{part}"] = f"layers.{2 * i + kind}.{name}.{part}"
    specs = {ours.get(name, name): _spec(path, tensor) for name, tensor in tensors.items()}
    # The converter leaves out the biases that a model doesn't have; our attention has all four or none.
    zeros = [f"layers.{i}.mixer.o_proj.bias" for i in range(0, config.num_layers, 2) if config.attention_bias]
    zero_biases = {name: TensorSpec(torch.float32, (config.hidden_size,)) for name in zeros if name not in specs}
    # The converter reorders the rows of `llama` models' projections for interleaved RoPE, and of no others.
    rotated = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    rotated = rotated if architecture == "llama" else {}

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            value = _values(tensor)
            kind = name.split(".")[-2]
            yield ours[name], half_rotation_rows(value, rotated[kind]) if kind in rotated else value
        for name, spec in zero_biases.items():
            yield name, torch.zeros(spec.shape, dtype=spec.dtype)

    template = values.get("tokenizer.chat_template")
    return Backbone(
        config=config,
        specs=specs | zero_biases,
        stream=stream,
        tokenizer=tokenizer_from_gguf(path, metadata),
        documents={} if template is None else {"chat_template.jinja": template.encode()},
    )


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ImportError("reading GGUF files needs the gguf package; pip install 'twotower[gguf]'") from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError) as error:  # which one depends on where a truncated file ends
        raise ValueError(f"{path} is not a complete GGUF file ({error}); download it again") from error


def _config(path: Path, arch: str, values: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> TwoTowerConfig:
    required = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    missing = [
        f"{arch}.{key}" for key in (*required, "attention.layer_norm_rms_epsilon") if f"{arch}.{key}" not in values
    ]
    missing += ["token_embd.weight"] if "token_embd.weight" not in tensors else []
    if missing:
        raise ValueError(f"{path} lacks {missing}; it is no complete language model, download another file")
    refused = [f"{arch}.{key}" for key in _REFUSED if values.get(f"{arch}.{key}")]
    scaling = values.get(f"{arch}.rope.scaling.type", "none")
    refused += [f"{arch}.rope.scaling.type {scaling}"] if scaling != "none" else []
    refused += [name for name in tensors if name.startswith("rope_freqs")]
    num_heads = values[f"{arch}.attention.head_count"]
    width = values[f"{arch}.embedding_length"]
    head_dim = values.get(f"{arch}.attention.key_length", width // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(f"{arch}.{key}", head_dim) != head_dim:
            refused.append(f"{arch}.{key} {values[f'{arch}.{key}']} beside heads of {head_dim}")
    if refused:
        raise ValueError(f"{path} computes something that our towers don't: {refused}; convert another model")
    embedding = tensors["token_embd.weight"]
    ends = [values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = sorted({token for token in ends if token is not None})
    dtype = str(_spec(path, embedding).dtype).removeprefix("torch.")
    length = values.get(f"{arch}.context_length")
    return llama_config(
        vocab_size=int(embedding.shape[1]),
        hidden_size=width,
        intermediate_size=values[f"{arch}.feed_forward_length"],
        num_llama_layers=values[f"{arch}.block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=values.get(f"{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        # The file holds a float32, whose shortest decimal is the number in the model's config.json.
        rms_norm_eps=float(str(np.float32(values[f"{arch}.attention.layer_norm_rms_epsilon"]))),
        rope_theta=float(values.get(f"{arch}.rope.freq_base", 10000.0)),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        torch_dtype=dtype,
        conversion_source=f"GGUF {path.name}",
        **({} if length is None else {"max_position_embeddings": length}),
    )


def _spec(path: Path, tensor: ReaderTensor) -> TensorSpec:
    kind = tensor.tensor_type.name
    if kind not in _STORED and kind not in _QUANTISED:
        raise ValueError(
            f"tensor {tensor.name} of {path} is stored as {kind}, must be one of {[*_STORED, *_QUANTISED]}; "
            "use another quantisation of the model"
        )
    shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF counts dimensions from the innermost
    return TensorSpec(_STORED.get(kind, torch.float32), shape)


def _values(tensor: ReaderTensor) -> Tensor:
    """A copy of the tensor, since the file is mapped read-only: in its own dtype, or float32 if it was quantised."""
    from gguf import dequantize

    kind = tensor.tensor_type.name
    if kind == "BF16":
        return torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16)
    if kind in _STORED:
        return torch.from_numpy(np.array(tensor.data))
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
