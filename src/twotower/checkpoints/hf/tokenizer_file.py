"""tokenizer.json, and the files beside it that a derived checkpoint keeps."""

import json
from pathlib import Path

import tokenizers

from twotower.checkpoints.hf.hub import resolve

TOKENIZER_FILE = "tokenizer.json"

_CARRIED_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def load_tokenizer(path: str | Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of a checkpoint directory or hub id; None if it has no tokenizer.json.

    It encodes whole texts: truncation and padding, which a file may keep from the call that saved it, are turned off.
    Raises ValueError for a file that is not a tokenizer.
    """
    file = resolve(path) / TOKENIZER_FILE
    if not file.exists():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    # The library raises a bare Exception for a broken file; these are the ways in which a file is usually broken.
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict) or "vocab" not in raw["model"]:
        raise ValueError(f"{file} has no model with a vocabulary; download the repository's tokenizer.json again")
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer_text(directory: Path) -> str | None:
    """The content of a directory's tokenizer.json, None without one."""
    file = directory / TOKENIZER_FILE
    return file.read_text(encoding="utf-8") if file.exists() else None


def carried_documents(directory: Path) -> dict[str, bytes]:
    """A checkpoint directory's chat template and tokenizer settings, name -> content: the files that a checkpoint made
    from this one keeps unchanged."""
    return {name: (directory / name).read_bytes() for name in _CARRIED_FILES if (directory / name).exists()}
