"""Reading single-tower models in llama2.c's format: a `.bin` of float32 weights, and a tokenizer in it or beside it."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.checkpoints.backbone import Backbone
from twotower.checkpoints.families.decoder import half_rotated
from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.checkpoints.vocabulary import byte_token, scored_bpe
from twotower.config import TwoTowerConfig

TOKENIZER_FILE = "tokenizer.bin"

_HEADER = struct.Struct("<7i")
_LATER_MAGIC = 0x616B3432  # "ak42": versions 1 and 2 of the format
_CONTROL = ("<unk>", "<s>", "</s>")
_FIRST_PIECE = len(_CONTROL) + 256


class Llama2cHeader(NamedTuple):
    """The seven numbers that a file starts with. A negative vocab_size there means a head of its own; here it is
    positive and `tied` says whether the head is the embedding."""

    dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    sequence_length: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


class ScoredPieces(NamedTuple):
    """A vocabulary by id: pieces of text, None for control and byte tokens, and their scores; higher ones merge
    first."""

    pieces: tuple[str | None, ...]
    scores: tuple[float, ...]


class _Part(NamedTuple):
    offset: int
    shape: tuple[int, ...]
    rotated_heads: int  # the number of heads of a query or key projection, else 0


def open_llama2c(path: Path) -> Backbone:
    """Opens llama2.c weights, version 0 of the format. The tokenizer, if there is one, follows the weights in the file
    or is `tokenizer.bin` beside it.

    Raises ValueError, naming the file, for another version or a size that does not fit the header.
    """
    header = read_header(path)
    parts = _layout(header)
    vocabulary = _read_vocabulary(path, header, _weights_end(header))
    config = TwoTowerConfig.from_dict(
        {
            "architectures": ["NemotronHTwoTowerForCausalLM"],
            "model_type": "nemotron_h",
            "hybrid_override_pattern": "*-" * header.num_layers,
            "layer_norm_epsilon": 1e-5,
            "use_rope": True,
            "rope_theta": 10000.0,
            "gated_mlp": True,
            "mlp_hidden_act": "silu",
            "vocab_size": header.vocab_size,
            "hidden_size": header.dim,
            "intermediate_size": header.hidden_dim,
            "num_attention_heads": header.num_heads,
            "num_key_value_heads": header.num_kv_heads,
            "head_dim": header.head_dim,
            "max_position_embeddings": header.sequence_length,
            "tie_word_embeddings": header.tied,
            "bos_token_id": 1,
            "eos_token_id": 1,  # training texts are separated by BOS, and llama2.c stops at the next one
            "torch_dtype": "float32",
            "conversion_source": f"llama2.c {path.name}",
        }
    )

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, part in parts.items():
            flat = np.fromfile(path, "<f4", math.prod(part.shape), offset=part.offset)
            tensor = torch.from_numpy(flat).view(part.shape)
            yield name, half_rotated(tensor, part.rotated_heads, header.head_dim) if part.rotated_heads else tensor

    specs = {name: TensorSpec(torch.float32, part.shape) for name, part in parts.items()}
    tokenizer = None if vocabulary is None else _tokenizer(vocabulary)
    return Backbone(config=config, specs=specs, stream=stream, tokenizer=tokenizer, documents={})


def read_header(path: Path) -> Llama2cHeader:
    """The header of a version 0 file. Raises ValueError, naming the file, for anything else."""
    with path.open("rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size:
        raise ValueError(f"{path} has {len(start)} bytes, less than a llama2.c header; download it again")
    dim, hidden_dim, layers, heads, kv_heads, vocab_size, length = _HEADER.unpack(start)
    if dim == _LATER_MAGIC:
        raise ValueError(
            f"{path} is llama2.c format version {hidden_dim}, must be version 0; export it with --version 0"
        )
    header = Llama2cHeader(dim, hidden_dim, layers, heads, kv_heads, abs(vocab_size), length, tied=vocab_size > 0)
    if min(header[:7]) < 1 or dim % heads or heads % kv_heads or header.head_dim % 2:
        raise ValueError(f"{path} is not a llama2.c file: its header reads {header}; give a version 0 .bin file")
    return header


def read_pieces(path: str | Path) -> ScoredPieces:
    """The vocabulary of a llama2.c file, in it or beside it, as `vocabulary.merge_closure` takes it.

    Raises FileNotFoundError without a tokenizer, and ValueError for a broken one.
    """
    path = Path(path)
    header = read_header(path)
    vocabulary = _read_vocabulary(path, header, _weights_end(header))
    if vocabulary is None:
        raise FileNotFoundError(f"{path} has no tokenizer in it and no {TOKENIZER_FILE} beside it; add the file")
    return vocabulary


def _layout(h: Llama2cHeader) -> dict[str, _Part]:
    """Our tensors' names -> where they lie in the file, which keeps the same tensor of all layers together."""
    parts: dict[str, _Part] = {}
    offset = _HEADER.size

    def take(name: str, *shape: int, rotated_heads: int = 0) -> None:
        nonlocal offset
        parts[name] = _Part(offset, shape, rotated_heads)
        offset += 4 * math.prod(shape)

    def take_layers(kind: int, name: str, *shape: int, rotated_heads: int = 0) -> None:
        for i in range(h.num_layers):
            take(f"layers.{2 * i + kind}.{name}.weight", *shape, rotated_heads=rotated_heads)

    attention, mlp = 0, 1
    queries, keys = h.num_heads * h.head_dim, h.num_kv_heads * h.head_dim
    take("embeddings.weight", h.vocab_size, h.dim)
    take_layers(attention, "norm", h.dim)
    take_layers(attention, "mixer.q_proj", queries, h.dim, rotated_heads=h.num_heads)
    take_layers(attention, "mixer.k_proj", keys, h.dim, rotated_heads=h.num_kv_heads)
    take_layers(attention, "mixer.v_proj", keys, h.dim)
    take_layers(attention, "mixer.o_proj", h.dim, queries)
    take_layers(mlp, "norm", h.dim)
    take_layers(mlp, "mixer.gate_proj", h.hidden_dim, h.dim)
    take_layers(mlp, "mixer.down_proj", h.dim, h.hidden_dim)
    take_layers(mlp, "mixer.up_proj", h.hidden_dim, h.dim)
    take("norm_f.weight", h.dim)
    offset += 4 * h.sequence_length * h.head_dim  # tables of cosines and sines for RoPE, which we compute
    if not h.tied:
        take("lm_head.weight", h.vocab_size, h.dim)
    return parts


