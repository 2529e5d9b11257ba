"""A GGUF file's tensors under the names and in the forms of Hugging Face checkpoints, as a family declares them.

llama.cpp's converter renames tensors and changes some; `Undo` turns one of them back.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.families.decoder import half_rotated
from twotower.checkpoints.gguf.reader import GgufFile
from twotower.checkpoints.gguf.rope import FACTOR_TENSORS
from twotower.checkpoints.gguf.tensors import spec_of, values_of
from twotower.checkpoints.hf.tensor_files import TensorSpec

# What makes Hugging Face's tensors of one of the file's: called with the tensor, what its name ends in ("weight",
# "bias" or "") and the config, it gives them by their names in the block. A name alone keeps the tensor.
Undo = str | Callable[[Tensor, str, Mapping[str, Any]], Mapping[str, Tensor]]

_IN_BLOCK = re.compile(r"blk\.(\d+)\.(.*)")


@dataclasses.dataclass(frozen=True)
class NamedTensors:
    """The tensors of a file by Hugging Face's names; a `TensorSource` of families."""

    file: GgufFile
    specs: Mapping[str, TensorSpec]
    made: Callable[[str, Tensor], Mapping[str, Tensor]]

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, each of the file's read once."""
        wanted = set(names)
        for stored in self.file.tensors:
            shape = torch.empty(self.file.tensors[stored].shape, device="meta")
            if stored not in FACTOR_TENSORS and wanted.intersection(self.made(stored, shape)):
                for name, tensor in self.made(stored, values_of(self.file.tensors[stored])).items():
                    if name in wanted:
                        yield name, tensor


def named_tensors(
    file: GgufFile, raw: Mapping[str, Any], block: Mapping[str, Undo], rest: Mapping[str, Undo], layers: str
) -> NamedTensors:
    """Those of a file whose config is `raw`. Tensors that no name is declared for keep theirs, so that the family
    reports them."""

    def made(stored: str, tensor: Tensor) -> dict[str, Tensor]:
        inside = _IN_BLOCK.fullmatch(stored)
        stem, _, suffix = (stored if inside is None else inside[2]).partition(".")
        undo = (rest if inside is None else block).get(stem)
        if undo is None:
            return {stored: tensor}
        ending = f".{suffix}" if suffix else ""
        found = undo(tensor, suffix, raw) if callable(undo) else {undo + ending: tensor}
        prefix = "" if inside is None else f"{layers}.{inside[1]}."
        return {prefix + name: value for name, value in found.items()}

    specs = {}
    for stored, tensor in file.tensors.items():
        if stored not in FACTOR_TENSORS:
            dtype, shape = spec_of(tensor)
            for name, value in made(stored, torch.empty(shape, dtype=dtype, device="meta")).items():
                specs[name] = TensorSpec(value.dtype, tuple(value.shape))
    return NamedTensors(file, specs, made)


def turned(name: str, heads: str) -> Undo:
    """Rows that the converter has reordered so that RoPE turns neighbours. `heads` is the config's key for their
    number."""

    def undo(tensor: Tensor, suffix: str, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        count = raw[heads]
        return {f"{name}.{suffix}": half_rotated(tensor, count, tensor.shape[0] // count)}

    return undo


def less_one(name: str) -> Undo:
    """A norm to whose weight the converter has added the 1 that the model adds. The difference is exact to the last
    digit of the sum, so that adding 1 again gives the file's number."""
    return lambda tensor, suffix, raw: {f"{name}.{suffix}": tensor - 1 if suffix == "weight" else tensor}


def transposed(name: str) -> Undo:
    """A matrix that the model stores inputs first."""
    return lambda tensor, suffix, raw: {f"{name}.{suffix}": tensor.t() if tensor.ndim == 2 else tensor}


def side_by_side(name: str) -> Undo:
    """Queries, keys and values one after the other, which the model stores head by head."""

    def undo(tensor: Tensor, suffix: str, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        parts = tensor.unflatten(0, (3, raw["num_attention_heads"], -1))
        return {f"{name}.{suffix}": parts.transpose(0, 1).flatten(0, 2)}

    return undo


def whole(name: str) -> Undo:
    """A tensor whose name in the model ends in neither "weight" nor "bias"."""
    return lambda tensor, suffix, raw: {name: tensor}


def row(name: str) -> Undo:
    """A matrix of one row, which some files store as a vector."""
    return lambda tensor, suffix, raw: {f"{name}.{suffix}": tensor.reshape(1, -1)}


def each(pattern: str) -> Undo:
    """A stack whose rows the model stores one by one, under `pattern` with their number."""

    def undo(tensor: Tensor, suffix: str, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        return {f"{pattern.format(i)}.{suffix}": row for i, row in enumerate(tensor)}

    return undo
