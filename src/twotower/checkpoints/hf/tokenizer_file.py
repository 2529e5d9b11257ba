"""tokenizer.json, and the files beside it that a derived checkpoint keeps."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from twotower.checkpoints.hf.calibration_file import CALIBRATION_FILE
from twotower.checkpoints.hf.config_file import read_object
from twotower.checkpoints.hf.hub import refuse_pointer, resolve
from twotower.checkpoints.hf.ngrams_file import NGRAMS_FILE
from twotower.checkpoints.hf.special_tokens import TOKENIZER_CONFIG_FILE, read_added_tokens, read_special_tokens
from twotower.checkpoints.hf.tokenizer_sources import TOKENIZER_SOURCES, converted, usual_ends
from twotower.checkpoints.vocabulary import added_token, ends_processor, fit, normal_form

TOKENIZER_FILE = "tokenizer.json"
# What trained the weights, as `twotower train` writes it
TRAINING_FILE = "training.json"

# In transformers' order
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CARRIED_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    NGRAMS_FILE,
)
_TEMPLATE_FOLDER = "additional_chat_templates"


def load_tokenizer(path: str | Path, num_rows: int | None = None) -> tokenizers.Tokenizer | None:
    """The tokenizer of a checkpoint directory or hub id; None if it has no tokenizer.json.

    It encodes whole texts: truncation and padding, which a file may keep from the call that saved it, are turned off.
    Added tokens that have no row in an embedding of `num_rows` are left out, see `vocabulary.fit`. Raises ValueError
    for a file that is not a tokenizer, or is another model's.
    """
    file = resolve(path) / TOKENIZER_FILE
    if not file.exists():
        return None
    text = _checked_text(file)
    tokenizer = tokenizers.Tokenizer.from_str(text)
    if num_rows is not None and max(tokenizer.get_vocab().values(), default=0) >= num_rows:
        tokenizer = tokenizers.Tokenizer.from_str(fit(text, num_rows).tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer_text(directory: Path) -> str | None:
    """The content of a tokenizer.json for a single-tower model's directory, None if it has no tokenizer.

    It is the directory's own, or made of the files that have the tokenizer in another form, with the added tokens and
    the tokens around each text that the files beside it say, as transformers reads them. Raises ValueError for a broken
    file and for a tokenizer that can't be expressed exactly.
    """
    file = directory / TOKENIZER_FILE
    settings = read_object(directory / TOKENIZER_CONFIG_FILE)
    added, named = read_added_tokens(directory), read_special_tokens(directory)
    text = _checked_text(file) if file.exists() else ""
    raw = json.loads(text) if text else converted(directory, settings, added)
    if raw is None:
        return None
    special = [added_token(-1, named[kind], special=True) for kind in _SPECIAL if kind in named]
    changed = _add(raw, [*added.values(), *special], directory)
    if not text:  # a tokenizer.json says itself what comes around a text
        _set_ends(raw, settings, usual_ends(raw) | named)
    return normal_form(raw) if changed or not text else text


def carried_documents(directory: Path) -> dict[str, bytes]:
    """A checkpoint directory's chat templates, tokenizer settings, sampling defaults and n-grams, name -> content: the
    files that a checkpoint made from this one keeps unchanged."""
    return {name: (directory / name).read_bytes() for name in _present(directory, _CARRIED_FILES)}


def replaced_files(directory: Path) -> list[str]:
    """The names of files in a directory, beside the weights and config.json, from which a checkpoint there is read or
    that say how it was trained, and which a new one in their place must not keep."""
    return _present(directory, (TOKENIZER_FILE, CALIBRATION_FILE, TRAINING_FILE, *_CARRIED_FILES, *TOKENIZER_SOURCES))


def _present(directory: Path, names: Iterable[str]) -> list[str]:
    templates = sorted(directory.glob(f"{_TEMPLATE_FOLDER}/*.jinja"))
    named = [name for name in names if (directory / name).is_file()]
    return named + [f"{_TEMPLATE_FOLDER}/{file.name}" for file in templates]


def _checked_text(file: Path) -> str:
    refuse_pointer(file)
    text = file.read_text(encoding="utf-8", errors="replace")
    # The library raises a bare Exception for a broken file; these are the ways in which a file is usually broken.
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict) or "vocab" not in raw["model"]:
        raise ValueError(f"{file} has no model with a vocabulary; download the repository's tokenizer.json again")
    return text


def _add(raw: dict[str, Any], tokens: Sequence[Mapping[str, Any]], directory: Path) -> bool:
    """Adds tokens to the content of a tokenizer.json, or changes their flags, and tells whether it did.

    As in transformers, a token has its id from the vocabulary or else its own; one without either, -1, or whose id is
    another token's, gets the next. Raises ValueError for ids that a unigram vocabulary can't have.
    """
    before = json.dumps(raw["added_tokens"])
    vocab = raw["model"]["vocab"]
    places = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    listed = {token["content"]: token for token in raw["added_tokens"]}
    places |= {name: token["id"] for name, token in listed.items()}
    names = {i: name for name, i in places.items()}
    for token in tokens:
        name = token["content"]
        if name in listed and token["id"] == -1:
            continue
        i = places.get(name, token["id"])
        if i == -1 or names.get(i, name) != name:
            i = max(places.values()) + 1
        names[i] = name
        places[name] = i
        listed[name] = {**token, "id": i}
    raw["added_tokens"] = sorted(listed.values(), key=lambda token: token["id"])
    if json.dumps(raw["added_tokens"]) == before:
        return False
    # Unless the vocabulary gives an added token's id, the library numbers it from the vocabulary's size on
    if isinstance(vocab, dict):
        vocab |= {name: token["id"] for name, token in listed.items()}
    else:
        further = [token["id"] for token in raw["added_tokens"] if token["id"] >= len(vocab)]
        if further != list(range(len(vocab), len(vocab) + len(further))):
            raise ValueError(f"{directory} leaves out ids before its added tokens {further}; download a tokenizer.json")
    return True


def _set_ends(raw: dict[str, Any], settings: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Puts BOS before and EOS behind every text if tokenizer_config.json says so, or neither if it says that."""
    if "add_bos_token" not in settings and "add_eos_token" not in settings:
        return
    ids = {token["content"]: token["id"] for token in raw["added_tokens"]}
    ends = [
        (ids[named[end]], named[end]) if settings.get(f"add_{end}") and named.get(end) in ids else None
        for end in ("bos_token", "eos_token")
    ]
    raw["post_processor"] = None if ends == [None, None] else ends_processor(ends[0], ends[1])
