"""The tokenizer of a folder as the content of a tokenizer.json, also where it has no such file."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower.checkpoints.hf.config_file import read_object
from twotower.checkpoints.hf.sentencepiece_model import read_sentencepiece, sentencepiece_tokenizer
from twotower.checkpoints.vocabulary import added_token, first_token_processor

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
# Files beside tokenizer.json that a tokenizer is read from
TOKENIZER_SOURCES = (*_SENTENCEPIECE_FILES, "vocab.json", "merges.txt", "tekken.json", "vocab.txt", "added_tokens.json")
# The names that these kinds of tokenizers have for it where no file says one
_BOS, _EOS = "<s>", "</s>"
_GPT2_END = "<|endoftext|>"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# What splits a text into words, by the class that tokenizer_config.json names.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _QWEN2 = ("GPT2Tokenizer", "CodeGenTokenizer"), ("Qwen2Tokenizer",)
# Without that name: the classes that model types have in transformers
_CLASSES = {"gpt2": "GPT2Tokenizer", "opt": "GPT2Tokenizer", "codegen": "CodeGenTokenizer"} | dict.fromkeys(
    ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"
)


def converted(
    directory: Path, settings: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The content of a tokenizer.json made of the other files that a folder has its tokenizer in; None if it has none.

    `settings` is its tokenizer_config.json and `added` are the tokens that it adds. Raises ValueError, which says what
    is missing, for files of which none can be made exactly.
    """
    present = {file.name for file in directory.iterdir()}
    for name in _SENTENCEPIECE_FILES:
        if name in present:
            return _sentencepiece(directory / name, settings, added)
    if "vocab.json" in present or "merges.txt" in present:
        return _byte_level(directory, settings)
    if "tekken.json" in present:
        return _tekken(directory / "tekken.json")
    tiktoken = next((name for name in sorted(present) if name.endswith((".tiktoken", "tiktoken.model"))), None)
    if tiktoken is not None:
        raise ValueError(_no_tiktoken(directory / tiktoken))
    if "vocab.txt" in present:
        raise ValueError(f"{directory / 'vocab.txt'} is a WordPiece vocabulary, which no model here has")
    return None


def usual_ends(raw: Mapping[str, Any]) -> dict[str, str]:
    """What BOS and EOS are called in a converted tokenizer where no file says it."""
    names = {token["content"] for token in raw["added_tokens"]}
    ends = {"bos_token": (_BOS, _GPT2_END), "eos_token": (_EOS, _GPT2_END)}
    return {key: next(name for name in usual if name in names) for key, usual in ends.items() if names & {*usual}}


