"""SentencePiece models (`tokenizer.model`) as tokenizer.json.

The file is a protocol buffer of sentencepiece_model.proto (https://github.com/google/sentencepiece), of which only a
few fields are needed: reading them takes less than the two packages that would do it.
"""

import base64
import re
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from twotower.checkpoints.hf.hub import refuse_pointer
from twotower.checkpoints.vocabulary import added_token, scored_merges

SPACE = "\u2581"  # what stands for a space in pieces


class PieceKind(IntEnum):
    """ModelProto.SentencePiece.Type"""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class SentencePieceModel(NamedTuple):
    """The pieces with their scores and kinds, and the settings, under the names that the format has for them."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    model_type: int
    byte_fallback: bool
    treat_whitespace_as_suffix: bool
    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    def of_kind(self, *kinds: PieceKind) -> list[int]:
        """The ids of the pieces of these kinds."""
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """Reads a model file. Raises ValueError, naming the file, for anything else."""
    refuse_pointer(file)
    try:
        fields = list(_fields(file.read_bytes()))
        entries = [dict(_fields(content)) for number, content in fields if number == 1]
        pieces = tuple(entry[1].decode() for entry in entries)
        trainer, normalizer = (dict(_fields(next((c for n, c in fields if n == m), b""))) for m in (2, 3))
        scores = tuple(struct.unpack("<f", entry.get(2, bytes(4)))[0] for entry in entries)
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{file} is not a SentencePiece model: {error}; download it again") from error
    if not pieces:
        raise ValueError(f"{file} is not a SentencePiece model: it has no pieces; download it again")
    return SentencePieceModel(
        pieces,
        scores,
        tuple(entry.get(3, PieceKind.NORMAL) for entry in entries),
        model_type=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, 0)),
        treat_whitespace_as_suffix=bool(trainer.get(24, 0)),
        precompiled_charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def sentencepiece_tokenizer(model: SentencePieceModel, *, prefix_every_chunk: bool) -> dict[str, Any]:
    """The content of a tokenizer.json that encodes what is between control tokens as SentencePiece does.

    `prefix_every_chunk` says whether the space that SentencePiece puts before a text also comes after each control
    token, or only at the start. Raises ValueError for a model of whole words or characters, or with unused pieces.
    """
    _check(model)
    unknown = model.of_kind(PieceKind.UNKNOWN)
    special = model.of_kind(PieceKind.UNKNOWN, PieceKind.CONTROL)
    fixed = model.of_kind(PieceKind.USER_DEFINED)
    if model.model_type == _UNIGRAM:
        inner: dict[str, Any] = {
            "type": "Unigram",
            "unk_id": unknown[0] if unknown else None,
            "vocab": [list(entry) for entry in zip(model.pieces, model.scores, strict=True)],
            "byte_fallback": model.byte_fallback,
        }
    else:
        normal = [p if kind == PieceKind.NORMAL else None for p, kind in zip(model.pieces, model.kinds, strict=True)]
        inner = {
            "type": "BPE",
            "unk_token": model.pieces[unknown[0]] if unknown else None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            # So that user-defined pieces, which no merge makes, are found whole
            "ignore_merges": bool(fixed),
            "vocab": {piece: i for i, piece in enumerate(model.pieces)},
            "merges": scored_merges(normal, model.scores),
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, model.pieces[i], special=True) for i in special],
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(model, prefix_every_chunk))},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": list(_pre_tokenizers(model, [model.pieces[i] for i in fixed], prefix_every_chunk)),
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": list(_decoders(model))},
        "model": inner,
    }


_UNIGRAM, _BPE = 1, 2


def _check(model: SentencePieceModel) -> None:
    kinds = {3: "whole words", 4: "single characters"}
    if model.model_type not in (_UNIGRAM, _BPE):
        raise ValueError(
            f"the SentencePiece model is of {kinds.get(model.model_type, 'another kind')}, must be BPE or unigram"
        )
    if model.treat_whitespace_as_suffix or not model.escape_whitespaces:
        raise ValueError("the SentencePiece model must put spaces before words, as U+2581")
    charsmap = model.precompiled_charsmap
    normalize = tokenizers.normalizers.Precompiled(charsmap).normalize_str if charsmap else str
    fixed = [model.pieces[i] for i in model.of_kind(PieceKind.USER_DEFINED)]
    # SentencePiece finds these before it normalises, and in a unigram model weighs them with others
    weighs = model.remove_extra_whitespaces or model.model_type == _UNIGRAM
    lost = [p for p in fixed if normalize(p) != p or " " in p or (weighs and SPACE in p)]
    if lost:
        raise ValueError(f"the SentencePiece model has user-defined pieces that can't be converted: {lost[:5]}")
    if model.of_kind(PieceKind.UNUSED):
        raise ValueError("the SentencePiece model has unused pieces, which a tokenizer.json can't have")


def _normalizers(model: SentencePieceModel, prefix_every_chunk: bool) -> Iterator[dict[str, Any]]:
    """In SentencePiece's order."""
    if model.precompiled_charsmap:
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.precompiled_charsmap).decode()}
    if model.remove_extra_whitespaces:
        yield _replace({"Regex": r"\A +"}, "")
        yield _replace({"Regex": " {2,}"}, " ")
    yield _replace({"String": " "}, SPACE)
    if model.remove_extra_whitespaces:
        yield _replace({"Regex": rf"{SPACE}+\z"}, "")  # also those that stood in the text
    if model.add_dummy_prefix and prefix_every_chunk:
        # Metaspace leaves its prefix out before a text that begins with a space; SentencePiece doesn't
        yield _replace({"Regex": rf"\A{SPACE}"}, SPACE * 2)


def _pre_tokenizers(model: SentencePieceModel, fixed: list[str], prefix_every_chunk: bool) -> Iterator[dict[str, Any]]:
    if model.add_dummy_prefix:
        scheme = "always" if prefix_every_chunk else "first"
        yield {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    if fixed:
        pattern = "|".join(re.escape(piece) for piece in sorted(fixed, key=len, reverse=True))
        yield {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _decoders(model: SentencePieceModel) -> Iterator[dict[str, Any]]:
    yield _replace({"String": SPACE}, " ")
    if model.byte_fallback:
        yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if model.add_dummy_prefix:
        yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


# Bytes of a field by its wire type
_FIXED_SIZES = {1: 8, 5: 4}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: number and content, an integer or bytes. Later ones of a number replace
    earlier ones unless the field is repeated."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire_type == 2:
            size, at = _varint(message, at)
        else:
            size = _FIXED_SIZES.get(wire_type, len(message))
        if at + size > len(message):
            raise ValueError("it ends inside a field")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than 10 bytes")
