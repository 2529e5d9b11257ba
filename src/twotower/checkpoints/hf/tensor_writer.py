"""Writing a checkpoint directory's safetensors files one tensor at a time, and renaming them when all are complete.

The `safetensors` package can only write a file whose tensors are all in memory. The format is simple: 8 bytes of header
length, a JSON header, the tensors' bytes. Tests compare the files with those that the package writes.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.checkpoints.hf.tensor_files import INDEX_FILE, SINGLE_FILE, STORED_DTYPES, TensorSpec
from twotower.errors import SettingError

DEFAULT_SHARD_BYTES = 5_000_000_000

_STAGING = ".incomplete"
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_STORED_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


class _Span(NamedTuple):
    file: Path
    offset: int


def write_tensors(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    documents: Mapping[str, bytes] | None = None,
    replaced: Iterable[str] = (),
) -> None:
    """Writes `model.safetensors`, or shards and an index if the tensors take more than `max_shard_bytes`.

    `specs` lists every tensor, in the order in which shards are filled. `tensors` may come in any order, each exactly
    once, and are consumed one at a time. `documents` are further files, name -> content, and are put in place after the
    weights, in their order; `replaced` are names of files in `path` that are deleted with the old weights. Everything
    is written into a temporary folder first, so that after an error `path` holds what it held before. Raises ValueError
    if `tensors` are not those of `specs`.
    """
    if max_shard_bytes < 1:
        raise SettingError("max_shard_bytes", max_shard_bytes, "at least 1")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    staging = path / _STAGING
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
    staging.mkdir()
    try:
        places = _allocate(staging, specs, max_shard_bytes)
        _fill(places, specs, tensors)
        for name, content in (documents or {}).items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content)
        _publish(staging, path, list(documents or {}), list(replaced))
    finally:
        shutil.rmtree(staging)


def _allocate(staging: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> dict[str, _Span]:
    """Creates the files with their headers and full length; returns the place of each tensor's bytes."""
    shards = _split(specs, max_shard_bytes)
    places: dict[str, _Span] = {}
    for i, names in enumerate(shards, start=1):
        file = staging / (SINGLE_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors")
        places |= _create(file, {name: specs[name] for name in names})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_num_bytes(spec) for spec in specs.values())},
            "weight_map": {name: places[name].file.name for name in specs},
        }
        (staging / INDEX_FILE).write_text(json.dumps(index, indent=1))
    return places


def _split(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """The names in each shard, filled in the order of `specs` as transformers does; a tensor larger than a shard gets
    one of its own."""
    shards: list[list[str]] = []
    current: list[str] = []
    used = 0
    for name, spec in specs.items():
        size = _num_bytes(spec)
        if size > max_shard_bytes:
            shards.append([name])
            continue
        if used + size > max_shard_bytes:
            shards.append(current)
            current, used = [], 0
        current.append(name)
        used += size
    return [*shards, current] if current or not shards else shards


def _create(file: Path, specs: Mapping[str, TensorSpec]) -> dict[str, _Span]:
    """Creates a file with the header that the safetensors library would write: widest dtype first, then by name."""
    widths = list(STORED_DTYPES.values())
    ordered = sorted(specs, key=lambda name: (widths.index(specs[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = {}
    end = 0
    for name in ordered:
        spec = specs[name]
        starts[name], end = end, end + _num_bytes(spec)
        offsets = [starts[name], end]
        header[name] = {"dtype": _STORED_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with file.open("wb") as f:
        f.write(len(encoded).to_bytes(8, "little") + encoded)
        f.truncate(8 + len(encoded) + end)
    return {name: _Span(file, 8 + len(encoded) + start) for name, start in starts.items()}


def _fill(places: Mapping[str, _Span], specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    waiting = set(specs)
    for name, tensor in tensors:
        if name not in waiting:
            raise ValueError(f"tensor {name} was given twice or is not announced; give each announced tensor once")
        given = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if given != specs[name]:
            raise ValueError(f"tensor {name} is {given}, was announced as {specs[name]}; give what was announced")
        waiting.remove(name)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with places[name].file.open("r+b") as f:
            f.seek(places[name].offset)
            f.write(content.data)
    if waiting:
        raise ValueError(f"tensors {sorted(waiting)} were announced and not given; give every announced tensor")


def _publish(staging: Path, path: Path, documents: list[str], replaced: list[str]) -> None:
    """Moves the staged files in place, after deleting the old ones, the last document first. If it is interrupted, the
    directory lacks that document or weights, so that nobody takes it for complete."""
    weights_there = [file.name for file in path.iterdir() if _WEIGHT_FILE.fullmatch(file.name)]
    for name in [*reversed(documents), *replaced, INDEX_FILE, *weights_there]:
        (path / name).unlink(missing_ok=True)
    weights = sorted(file.name for file in staging.iterdir() if _WEIGHT_FILE.fullmatch(file.name))
    index = [INDEX_FILE] if (staging / INDEX_FILE).exists() else []
    for name in [*weights, *index, *documents]:
        (path / name).parent.mkdir(exist_ok=True)
        os.replace(staging / name, path / name)


def _num_bytes(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize
