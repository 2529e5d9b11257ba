"""A two-tower checkpoint from a single-tower model: both towers are the backbone, and step 0 computes it exactly."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower.checkpoints.backbone import Backbone
from twotower.checkpoints.families.llama import MODEL_TYPES, open_llama
from twotower.checkpoints.families.nemotron_h import open_nemotron_h, read_raw_config
from twotower.checkpoints.gguf.model import MAGIC, open_gguf
from twotower.checkpoints.hf import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    carried_documents,
    config_bytes,
    released_shapes,
    resolve,
    with_stored_dtype,
)
from twotower.checkpoints.llama2c import open_llama2c
from twotower.checkpoints.tensor_files import TensorSpec, check_shapes
from twotower.checkpoints.tensor_writer import write_tensors
from twotower.checkpoints.vocabulary import append_mask, trim
from twotower.config import TwoTowerConfig

_ROW_TENSORS = ("embeddings.weight", "lm_head.weight")
_TIME_INIT_STD = 0.02


class _Vocabulary(NamedTuple):
    """Which old row each new row of the embedding and the head is (None: all as they are), and what follows."""

    rows: tuple[int, ...] | None
    changes: dict[str, Any]
    tokenizer: str | None


def init_two_tower(
    backbone: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    mask_token_id: int | None = None,
    block_size: int = 16,
    keep_tokens: Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """Writes the two-tower checkpoint directory `out` from a single-tower model, one tensor at a time.

    `backbone` is a directory or hub id of the Nemotron-H or Llama family, a GGUF file or a llama2.c file. `dtype` None
    keeps each tensor's stored dtype. The mask token is `mask_token_id`, else the one the family keeps free, else a new
    last row that starts as a copy of row 0. `keep_tokens` cuts the vocabulary down, see `vocabulary.trim`; the mask
    then follows the special tokens. Only the time embedder is random, from `seed`: with scale and shift 0 and gate 1
    everywhere, and nothing added to them by the zero last layer, the denoiser starts as its backbone.
    """
    source = open_backbone(backbone)
    out = Path(out)
    if out.exists() and Path(backbone).exists() and out.samefile(backbone):
        raise ValueError(f"out is {out}, the backbone's own directory; give another, the backbone would be overwritten")
    check_shapes(_tower_shapes(source.config), source.specs, str(backbone))
    vocabulary = _vocabulary(source, mask_token_id, keep_tokens)
    config = dataclasses.replace(source.config, block_size=block_size, **vocabulary.changes)
    model_dtype = dtype or source.specs["embeddings.weight"].dtype
    config = with_stored_dtype(config, model_dtype)
    specs = _specs(config, source, dtype, model_dtype)
    # Where tokens are renumbered, tokenizer settings that name ids would name others.
    documents = {n: c for n, c in source.documents.items() if keep_tokens is None or n.endswith(".jinja")}
    if vocabulary.tokenizer is not None:
        documents[TOKENIZER_FILE] = vocabulary.tokenizer.encode()
    documents[CONFIG_FILE] = config_bytes(config)
    write_tensors(out, specs, _tensors(source, vocabulary.rows, specs, seed), documents=documents)


def open_backbone(backbone: str | Path) -> Backbone:
    """Opens a single-tower model by what it is; raises ValueError for what it can't be."""
    path = Path(backbone)
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        return open_gguf(path) if is_gguf else open_llama2c(path)
    directory = resolve(backbone)
    raw = read_raw_config(directory)
    documents = carried_documents(directory)
    model_type = raw.get("model_type")
    if model_type == "nemotron_h":
        return open_nemotron_h(directory, raw, documents)
    if model_type in MODEL_TYPES:
        return open_llama(directory, raw, documents)
    raise ValueError(f"{directory} has model_type {model_type!r}, must be one of {['nemotron_h', *MODEL_TYPES]}")


