"""Rebuilding tokenizer.json from a GGUF file's metadata, so that it encodes as llama.cpp does."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twotower.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, byte_level
from twotower.checkpoints.gguf.reader import shown
from twotower.checkpoints.gguf.special_tokens import SpecialTokens
from twotower.checkpoints.vocabulary import added_token, byte_token, normal_form, scored_merges

logger = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_MATCHED_WHOLE = (_UNKNOWN, _CONTROL, _USER_DEFINED)
# llama.cpp's names of the kinds that it reads and we don't.
_REFUSED = {
    "bert": "WordPiece",
    "t5": "SentencePiece unigram",
    "rwkv": "RWKV",
    "plamo2": "PLaMo-2",
    "hybriddna": "DNA k-mer",
    "whitespace": "whitespace",
}
_MARK = "\u2581"


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """A file's vocabulary: text, kind and score of each token."""

    texts: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]

    def added(self, *, strips_right: bool) -> list[dict[str, Any]]:
        """tokenizer.json's entries for the tokens that are matched in a text before it is cut into words."""
        entries = [
            added_token(i, text, special=kind != _USER_DEFINED)
            for i, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True))
            if kind in _MATCHED_WHOLE
        ]
        return [entry | {"rstrip": strips_right and entry["special"]} for entry in entries]


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any], special: SpecialTokens) -> str | None:
    """The text of a tokenizer.json; None if the file has no tokenizer, and, with a warning, if llama.cpp's
    pre-tokenizer of that name can't be expressed.

    Arrays that the format makes optional get its defaults: tokens without types are normal. Raises ValueError for
    tokenizers of another kind than byte-pair encoding, and where something is missing.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("llama", "gpt2", "gemma4"):
        name = f"{_REFUSED[kind]} ({kind})" if isinstance(kind, str) and kind in _REFUSED else shown(kind)
        raise ValueError(
            f"the tokenizer of {path} is {name}, must be byte-pair encoding (llama, gpt2 or gemma4); take another model"
        )
    tokens = _tokens(path, metadata)
    # The format has no place for it; llama.cpp goes by the model's name too.
    name = str(metadata.get("general.name", "")).lower()
    added = tokens.added(strips_right="phi-3" in name or "phi3" in name)
    if kind == "llama":
        if "tokenizer.ggml.scores" not in metadata:
            raise ValueError(f"{path} lacks tokenizer.ggml.scores, the order of merging; convert it again")
        return normal_form(_scored(metadata, tokens, added, special))
    pre = "gemma4" if kind == "gemma4" else metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        logger.warning(
            "%s: no tokenizer.json written, its pre-tokenizer %s can't be expressed there; known are %s. Add the "
            "model's own tokenizer.json",
            path,
            pre,
            ", ".join(sorted(PRE_TOKENIZERS)),
        )
        return None
    if pre == "default":
        logger.warning(
            "%s names no pre-tokenizer, so it is tokenised as llama.cpp does by default, which may differ from what "
            "the model was trained with; compare with the model's own tokenizer.json",
            path,
        )
    if "tokenizer.ggml.merges" not in metadata:
        raise ValueError(f"{path} lacks tokenizer.ggml.merges, without which BPE merges nothing; convert it again")
    given = metadata["tokenizer.ggml.merges"]
    if not isinstance(given, list) or not all(isinstance(merge, str) for merge in given):
        raise ValueError(f"{path} has tokenizer.ggml.merges {shown(given)}, must be texts; take another file")
    merges = [_parts(merge) for merge in given]
    return normal_form(_byte_pairs(PRE_TOKENIZERS[pre], tokens, merges, added, special))


def _tokens(path: Path, metadata: Mapping[str, Any]) -> _Tokens:
    if "tokenizer.ggml.tokens" not in metadata:
        raise ValueError(f"{path} lacks tokenizer.ggml.tokens, its vocabulary; convert the model again")
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(metadata["tokenizer.ggml.tokens"])]
    kinds = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(texts))
    scores = metadata.get("tokenizer.ggml.scores", [0.0] * len(texts))
    for name, values in (("token_type", kinds), ("scores", scores)):
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"{path} has tokenizer.ggml.{name} {shown(values)}, must be numbers; take another file")
        if len(values) < len(texts):
            raise ValueError(
                f"tokenizer.ggml.{name} of {path} has {len(values)} entries for {len(texts)} tokens; convert it again"
            )
    double = [text for text, count in Counter(texts).items() if count > 1][:5]
    if double:
        raise ValueError(f"the vocabulary of {path} holds {double} more than once; each id needs its own text")
    return _Tokens(texts, kinds[: len(texts)], scores[: len(texts)])


def _parts(merge: str) -> tuple[str, str]:
    """The two tokens of a merge; a space may only begin the first."""
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _scored(
    metadata: Mapping[str, Any], tokens: _Tokens, added: list[dict[str, Any]], special: SpecialTokens
) -> dict[str, Any]:
    """SentencePiece's BPE: the pair whose piece has the best score is merged first."""
    vocab = {text: i for i, text in enumerate(tokens.texts)}
    all_bytes = [byte_token(value) for value in range(256)]
    missing = [byte for byte in all_bytes if byte not in vocab]
    if missing:
        raise ValueError(
            f"the vocabulary of {special.path} lacks {len(missing)} of 256 byte tokens, first {missing[0]}; "
            "use one with all"
        )
    reserved = {entry["id"] for entry in added} | {vocab[byte] for byte in all_bytes}
    pieces = [None if i in reserved else text for i, text in enumerate(tokens.texts)]
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    return _marking(
        normalizers=[{"type": "Prepend", "prepend": _MARK}] if prefix else [],
        model={
            "vocab": vocab,
            "merges": scored_merges(pieces, tokens.scores),
            "unk_token": tokens.texts[special.ids["unknown"]],
        },
        decoders=[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [],
    ) | {"added_tokens": added, "post_processor": special.processor(adds_bos=True)}


def _byte_pairs(
    pre: PreTokenizer,
    tokens: _Tokens,
    merges: Sequence[tuple[str, str]],
    added: list[dict[str, Any]],
    special: SpecialTokens,
) -> dict[str, Any]:
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens.texts, tokens.kinds, strict=True)) if kind != _UNUSED}
    model = {
        "vocab": vocab,
        "merges": [(a, b) for a, b in merges if a in vocab and b in vocab and a + b in vocab],
        "ignore_merges": pre.whole_words,
    }
    shared = {
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.entries()},
        "post_processor": special.processor(adds_bos=pre.adds_bos),
    }
    if pre.marks_spaces:
        return _marking(normalizers=[], model=model, decoders=[]) | shared
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"} if pre.normal_form else None,
        "decoder": byte_level(split=True),
        "model": {"type": "BPE", "fuse_unk": False, "byte_fallback": False} | model,
    } | shared


def _marking(
    *, normalizers: list[dict[str, Any]], model: dict[str, Any], decoders: list[dict[str, Any]]
) -> dict[str, Any]:
    """The parts of a tokenizer.json that marks spaces by U+2581 and falls back to byte tokens."""
    marking = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
    unmarking = {"type": "Replace", "pattern": {"String": _MARK}, "content": " "}
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [*normalizers, marking]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [unmarking, {"type": "ByteFallback"}, {"type": "Fuse"}, *decoders],
        },
        "model": {"type": "BPE", "fuse_unk": True, "byte_fallback": True} | model,
    }
