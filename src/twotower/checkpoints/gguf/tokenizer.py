"""Rebuilding tokenizer.json from a GGUF file's metadata, for the kinds of tokenizer where it comes out exactly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.checkpoints.vocabulary import added_token, first_token_processor, normal_form, scored_bpe

if TYPE_CHECKING:
    from gguf import ReaderField

logger = logging.getLogger(__name__)

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_DIGITS = {"type": "Digits", "individual_digits": True}


def _byte_level(*, split: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split}


def _split(pattern: str) -> list[dict[str, Any]]:
    regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [regex, _byte_level(split=False)]


# llama.cpp's name of a pre-tokenizer, which cuts a text into words before merging -> its entry in tokenizer.json.
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(split=True)],
    "smollm": [_DIGITS, _byte_level(split=True)],
    "qwen2": _split(_ENDINGS + _WORDS + r"\p{N}|" + _REST),
    "llama-bpe": _split(_ENDINGS + _WORDS + r"\p{N}{1,3}|" + _REST),
}


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, ReaderField]) -> str | None:
    """The text of a tokenizer.json; None, with a warning, for a tokenizer that can't be rebuilt exactly."""
    kind = _value(metadata, "model", None)
    if kind == "llama":
        return _scored(metadata)
    pre = _value(metadata, "pre", "default")
    if kind == "gpt2" and pre in _PRE_TOKENIZERS:
        return _byte_level_bpe(metadata, pre)
    logger.warning(
        "%s: no tokenizer.json written, its tokenizer is %s with pre-tokenizer %s; supported are llama, and gpt2 with "
        "one of %s. Add the model's own tokenizer.json",
        path,
        kind,
        pre,
        sorted(_PRE_TOKENIZERS),
    )
    return None


def _scored(metadata: Mapping[str, ReaderField]) -> str:
    """SentencePiece's BPE: pieces with scores, and byte tokens for characters without a piece."""
    types = _value(metadata, "token_type", [])
    tokens = [
        token if kind in (_CONTROL, _USER_DEFINED) else token.replace("\u2581", " ")
        for token, kind in zip(_value(metadata, "tokens", []), types, strict=True)
    ]
    return scored_bpe(
        tokens,
        _value(metadata, "scores", []),
        control=[i for i, kind in enumerate(types) if kind == _CONTROL],
        user_defined=[i for i, kind in enumerate(types) if kind == _USER_DEFINED],
        unknown=_value(metadata, "unknown_token_id", 0),
        first_token=_value(metadata, "bos_token_id", 1) if _value(metadata, "add_bos_token", True) else None,
        space_prefix=_value(metadata, "add_space_prefix", True),
    )


def _byte_level_bpe(metadata: Mapping[str, ReaderField], pre: str) -> str:
    """GPT-2's BPE over bytes, with llama.cpp's pre-tokenizer `pre`."""
    tokens = list(enumerate(_value(metadata, "tokens", [])))
    types = _value(metadata, "token_type", [])
    added = [
        added_token(i, t, special=types[i] == _CONTROL) for i, t in tokens if types[i] in (_CONTROL, _USER_DEFINED)
    ]
    first = None
    if _value(metadata, "add_bos_token", pre == "llama-bpe"):
        bos = _value(metadata, "bos_token_id", None)
        first = first_token_processor(bos, tokens[bos][1])
    raw = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": first,
        "decoder": _byte_level(split=True),
        "model": {
            "type": "BPE",
            "fuse_unk": False,
            "byte_fallback": False,
            # Llama 3 encodes a word that is in the vocabulary as that token, even where merging would not give it.
            "ignore_merges": pre == "llama-bpe",
            "vocab": {t: i for i, t in tokens if types[i] != _UNUSED},
            "merges": [merge.split(" ", 1) for merge in _value(metadata, "merges", [])],
        },
    }
    return normal_form(raw)


def _value(metadata: Mapping[str, ReaderField], key: str, default: Any) -> Any:
    field = metadata.get(f"tokenizer.ggml.{key}")
    return default if field is None else field.contents()