def _weights_end(header: Llama2cHeader) -> int:
    """The number of bytes up to the end of the weights."""
    parts = _layout(header)
    last = parts["norm_f.weight" if header.tied else "lm_head.weight"]
    tables = 4 * header.sequence_length * header.head_dim if header.tied else 0
    return last.offset + 4 * math.prod(last.shape) + tables


def _read_vocabulary(path: Path, header: Llama2cHeader, weights_end: int) -> ScoredPieces | None:
    size = path.stat().st_size
    if size < weights_end:
        raise ValueError(
            f"{path} has {size} bytes, its header asks for {weights_end}; it is cut off, download it again"
        )
    if size > weights_end:
        with path.open("rb") as file:
            file.seek(weights_end)
            return _parse_vocabulary(file.read(), header.vocab_size, f"{path}, after the weights,")
    beside = path.with_name(TOKENIZER_FILE)
    return _parse_vocabulary(beside.read_bytes(), header.vocab_size, str(beside)) if beside.exists() else None


def _parse_vocabulary(content: bytes, vocab_size: int, where: str) -> ScoredPieces:
    """Parses a tokenizer: int32 longest piece, then for each token float32 score, int32 length, that many bytes."""
    pieces: list[str | None] = []
    scores: list[float] = []
    offset = 4
    for i in range(vocab_size):
        if offset + 8 > len(content):
            raise ValueError(f"{where} is cut off at token {i} of {vocab_size}; use the model's own tokenizer")
        score, length = struct.unpack_from("<fi", content, offset)
        offset += 8
        piece = content[offset : offset + length]
        if length < 0 or len(piece) < length:
            raise ValueError(f"{where} has a token {i} of {length} bytes that does not fit; use the model's tokenizer")
        offset += length
        scores.append(score)
        pieces.append(None if i < _FIRST_PIECE else _text(piece, i, where))
        if len(_CONTROL) <= i < _FIRST_PIECE:
            value = i - len(_CONTROL)
            # Exporters write a byte token as its name, as the byte, or as the character with the byte's number.
            if piece not in (byte_token(value).encode(), bytes([value]), chr(value).encode()):
                raise ValueError(f"{where} has {piece!r} as token {i}, must be the byte {value}; use a Llama tokenizer")
    if offset != len(content) or vocab_size < _FIRST_PIECE:
        raise ValueError(
            f"{where} holds {len(content)} bytes and the vocabulary has {vocab_size} tokens, must be {offset} bytes "
            f"and at least {_FIRST_PIECE} tokens; use the model's own tokenizer"
        )
    return ScoredPieces(tuple(pieces), tuple(scores))


def _text(piece: bytes, token_id: int, where: str) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} has {piece!r} as token {token_id}, must be UTF-8; use a Llama tokenizer") from error


def _tokenizer(vocabulary: ScoredPieces) -> str:
    reserved = [*_CONTROL, *(byte_token(value) for value in range(256))]
    pieces = [p if p is not None else reserved[i] for i, p in enumerate(vocabulary.pieces)]
    return scored_bpe(pieces, vocabulary.scores, control=range(len(_CONTROL)), unknown=0, first_token=1)
