"""Making a two-tower checkpoint from a single-tower model: both towers start as that model."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower.checkpoints.backbone import Backbone, tower_shapes
from twotower.checkpoints.cut import cut
from twotower.checkpoints.denoiser_layers import chosen_layers
from twotower.checkpoints.families.family import open_family
from twotower.checkpoints.families.known import find_family, text_settings
from twotower.checkpoints.families.nemotron_h import open_nemotron_h
from twotower.checkpoints.gguf.model import open_gguf
from twotower.checkpoints.gguf.reader import MAGIC
from twotower.checkpoints.hf.config_file import (
    CONFIG_FILE,
    as_dtype,
    config_bytes,
    read_raw_config,
    with_stored_dtype,
)
from twotower.checkpoints.hf.float_tensors import has_own_head, open_floats
from twotower.checkpoints.hf.generation_file import GENERATION_FILE, with_generation_ends, without_token_ids
from twotower.checkpoints.hf.hub import resolve
from twotower.checkpoints.hf.ngrams_file import NGRAMS_FILE
from twotower.checkpoints.hf.tensor_files import TensorSpec, check_shapes
from twotower.checkpoints.hf.tensor_writer import write_tensors
from twotower.checkpoints.hf.tokenizer_file import (
    TOKENIZER_FILE,
    carried_documents,
    read_tokenizer_text,
    replaced_files,
)
from twotower.checkpoints.hf.two_towers import holds_two_towers, released_shapes
from twotower.checkpoints.llama2c import open_llama2c
from twotower.checkpoints.vocabulary import append_mask, fit, trim
from twotower.config import TwoTowerConfig
from twotower.errors import SettingError

# The tensors with one row per token of the vocabulary.
_ROW_TENSORS = ("embeddings.weight", "lm_head.weight", "lm_head.bias")
_BLOCK_SIZE = 16
# DiT's initialisation of the time embedder (arXiv 2212.09748).
_TIME_INIT_STD = 0.02


class _Vocabulary(NamedTuple):
    """`rows`: new row i of the embedding and the head is old row rows[i] (None: all stay as they are). `changes` are
    the config's fields that follow from it, `tokenizer` the text of the new tokenizer.json, if any."""

    rows: tuple[int, ...] | None
    changes: dict[str, Any]
    tokenizer: str | None


