"""Opening single-tower GGUF files, as llama.cpp's converter writes them, by the families that they are of."""

from pathlib import Path
from typing import Any

from twotower.checkpoints.backbone import Backbone
from twotower.checkpoints.families.family import open_family
from twotower.checkpoints.families.known import find_family
from twotower.checkpoints.gguf.architectures import ARCHITECTURES, SWITCHES, Architecture
from twotower.checkpoints.gguf.names import named_tensors
from twotower.checkpoints.gguf.reader import GgufFile, read_gguf
from twotower.checkpoints.gguf.rope import decimal, rope_parameters
from twotower.checkpoints.gguf.special_tokens import SpecialTokens
from twotower.checkpoints.gguf.tensors import spec_of
from twotower.checkpoints.gguf.tokenizer import tokenizer_from_gguf

_REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
_NORMS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon", "layer_norm_eps": "attention.layer_norm_epsilon"}


def open_gguf(path: Path) -> Backbone:
    """Opens a GGUF file, or a split model by any of its parts. Quantised tensors become float32; floats are kept.

    Without `output.weight` in the file, the head is tied to the embedding. Raises FileNotFoundError for a missing part,
    ValueError, naming the tensor or the metadata, for a broken file or something that is not supported, and ImportError
    without the `gguf` package.
    """
    file = read_gguf(path)
    if file.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path} has the architecture {file.architecture!r}, must be one of {', '.join(sorted(ARCHITECTURES))}; "
            "take the model's Hugging Face folder instead"
        )
    architecture = ARCHITECTURES[file.architecture]
    special = SpecialTokens.read(path, file.metadata)
    raw = _config(file, architecture, special)
    tensors = named_tensors(file, raw, architecture.block, architecture.rest, architecture.layers)
    tokenizer = tokenizer_from_gguf(path, file.metadata, special)
    return open_family(find_family(raw), raw, tensors, tokenizer, special.documents())


def _config(file: GgufFile, architecture: Architecture, special: SpecialTokens) -> dict[str, Any]:
    """The model's config.json, as far as the file tells it."""
    missing = [f"{file.architecture}.{key}" for key in _REQUIRED if file.setting(key) is None]
    missing += ["token_embd.weight"] if "token_embd.weight" not in file.tensors else []
    if all(file.setting(key) is None for key in _NORMS.values()):
        missing.append(f"{file.architecture}.attention.layer_norm_rms_epsilon")
    if missing:
        raise ValueError(f"{file.path} lacks {', '.join(missing)}; it is no complete language model, take another file")
    heads, width = file.setting("attention.head_count"), file.setting("embedding_length")
    head_dim = file.setting("attention.key_length", width // heads)
    _refuse(file, architecture, head_dim)
    embedding = spec_of(file.tensors["token_embd.weight"])
    if len(special.texts) > embedding.shape[0]:
        raise ValueError(
            f"{file.path} has {len(special.texts)} tokens but {embedding.shape[0]} embeddings; convert the model again"
        )
    epsilons = {name: file.setting(key) for name, key in _NORMS.items()}
    ends = special.ends
    raw = {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": file.setting("feed_forward_length"),
        "num_hidden_layers": file.setting("block_count") - file.setting("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": file.setting("attention.head_count_kv", heads),
        "head_dim": head_dim,
        **{name: decimal(value) for name, value in epsilons.items() if value is not None},
        "max_position_embeddings": file.setting("context_length"),
        "rope_parameters": rope_parameters(file, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "bos_token_id": special.ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "torch_dtype": str(embedding.dtype).removeprefix("torch."),
    }
    return raw | dict(architecture.settings(file, raw))


def _refuse(file: GgufFile, architecture: Architecture, head_dim: int) -> None:
    found = [
        f"{file.architecture}.{key} {file.setting(key)}"
        for key in SWITCHES
        if file.setting(key) and key not in architecture.reads
    ]
    if not file.setting("attention.causal", True):
        found.append("attention to later positions")
    if file.setting("attention.value_length", head_dim) != head_dim:
        found.append(f"values of width {file.setting('attention.value_length')} beside keys of {head_dim}")
    if file.architecture == "llama" and file.setting("rope.dimension_count", head_dim) != head_dim:
        found.append(f"llama.rope.dimension_count {file.setting('rope.dimension_count')} beside heads of {head_dim}")
    if found:
        raise ValueError(
            f"{file.path} computes something that our towers don't: {', '.join(found)}; take another model"
        )
