"""The Hugging Face layout: a directory of config.json, safetensors files and tokenizer.json, or the same on the hub."""

from twotower.checkpoints.hf.generation_file import read_config
from twotower.checkpoints.hf.hub import SHIPPED, resolve
from twotower.checkpoints.hf.tokenizer_file import carried_documents, load_tokenizer
from twotower.checkpoints.hf.two_towers import (
    holds_two_towers,
    load_model,
    released_shapes,
    released_stream,
    save,
    save_rounded,
)

__all__ = [
    "SHIPPED",
    "carried_documents",
    "holds_two_towers",
    "load_model",
    "load_tokenizer",
    "read_config",
    "released_shapes",
    "released_stream",
    "resolve",
    "save",
    "save_rounded",
]
