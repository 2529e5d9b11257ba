"""Cutting a two-tower checkpoint's denoiser down to some of its layers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from twotower.checkpoints.denoiser_layers import chosen_layers
from twotower.checkpoints.hf.config_file import CONFIG_FILE, config_bytes, with_stored_dtype
from twotower.checkpoints.hf.hub import resolve
from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.checkpoints.hf.tensor_writer import write_tensors
from twotower.checkpoints.hf.tokenizer_file import (
    TOKENIZER_FILE,
    carried_documents,
    read_tokenizer_text,
    replaced_files,
)
from twotower.checkpoints.hf.two_towers import open_two_towers, released_shapes


def cut(
    checkpoint: str | Path,
    out: Path,
    denoiser_layers: str | Sequence[int],
    *,
    dtype: torch.dtype | None,
    block_size: int | None,
) -> None:
    """Writes the checkpoint directory `out`: the given one with a denoiser of fewer layers, one tensor at a time.

    The layers that stay, and all other tensors, are those of the checkpoint, rounded to `dtype` (routers keep theirs;
    None keeps all). `denoiser_layers` is explained at `chosen_layers`; `block_size` None keeps the checkpoint's. Raises
    what `init` raises.
    """
    directory = resolve(checkpoint)
    config, files = open_two_towers(directory)
    config = dataclasses.replace(
        config,
        denoiser_layers=chosen_layers(config, denoiser_layers),
        block_size=config.block_size if block_size is None else block_size,
    )
    if dtype is not None:
        config = with_stored_dtype(config, dtype)
    specs = {
        # Routers keep their precision: rounding a score's bias changes which experts run.
        name: TensorSpec(files.specs[name].dtype if dtype is None or ".gate." in name else dtype, shape)
        for name, shape in released_shapes(config).items()
    }
    documents = carried_documents(directory)
    tokenizer = read_tokenizer_text(directory)
    if tokenizer is not None:
        documents[TOKENIZER_FILE] = tokenizer.encode()
    documents[CONFIG_FILE] = config_bytes(config)
    tensors = ((name, tensor.to(specs[name].dtype)) for name, tensor in files.stream(specs))
    write_tensors(out, specs, tensors, documents=documents, replaced=replaced_files(out))