def init(
    backbone: str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    mask_token_id: int | None = None,
    block_size: int | None = None,
    keep_tokens: Sequence[int] | None = None,
    denoiser_layers: str | Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """Writes the two-tower checkpoint directory `out` from a single-tower model, one tensor at a time.

    Both towers become copies of the model. The time modules are set so that modulation changes nothing (shift and
    scale 0, gate 1, a last layer of zeros, as adaLN-Zero, arXiv 2212.09748), so an untrained denoiser computes exactly
    what the model computes. Only the time embedder is random, drawn from `seed`.

    `backbone` is a directory or hub id of a family in docs/families.md, a GGUF file or a llama2.c file. `dtype`, such
    as "bfloat16" or torch.bfloat16, is what weights are rounded to (routers keep theirs); None keeps each tensor's
    stored dtype. `block_size` is the number of tokens that the denoiser fills at a time, by default 16.
    `mask_token_id` is the id of the token that stands for a masked position; by default the one that the family keeps
    free, else a new last token whose row starts as a copy of row 0. `keep_tokens` cuts the vocabulary down to these
    ids, see `vocabulary.trim`; the mask token then comes after the special tokens. `denoiser_layers` are those of the
    model's layers that the denoiser has, by default all: "first:K", "spread:K", "last:K" or indices, see
    `chosen_layers`.

    `backbone` may be a two-tower checkpoint too. Its denoiser is then cut down to `denoiser_layers`, and all else stays
    as it is; only `dtype` and `block_size` may be given beside them.

    Raises SettingError for a value that is not allowed, and FileNotFoundError or ValueError, naming the file or tensor,
    for a model that cannot be read or that computes something other than these towers do. `out` is complete or as it
    was before.
    """
    dtype = None if dtype is None else as_dtype(dtype)
    out = Path(out)
    if out.exists() and Path(backbone).exists() and out.samefile(backbone):
        raise ValueError(f"out is {out}, the backbone's own directory; give another, the backbone would be overwritten")
    if holds_two_towers(backbone):
        if denoiser_layers is None:
            raise ValueError(
                f"{backbone} holds two towers already; give a single-tower model, or the denoiser_layers "
                "(--denoiser-layers) that are to stay of its denoiser, such as spread:2"
            )
        for name, given, usual in (
            ("mask_token_id", mask_token_id, None),
            ("keep_tokens", keep_tokens, None),
            ("seed", seed, 0),
        ):
            if given != usual:
                raise SettingError(name, given, "left out for a checkpoint of two towers, which keeps its own")
        cut(backbone, out, denoiser_layers, dtype=dtype, block_size=block_size)
        return
    source = open_backbone(backbone)
    if "lm_head.weight" not in source.specs and not source.config.tie_word_embeddings:
        raise ValueError(
            f"{backbone} has no lm_head.weight, and its config.json does not say that the embedding is the head; take "
            "a model with its head, or write tie_word_embeddings: true into config.json if the embedding is the head"
        )
    check_shapes(tower_shapes(source.config), source.specs, str(backbone))
    source = _with_rows(source, backbone)
    if source.skipped:
        names = ", ".join(source.skipped[:3]) + (f" and {len(source.skipped) - 3} more" if source.skipped[3:] else "")
        warnings.warn(
            f"{backbone} has tensors that predict further tokens, see or hear, which are no part of the backbone and "
            f"are left out: {names}",
            stacklevel=2,
        )
    vocabulary = _vocabulary(source, mask_token_id, keep_tokens)
    config = dataclasses.replace(
        source.config,
        block_size=_BLOCK_SIZE if block_size is None else block_size,
        denoiser_layers=None if denoiser_layers is None else chosen_layers(source.config, denoiser_layers),
        **vocabulary.changes,
    )
    model_dtype = dtype or source.specs["embeddings.weight"].dtype
    config = with_stored_dtype(config, model_dtype)
    specs = _specs(config, source, dtype, model_dtype)
    documents = dict(source.documents) if keep_tokens is None else _renumbered(source.documents)
    if vocabulary.tokenizer is not None:
        documents[TOKENIZER_FILE] = vocabulary.tokenizer.encode()
    documents[CONFIG_FILE] = config_bytes(config)
    tensors = _tensors(source, vocabulary.rows, specs, seed)
    write_tensors(out, specs, tensors, documents=documents, replaced=replaced_files(out))


def open_backbone(backbone: str | Path) -> Backbone:
    """Opens a single-tower model: a GGUF file, a llama2.c file, or a directory or hub id of a family that we know.

    Reads headers, and the embedding and head where the config may tie them. Raises FileNotFoundError or ValueError for
    anything else.
    """
    path = Path(backbone)
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        return open_gguf(path) if is_gguf else open_llama2c(path)
    directory = resolve(backbone)
    whole = read_raw_config(directory)
    files, raw = open_floats(directory, whole), text_settings(whole)
    if raw.get("tie_word_embeddings") is not False and has_own_head(files):
        raw = {**raw, "tie_word_embeddings": False}
    tokenizer, documents = read_tokenizer_text(directory), carried_documents(directory)
    documents.pop(NGRAMS_FILE, None)  # a two-tower checkpoint has a vocabulary of its own, with a mask token
    if raw.get("model_type") == "nemotron_h":
        found = open_nemotron_h(raw, files, tokenizer, documents)
    else:
        found = open_family(find_family(raw), raw, files, tokenizer, documents)
    return dataclasses.replace(found, config=with_generation_ends(found.config, directory))


def _renumbered(documents: Mapping[str, bytes]) -> dict[str, bytes]:
    """The documents of a trimmed model, whose tokens have other ids: without those of tokenizer settings."""
    kept = {name: content for name, content in documents.items() if name.endswith(".jinja")}
    if GENERATION_FILE in documents:
        kept[GENERATION_FILE] = without_token_ids(documents[GENERATION_FILE])
    return kept


def _with_rows(source: Backbone, backbone: str | Path) -> Backbone:
    """The model with a tokenizer that encodes no id without a row in the embedding."""
    if source.tokenizer is None:
        return source
    fitted = fit(source.tokenizer, source.config.vocab_size)
    if fitted.left_out:
        names = ", ".join(fitted.left_out[:5])
        warnings.warn(
            f"{len(fitted.left_out)} added tokens of {backbone} have no row in its embedding and are left out of its "
            f"tokenizer: {names}",
            stacklevel=3,
        )
    return dataclasses.replace(source, tokenizer=fitted.tokenizer)


def _vocabulary(source: Backbone, mask_token_id: int | None, keep_tokens: Sequence[int] | None) -> _Vocabulary:
    size = source.config.vocab_size
    if keep_tokens is not None:
        if mask_token_id is not None:
            raise SettingError("mask_token_id", mask_token_id, "left out with keep_tokens, which chooses it")
        return _trimmed(source, keep_tokens)
    mask_token_id = source.mask_token_id if mask_token_id is None else mask_token_id
    if mask_token_id is not None:
        if not 0 <= mask_token_id < size:
            raise SettingError("mask_token_id", mask_token_id, f"in [0, {size})", "leave it out for a new token")
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
    # We never read it, but whoever does would take the old id for another token.
    changes["carried"] = {key: value for key, value in config.carried.items() if key != "pad_token_id"}
    return _Vocabulary(trimmed.rows, changes, trimmed.tokenizer)


def _specs(
    config: TwoTowerConfig, source: Backbone, dtype: torch.dtype | None, model_dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """The tensors to write: in the source's dtypes unless one is asked for, the time modules in the model's."""
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
        in_towers = (f"context_tower.{name}", f"denoiser_tower.{name}")
        for copy in (f"context_{name}", name) if name.startswith("lm_head.") else in_towers:
            if copy not in specs:  # a layer that the denoiser hasn't
                continue
            yield copy, tensor.to(specs[copy].dtype)
    yield from _time_modules(specs, seed)


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
