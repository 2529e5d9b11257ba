"""What tokenizer_config.json, special_tokens_map.json and added_tokens.json say about a folder's special tokens."""

from pathlib import Path
from typing import Any

from twotower.checkpoints.hf.config_file import read_object
from twotower.checkpoints.vocabulary import added_token

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"


def read_special_tokens(directory: Path) -> dict[str, str]:
    """The names of special tokens by what they are for, such as `bos_token`. Raises ValueError for a broken file."""
    special = {key: _name(value) for key, value in _both(directory).items() if key.endswith("_token")}
    return {key: value for key, value in special.items() if isinstance(value, str)}


def read_added_tokens(directory: Path) -> dict[int, dict[str, Any]]:
    """The tokens that the folder adds to its vocabulary, as entries of tokenizer.json's `added_tokens`, by their ids.

    They come from tokenizer_config.json's `added_tokens_decoder`, or else from added_tokens.json. Raises ValueError for
    a broken file.
    """
    listed = read_object(directory / TOKENIZER_CONFIG_FILE).get("added_tokens_decoder")
    if listed is not None:
        return {int(i): added_token(int(i), t["content"], special=False) | _flags(t) for i, t in listed.items()}
    more = _both(directory).get("additional_special_tokens") or []
    special = {*read_special_tokens(directory).values(), *(map(_name, more) if isinstance(more, list) else ())}
    found = {}
    for name, i in read_object(directory / ADDED_TOKENS_FILE).items():
        found[i] = added_token(i, name, special=name in special) | {"normalized": name not in special}
    return found


def _both(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json and special_tokens_map.json. transformers reads the second after the first, unless that
    lists all added tokens."""
    config, mapped = (read_object(directory / name) for name in (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE))
    return mapped | config if "added_tokens_decoder" in config else config | mapped


def _flags(token: dict[str, Any]) -> dict[str, bool]:
    # transformers' defaults where a flag is missing
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
    found = {name: bool(token.get(name, default)) for name, default in defaults.items()}
    return found | {"normalized": bool(token.get("normalized", not found["special"]))}


def _name(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
