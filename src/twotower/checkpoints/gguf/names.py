"""A GGUF file's tensors under the names and in the forms of Hugging Face checkpoints, as a family declares them.

llama.cpp's converter renames tensors and changes some; `Undo` turns one of them back.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower.checkpoints.families.decoder import half_rotated
from twotower.checkpoints.gguf.reader import GgufFile
from twotower.checkpoints.gguf.rope import FACTOR_TENSORS
from twotower.checkpoints.gguf.tensors import spec_of, values_of
from twotower.checkpoints.hf.tensor_files import TensorSpec

# What makes Hugging Face's tensors of one of the file's: called with the tensor, what its name ends in ("weight",
# "bias" or "") and the config, it gives them by their names in the block. A name alone keeps the tensor.
Made = Mapping[str, Tensor]
Change = Callable[[Tensor, str, Mapping[str, Any]], Made]


class Joined(NamedTuple):
    """What makes Hugging Face's tensors of two of a block's, of which the other has the name `other`; it is called with
    both and the config."""

    other: str
    undo: Callable[[Tensor, Tensor, Mapping[str, Any]], Made]


Undo = str | Change | Joined

_IN_BLOCK = re.compile(r"blk\.(\d+)\.(.*)")


def blocks(file: GgufFile, stem: str = "") -> list[int]:
    """The numbers of the blocks that have tensors, or a tensor of this name, in order."""
    found = (_IN_BLOCK.fullmatch(name) for name in file.tensors)
    return sorted({int(match[1]) for match in found if match and stem in ("", match[2].partition(".")[0])})


@dataclasses.dataclass(frozen=True)
class NamedTensors:
    """The tensors of a file by Hugging Face's names; a `TensorSource` of families. `stored` has the name in the file
    of each; those that are not there are `given`, made of the metadata."""

    file: GgufFile
    specs: Mapping[str, TensorSpec]
    stored: Mapping[str, str]
    made: Callable[[str, Tensor], Made]
    given: Made

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, each of the file's read once."""
        wanted = set(names)
        sources = dict.fromkeys(stored for name, stored in self.stored.items() if name in wanted)
        for stored in sources:
            for name, tensor in self.made(stored, values_of(self.file.tensors[stored])).items():
                if name in wanted and self.stored[name] == stored:
                    yield name, tensor
        yield from ((name, tensor) for name, tensor in self.given.items() if name in wanted)


def named_tensors(
    file: GgufFile,
    raw: Mapping[str, Any],
    block: Mapping[str, Undo],
    rest: Mapping[str, Undo],
    layers: str,
    given: Made,
) -> NamedTensors:
    """Those of a file whose config is `raw`. Tensors that no name is declared for keep theirs, so that the family
    reports them. Of two that make the same tensor the first counts. Raises ValueError, naming it, for a tensor that
    can't be what it is called."""

    def made(stored: str, tensor: Tensor) -> dict[str, Tensor]:
        inside = _IN_BLOCK.fullmatch(stored)
        if inside is not None and int(inside[1]) >= raw["num_hidden_layers"]:
            return {f"mtp.{stored}": tensor}  # predicts further tokens
        stem, _, suffix = (stored if inside is None else inside[2]).partition(".")
        undo = (rest if inside is None else block).get(stem)
        ending = f".{suffix}" if suffix else ""
        try:
            if undo is None:
                return {stored: tensor}
            if isinstance(undo, str):
                found: Made = {undo + ending: tensor}
            elif isinstance(undo, Joined):
                found = undo.undo(tensor, _beside(file, stored, stem, undo.other, tensor.is_meta), raw)
            else:
                found = undo(tensor, suffix, raw)
        except (ValueError, RuntimeError, IndexError) as error:  # PyTorch's of shapes that don't fit
            shape = tuple(tensor.shape)
            raise ValueError(f"tensor {stored} of {file.path} with the shape {shape} doesn't fit: {error}") from error
        prefix = "" if inside is None else f"{layers}.{inside[1]}."
        return {prefix + name: value for name, value in found.items()}

    specs = {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in given.items()}
    sources: dict[str, str] = {}
    for stored, tensor in file.tensors.items():
        if stored not in FACTOR_TENSORS:
            dtype, shape = spec_of(tensor)
            for name, value in made(stored, torch.empty(shape, dtype=dtype, device="meta")).items():
                if sources.setdefault(name, stored) == stored:
                    specs[name] = TensorSpec(value.dtype, tuple(value.shape))
    return NamedTensors(file, specs, sources, made, given)


def _beside(file: GgufFile, stored: str, stem: str, other: str, is_meta: bool) -> Tensor:
    name = stored.replace(f".{stem}.", f".{other}.")
    if name not in file.tensors:
        raise ValueError(f"{name}, which belongs to it, is missing")
    dtype, shape = spec_of(file.tensors[name])
    return torch.empty(shape, dtype=dtype, device="meta") if is_meta else values_of(file.tensors[name])


def nothing(tensor: Tensor, suffix: str, raw: Mapping[str, Any]) -> Made:
    """A tensor that the model hasn't, or that another makes with it."""
    return {}


def turned(name: str, heads: str) -> Undo:
    """Rows that the converter has reordered so that RoPE turns neighbours. `heads` is the config's key for their
    number."""

    def undo(tensor: Tensor, suffix: str, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        count = raw[heads]
        return {f"{name}.{suffix}": half_rotated(tensor, count, tensor.shape[0] // count)}

    return undo


def fused(*undos: Undo) -> Undo:
    """Queries, keys and values one after the other, as the converter writes them if it is told to."""

    def undo(tensor: Tensor, suffix: str, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        kv = raw["num_key_value_heads"] * raw["head_dim"]
        found: dict[str, Tensor] = {}
        for each_undo, part in zip(undos, tensor.split([tensor.shape[0] - 2 * kv, kv, kv]), strict=True):
            assert not isinstance(each_undo, Joined)
            found |= {f"{each_undo}.{suffix}": part} if isinstance(each_undo, str) else each_undo(part, suffix, raw)
        return found

    return undo


def less_one(name: str) -> Undo:
    """A norm to whose weight the converter has added the 1 that the model adds. The difference is exact to the last
    digit of the sum, so that adding 1 again gives the file's number."""
    return lambda tensor, suffix, raw: {f"{name}.{suffix}": tensor - 1 if suffix == "weight" else tensor}


def flat(name: str, *, suffixed: bool = True) -> Undo:
    """A vector that the file has as a matrix."""
    return lambda tensor, suffix, raw: {f"{name}.{suffix}" if suffixed else name: tensor.flatten()}


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