def _vocabulary(source: Backbone, mask_token_id: int | None, keep_tokens: Sequence[int] | None) -> _Vocabulary:
    size = source.config.vocab_size
    if keep_tokens is not None:
        if mask_token_id is not None:
            raise ValueError(f"mask_token_id is {mask_token_id}, must be left out with keep_tokens, which places it")
        return _trimmed(source, keep_tokens)
    mask_token_id = source.mask_token_id if mask_token_id is None else mask_token_id
    if mask_token_id is not None:
        if not 0 <= mask_token_id < size:
            raise ValueError(f"mask_token_id is {mask_token_id}, must be in [0, {size}); leave it out for a new token")
        return _Vocabulary(None, {"mask_token_id": mask_token_id}, source.tokenizer)
    tokenizer = None if source.tokenizer is None else append_mask(source.tokenizer, size)
    return _Vocabulary((*range(size), 0), {"mask_token_id": size, "vocab_size": size + 1}, tokenizer)


def _trimmed(source: Backbone, keep_tokens: Sequence[int]) -> _Vocabulary:
    if source.tokenizer is None:
        raise ValueError("keep_tokens needs the model's tokenizer, and it has none; put it beside the weights")
    trimmed = trim(source.tokenizer, keep_tokens)
    config = source.config
    changes: dict[str, Any] = {"mask_token_id": trimmed.mask_token_id, "vocab_size": len(trimmed.rows)}
    if config.bos_token_id is not None:
        changes["bos_token_id"] = trimmed.new_id(config.bos_token_id)
    if config.eos_token_id is not None:
        ends = tuple(trimmed.new_id(i) for i in config.eos_token_ids)
        changes["eos_token_id"] = ends if isinstance(config.eos_token_id, tuple) else ends[0]
    # Not read anywhere; an old id left in it would name another token.
    changes["carried"] = {key: value for key, value in config.carried.items() if key != "pad_token_id"}
    return _Vocabulary(trimmed.rows, changes, trimmed.tokenizer)


def _tower_shapes(config: TwoTowerConfig) -> dict[str, tuple[int, ...]]:
    shapes = released_shapes(config)
    tower = {n.removeprefix("context_tower."): s for n, s in shapes.items() if n.startswith("context_tower.")}
    return tower | {n: s for n, s in shapes.items() if n == "lm_head.weight"}


def _specs(
    config: TwoTowerConfig, source: Backbone, dtype: torch.dtype | None, model_dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """What is written: the source's dtypes unless one is asked for, the model's for the time modules."""
    specs = {}
    for name, shape in released_shapes(config).items():
        stored = source.specs.get(_tower_name(name))
        # Routers keep their precision: rounding a score's bias changes which experts run.
        keeps = stored is not None and (dtype is None or ".gate." in name)
        specs[name] = TensorSpec(stored.dtype if stored is not None and keeps else model_dtype, shape)
    return specs


def _tower_name(name: str) -> str:
    """A released name without its tower; time modules keep theirs."""
    return name.removeprefix("context_tower.").removeprefix("denoiser_tower.").removeprefix("context_")


def _tensors(
    source: Backbone, rows: tuple[int, ...] | None, specs: Mapping[str, TensorSpec], seed: int
) -> Iterator[tuple[str, Tensor]]:
    index = None if rows is None else torch.tensor(rows)
    for name, tensor in source.stream():
        if index is not None and name in _ROW_TENSORS:
            tensor = tensor[index]
        copies = ("context_lm_head.weight", name) if name == "lm_head.weight" else _in_towers(name)
        for copy in copies:
            yield copy, tensor.to(specs[copy].dtype)
    yield from _time_modules(specs, seed)


def _in_towers(name: str) -> tuple[str, str]:
    return f"context_tower.{name}", f"denoiser_tower.{name}"


def _time_modules(specs: Mapping[str, TensorSpec], seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, (dtype, shape) in specs.items():
        if not name.startswith(("t_embedder.", "t_block.", "scale_shift_tables.")):
            continue
        value = torch.zeros(shape)
        if name.startswith("scale_shift_tables."):
            value[2] = 1  # rows: shift, scale, gate
        elif name.startswith("t_embedder.") and name.endswith(".weight"):
            value.normal_(0, _TIME_INIT_STD, generator=generator)
        yield name, value.to(dtype)