def _sentencepiece(file: Path, settings: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    with file.open("rb") as opened:
        if _TIKTOKEN_LINE.match(opened.readline(1000)):
            raise ValueError(_no_tiktoken(file))
    model = read_sentencepiece(file)
    # Pieces that were kept free may have got another name
    kept = {piece for i, piece in enumerate(model.pieces) if i not in added}
    renamed = [
        str(added[i]["content"]) if i in added and added[i]["content"] not in kept else piece
        for i, piece in enumerate(model.pieces)
    ]
    model = model._replace(pieces=tuple(renamed))
    # Of what transformers calls legacy, only this is left: which texts get SentencePiece's space before them
    legacy = settings.get("legacy", True)
    if settings.get("add_prefix_space") is False:
        model = model._replace(add_dummy_prefix=False)
    try:
        found = sentencepiece_tokenizer(model, prefix_every_chunk=bool(legacy))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {_with_transformers(file.parent)}") from error
    bos = settings.get("bos_token", _BOS)
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if bos in model.pieces:
        found["post_processor"] = first_token_processor(model.pieces.index(bos), bos)
    return found


def _byte_level(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A byte-level BPE of vocab.json and merges.txt."""
    missing = [name for name in ("vocab.json", "merges.txt") if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory} lacks {missing[0]}, without which its tokenizer can't be read; download it too")
    model_type = read_object(directory / "config.json").get("model_type")
    kind = str(settings.get("tokenizer_class") or _CLASSES.get(str(model_type))).removesuffix("Fast")
    if kind not in (*_GPT2, *_QWEN2):
        raise ValueError(
            f"{directory} has vocab.json and merges.txt but not how its tokenizer, {kind}, splits texts into words; "
            f"download its tokenizer.json, or {_with_transformers(directory)}"
        )
    level = _level(add_prefix_space=bool(settings.get("add_prefix_space", False)), use_regex=kind in _GPT2)
    vocab = read_object(directory / "vocab.json")
    found = _bpe(
        vocab=vocab,
        merges=_merges(directory / "merges.txt"),
        normalizer=None if kind in _GPT2 else {"type": "NFC"},
        pre_tokenizers=[level] if kind in _GPT2 else [_split(_WORDS), level],
    )
    if _GPT2_END in vocab:
        found["added_tokens"] = [added_token(vocab[_GPT2_END], _GPT2_END, special=True)]
    return found


def _merges(file: Path) -> list[list[str]]:
    lines = file.read_text(encoding="utf-8").split("\n")
    merges = [line.rstrip("\r").split(" ") for line in lines if line.strip("\r") and not line.startswith("#version")]
    broken = [merge for merge in merges if len(merge) != 2]
    if broken:
        raise ValueError(f"{file} has the line {' '.join(broken[0])!r}, must have two parts in each; download it again")
    return merges


def _tekken(file: Path) -> dict[str, Any]:
    """Mistral's own form: the bytes of each token in the order in which they are merged, and its special tokens, whose
    ids come first."""
    raw = read_object(file)
    try:
        settings = raw["config"]
        num_special = settings["default_num_special_tokens"]
        kept = raw["vocab"][: settings["default_vocab_size"] - num_special]
        tokens = [base64.b64decode(entry["token_bytes"]) for entry in kept]
        special = {entry["rank"]: entry["token_str"] for entry in raw["special_tokens"]}
        pattern = settings["pattern"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} lacks {error}, without which its tokens can't be read; download a newer one"
        ) from error
    symbols = byte_symbols()
    names = ["".join(symbols[value] for value in token) for token in tokens]
    places = {name: i for i, name in enumerate(names)}
    merges = []
    for name in names:
        cuts = [(name[:i], name[i:]) for i in range(1, len(name)) if name[:i] in places and name[i:] in places]
        merges += sorted(cuts, key=lambda cut: (places[cut[0]], places[cut[1]]))
    found = _bpe(
        vocab={name: i + num_special for name, i in places.items()},
        merges=[list(merge) for merge in merges],
        normalizer=None,
        pre_tokenizers=[_split(pattern), _level(add_prefix_space=False, use_regex=False)],
    )
    found["model"]["ignore_merges"] = True
    named = [special.get(i, f"<SPECIAL_{i}>") for i in range(num_special)]
    found["added_tokens"] = [added_token(i, name, special=True) for i, name in enumerate(named)]
    found["model"]["vocab"] |= {name: i for i, name in enumerate(named)}
    if _BOS in named:
        found["post_processor"] = first_token_processor(named.index(_BOS), _BOS)
    return found


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte, which byte-level vocabularies are written in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(value) if value in plain else chr(next(rest)) for value in range(256)]


def _bpe(
    vocab: Mapping[str, int],
    merges: list[list[str]],
    normalizer: dict[str, Any] | None,
    pre_tokenizers: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": dict(vocab), "merges": merges},
    }


def _level(*, add_prefix_space: bool, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _no_tiktoken(file: Path) -> str:
    return (
        f"{file} is a tiktoken file, which doesn't say how texts are split into words; download the tokenizer.json of "
        f"a repository in Hugging Face's form, or, if transformers knows it, {_with_transformers(file.parent)}"
    )


def _with_transformers(directory: Path) -> str:
    return (
        'make a tokenizer.json with: python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{directory}').save_pretrained('{directory}')\""
    )
