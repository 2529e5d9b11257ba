"""Opening single-tower GGUF files, as llama.cpp's converter writes them, by the families that they are of."""

from pathlib import Path
from typing import Any

from twotower.checkpoints.backbone import Backbone
from twotower.checkpoints.families.family import open_family
from twotower.checkpoints.families.known import find_family
from twotower.checkpoints.families.nemotron_h import open_nemotron_h
from twotower.checkpoints.gguf.architecture import SIZES, SWITCHES, Architecture
from twotower.checkpoints.gguf.architectures import find_architecture
from twotower.checkpoints.gguf.names import blocks, named_tensors
from twotower.checkpoints.gguf.reader import GgufFile, read_gguf, shown
from twotower.checkpoints.gguf.rope import rope_parameters
from twotower.checkpoints.gguf.special_tokens import SpecialTokens
from twotower.checkpoints.gguf.tensors import spec_of
from twotower.checkpoints.gguf.tokenizer import tokenizer_from_gguf

_REQUIRED = ("block_count", "embedding_length")
_NORMS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon", "layer_norm_eps": "attention.layer_norm_epsilon"}
# More heads, and wider ones, than any model has; some families declare each one
_MOST_HEADS = 2**16


def open_gguf(path: Path) -> Backbone:
    """Opens a GGUF file, or a split model by any of its parts. Quantised tensors become float32; floats are kept.

    Without `output.weight` in the file, the head is tied to the embedding. Raises FileNotFoundError for a missing part,
    ValueError, naming the tensor or the metadata, for a broken file or something that is not supported, and ImportError
    without the `gguf` package.
    """
    file = read_gguf(path)
    architecture = find_architecture(file)
    special = SpecialTokens.read(path, file.metadata)
    raw = _config(file, architecture, special)
    given = architecture.given(file)
    tensors = named_tensors(file, raw, architecture.block, architecture.rest, architecture.layers, given)
    tokenizer = tokenizer_from_gguf(path, file.metadata, special)
    try:
        if raw["model_type"] == "nemotron_h":
            return open_nemotron_h(raw, tensors, tokenizer, special.documents())
        return open_family(find_family(raw), raw, tensors, tokenizer, special.documents())
    except (ValueError, RuntimeError) as error:  # PyTorch's of tensors that don't fit the metadata
        raise ValueError(f"{path} doesn't open as the model that its metadata describes: {error}") from error


def _config(file: GgufFile, architecture: Architecture, special: SpecialTokens) -> dict[str, Any]:
    """The model's config.json, as far as the file tells it."""
    required = _REQUIRED + (("attention.head_count",) if architecture.attends else ())
    missing = [f"{file.architecture}.{key}" for key in required if file.setting(key) is None]
    missing += ["token_embd.weight"] if "token_embd.weight" not in file.tensors else []
    if all(file.setting(key) is None for key in _NORMS.values()):
        missing.append(f"{file.architecture}.attention.layer_norm_rms_epsilon")
    if missing:
        raise ValueError(f"{file.path} lacks {', '.join(missing)}; it is no complete language model, take another file")
    embedding = spec_of(file.tensors["token_embd.weight"])
    if len(special.texts) > embedding.shape[0]:
        raise ValueError(
            f"{file.path} has {len(special.texts)} tokens but {embedding.shape[0]} embeddings; convert the model again"
        )
    ends = special.ends
    raw: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": _width(file, embedding.shape),
        "num_hidden_layers": _num_layers(file),
        **_epsilons(file),
        "max_position_embeddings": file.count("context_length", 0) or None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": bool(file.tensors.keys() & {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}),
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "bos_token_id": special.ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "torch_dtype": str(embedding.dtype).removeprefix("torch."),
    }
    if architecture.attends:
        raw |= _attention(file, architecture, raw["hidden_size"])
    _refuse(file, architecture, raw.get("head_dim"))
    return raw | dict(architecture.settings(file, raw))


def _epsilons(file: GgufFile) -> dict[str, float]:
    """What norms add under roots. A file with one key for it has one for all norms."""
    found = {name: file.number(key) for name, key in _NORMS.items() if file.setting(key) is not None}
    return dict.fromkeys(_NORMS, next(iter(found.values()))) | found


def _width(file: GgufFile, embedding: tuple[int, ...]) -> int:
    if len(embedding) != 2 or file.count("embedding_length") != embedding[-1]:
        raise file.wrong("embedding_length", f"the width of token_embd.weight, whose shape is {embedding}")
    return embedding[-1]


def _num_layers(file: GgufFile) -> int:
    """The layers that are no prediction of further tokens; the file must have tensors of each."""
    count = file.count("block_count", least=1)
    ahead = file.count("nextn_predict_layers", 0)
    present = len(blocks(file))
    if not 1 <= count - ahead <= present:
        rule = f"at least {ahead + 1} and at most {present + ahead}, as there are tensors of {present} blocks"
        raise file.wrong("block_count", rule)
    return count - ahead


def _attention(file: GgufFile, architecture: Architecture, width: int) -> dict[str, Any]:
    heads = file.count("attention.head_count", least=1, most=_MOST_HEADS)
    head_dim = file.count("attention.key_length", width // heads, least=1, most=_MOST_HEADS)
    # The converter writes another width where a config.json has several; the tensors have the one that counts.
    down = next((t for name, t in file.tensors.items() if name.endswith(".ffn_down.weight")), None)
    return {
        "intermediate_size": file.count("feed_forward_length", 0) if down is None else down.shape[-1],
        "num_attention_heads": heads,
        "num_key_value_heads": file.count("attention.head_count_kv", heads, least=1, most=heads),
        "head_dim": head_dim,
        "rope_parameters": rope_parameters(file, head_dim) if architecture.rotates else None,
    }


def _refuse(file: GgufFile, architecture: Architecture, head_dim: int | None) -> None:
    """Raises ValueError for what the architecture's settings say that the towers don't compute."""
    found = [
        f"{file.architecture}.{key} {shown(file.setting(key))}"
        for key in SWITCHES
        if file.setting(key) and key not in architecture.reads
    ]
    if not file.flag("attention.causal", True):
        found.append("attention to later positions")
    for key in SIZES if head_dim is not None else ():
        if key not in architecture.reads and file.setting(key, head_dim) != head_dim:
            found.append(f"{file.architecture}.{key} {shown(file.setting(key))} beside heads of {head_dim}")
    if found:
        raise ValueError(
            f"{file.path} computes something that our towers don't: {', '.join(found)}; take another model"
        )
