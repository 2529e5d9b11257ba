"""ngrams.npz: the counts of n-grams that come with a checkpoint, for drafts of mode `verified`.

A NumPy archive of the arrays of `NgramTable` and of what they belong to. It is not a safetensors file, because programs
take every one of those in a directory for weights.
"""

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import tokenizers

from twotower.config import TwoTowerConfig
from twotower.model.ngrams import NgramTable

NGRAMS_FILE = "ngrams.npz"
_VERSION = 1
_AGAIN = "make it again with twotower ngrams, or delete it"


def vocabulary_digest(tokenizer: tokenizers.Tokenizer | None) -> str:
    """A fingerprint of which token has which id, "" without a tokenizer."""
    if tokenizer is None:
        return ""
    pairs = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def ngrams_bytes(table: NgramTable, tokenizer: tokenizers.Tokenizer | None) -> bytes:
    """The content of the file; the same table gives the same bytes."""
    out = io.BytesIO()
    np.savez(
        out,
        version=np.array(_VERSION),
        order=np.array(table.order),
        vocab_size=np.array(table.vocab_size),
        vocabulary=np.array(vocabulary_digest(tokenizer)),
        keys=table.keys,
        tokens=table.tokens,
        shares=table.shares,
    )
    return out.getvalue()


def write_ngrams(directory: Path, table: NgramTable, tokenizer: tokenizers.Tokenizer | None) -> Path:
    """Writes the file into a checkpoint's directory, under another name first, and returns its path."""
    file = directory / NGRAMS_FILE
    partial = file.with_suffix(".partial")
    partial.write_bytes(ngrams_bytes(table, tokenizer))
    os.replace(partial, file)
    return file


def read_ngrams(directory: Path, config: TwoTowerConfig, tokenizer: tokenizers.Tokenizer | None) -> NgramTable | None:
    """The counts that a checkpoint's directory has, None without any.

    Raises ValueError for a broken file, one of another version, and one that was made with another vocabulary.
    """
    file = directory / NGRAMS_FILE
    if not file.exists():
        return None
    try:
        content = io.BytesIO(file.read_bytes())  # of a path, a failing load leaves the file open
        if not zipfile.is_zipfile(content):  # NumPy would take it for a pickle, and advise to load that unsafely
            raise zipfile.BadZipFile("no archive of NumPy's")
        content.seek(0)
        with np.load(content) as held:
            arrays = {name: held[name] for name in held.files}
            version, order, vocab_size = (int(arrays[name]) for name in ("version", "order", "vocab_size"))
            keys, tokens, shares = (arrays[name] for name in ("keys", "tokens", "shares"))
            vocabulary = str(arrays["vocabulary"])
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is no file of n-grams ({error}); {_AGAIN}") from error
    if version != _VERSION:
        raise ValueError(f"{file} has version {version}, must be {_VERSION}; {_AGAIN}")
    if vocab_size != config.vocab_size or vocabulary != vocabulary_digest(tokenizer):
        raise ValueError(f"{file} was made with another vocabulary than this checkpoint's; {_AGAIN}")
    dtypes = (keys.dtype == np.uint32, tokens.dtype in (np.uint16, np.uint32), shares.dtype == np.uint8)
    if not all(dtypes) or not keys.shape == tokens.shape == shares.shape or keys.ndim != 1 or order < 2:
        raise ValueError(f"{file} has arrays of other shapes or types than n-grams have; {_AGAIN}")
    if (np.diff(keys.astype(np.int64)) <= 0).any() or (tokens >= vocab_size).any():
        raise ValueError(f"{file} has contexts out of order or tokens beyond the vocabulary; {_AGAIN}")
    return NgramTable(order, vocab_size, keys, tokens, shares)
