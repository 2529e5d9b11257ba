"""Reading the headers of GGUF files, of a model in one file or split into several.

The `gguf` package's own reader trusts the counts in a file: one that claims 2^60 entries fills the memory. Here nothing
is read or made before it is known to lie inside the file.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
# The largest number that llama.cpp keeps of a count.
MOST = 2**31 - 1

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class StoredTensor(NamedTuple):
    """Where a tensor's bytes lie. `shape` counts from the outermost dimension, as PyTorch does."""

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A model as its GGUF headers describe it. `path` is the file that was asked for; the metadata of a split model is
    that of its first file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, which also begins the keys of its settings; empty without one."""
        return str(self.metadata.get("general.architecture", ""))

    def setting(self, key: str, default: Any = None) -> Any:
        """The architecture's setting `key`, such as "block_count", of whatever type it is."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None, *, least: int = 0, most: int = MOST) -> int:
        """A whole number in [least, most]. Of an array with an entry for each layer, all that are not 0 must be equal.

        Raises ValueError, naming file and key, for anything else, and for a missing key without a default.
        """
        value = self.setting(key, default)
        if isinstance(value, list):
            used = {entry for entry in value if entry != 0} or {0}
            if len(used) > 1:
                raise self.wrong(key, "the same for all layers that have any", "our layers are of one size")
            value = used.pop()
        if value is None or type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"a whole number in [{least}, {most}]")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as the shortest decimal that is this float32: the number in the model's config.json.

        Raises ValueError, naming file and key, for anything else, and for a missing key without a default.
        """
        value = self.setting(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, "a finite number")
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool) -> bool:
        """True or false; raises ValueError, naming file and key, for anything else."""
        value = self.setting(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def wrong(self, key: str, rule: str, fix: str = "take another file") -> ValueError:
        """What to raise where the architecture's setting `key` breaks a rule."""
        name = f"{self.architecture}.{key}"
        found = f"{name} {shown(self.metadata[name])}" if name in self.metadata else f"no {name}"
        return ValueError(f"{self.path} has {found}, must be {rule}; {fix}")


def shown(value: object) -> str:
    """A value of the metadata as an error names it, not longer than a line."""
    most = 8 if isinstance(value, list) else 60
    if not isinstance(value, list | str) or len(value) <= most:
        return repr(value)
    return f"{value[:most]!r} and so on, {len(value)} entries"


def read_gguf(path: Path) -> GgufFile:
    """Reads the headers of a GGUF file, and of the others if it is one part of a split model.

    Raises FileNotFoundError for a missing part, ValueError, naming file and tensor, for a file that is broken or
    incomplete, and ImportError without the `gguf` package.
    """
    metadata: Mapping[str, Any] = {}
    tensors: dict[str, StoredTensor] = {}
    for number, part in enumerate(_parts(path)):
        header = _Header(part)
        if number == 0:
            metadata = header.metadata
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise ValueError(f"tensor {name} is in both {tensors[name].path} and {part}; download the parts again")
            tensors[name] = tensor
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ValueError(f"the parts of {path} hold {len(tensors)} tensors, must be {total}; download them again")
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _parts(path: Path) -> list[Path]:
    """All files of a split model, given any of them."""
    metadata = _Header(path).metadata
    count, own = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if type(count) is not int or type(own) is not int:
        raise ValueError(f"{path} has split.count {shown(count)} and split.no {shown(own)}, must be whole numbers")
    if count == 1:
        return [path]
    name = _PART.fullmatch(path.name)
    if name is None or int(name[2]) != own + 1 or int(name[3]) != count:
        raise ValueError(
            f"{path} is part {own + 1} of {count}; rename it to NAME-{own + 1:05}-of-{count:05}.gguf, as the others are"
        )
    parts = [path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FileNotFoundError(f"{path} is one of {count} parts and {names} is not beside it; download all of them")
    return parts


class _Header:
    """One file's metadata and the places of its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        with path.open("rb") as file:
            if file.seek(0, 2) < 24:
                raise ValueError(f"{path} has fewer than 24 bytes, is not a complete GGUF file; download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._data = data
                self._size = len(data)
                num_tensors, num_keys = self._opening()
                self.metadata = self._metadata(num_keys)
                self.tensors = self._tensors(num_tensors)
                del self._data

    def _broken(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is not a complete GGUF file ({why}); download it again")

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            raise self._broken(f"{what} ends behind the file's end")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code), what))[0]

    def _string(self, what: str) -> str:
        content = self._bytes(self._number("Q", what), what)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise self._broken(f"{what} is not UTF-8") from error

    def _opening(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata keys."""
        magic = self._bytes(4, "the magic number")
        if magic != MAGIC:
            raise ValueError(f"{self.path} begins with {magic!r}, a GGUF file begins with {MAGIC!r}; give another file")
        version = self._number("I", "the version")
        if version & 0xFFFF == 0:
            raise ValueError(f"{self.path} is big-endian; turn it with the gguf package's gguf-convert-endian")
        if version not in _VERSIONS:
            raise ValueError(f"{self.path} is of GGUF version {version}, must be 2 or 3; convert the model again")
        num_tensors, num_keys = self._number("Q", "the header"), self._number("Q", "the header")
        # A tensor's entry has at least 24 bytes, a key's at least 13.
        if num_tensors * 24 + num_keys * 13 > self._size:
            raise self._broken(f"it claims {num_tensors} tensors and {num_keys} keys, too many for its size")
        return num_tensors, num_keys

    def _metadata(self, num_keys: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number in range(num_keys):
            key = self._string(f"metadata key {number}")
            if key in found:
                raise self._broken(f"it has the metadata key {key} twice")
            found[key] = self._value(self._number("I", key), key)
        return found

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], key)
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            raise self._broken(f"{key} is of the unknown type {kind}")
        entry, count = self._number("I", key), self._number("Q", key)
        if entry in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[entry])
            return list(struct.unpack(f"<{count}{_SCALARS[entry]}", self._bytes(count * width, key)))
        if entry != _STRING:
            raise self._broken(f"{key} is an array of the type {entry}, must be of numbers or strings")
        if count * 8 > self._size - self._at:
            raise self._broken(f"{key} ends behind the file's end")
        return [self._string(key) for _ in range(count)]

    def _tensors(self, num_tensors: int) -> dict[str, StoredTensor]:
        entries = [self._tensor_entry(number) for number in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._broken(f"general.alignment is {alignment}, must be a power of two")
        start = -(-self._at // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        for name, kind, shape, offset, num_bytes in entries:
            if name in found:
                raise self._broken(f"it has the tensor {name} twice")
            if offset % alignment or start + offset + num_bytes > self._size:
                raise self._broken(
                    f"tensor {name} of {num_bytes} bytes lies at {start + offset}, behind the file's {self._size} bytes"
                    if offset % alignment == 0
                    else f"tensor {name} lies at {offset}, not a multiple of {alignment}"
                )
            found[name] = StoredTensor(self.path, name, kind, shape, start + offset, num_bytes)
        return found

    def _tensor_entry(self, number: int) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
        name = self._string(f"tensor {number}")
        what = f"tensor {name}"
        rank = self._number("I", what)
        if rank > _MOST_DIMENSIONS:
            raise self._broken(f"{what} has {rank} dimensions, must be at most {_MOST_DIMENSIONS}")
        # GGUF counts dimensions from the innermost.
        shape = tuple(self._number("Q", what) for _ in range(rank))[::-1]
        if 0 in shape:
            raise self._broken(f"{what} has the shape {shape}, must have entries")
        kind, block, width = _block(self.path, name, self._number("I", what))
        offset = self._number("Q", what)
        if shape and shape[-1] % block:
            raise self._broken(f"{what} has rows of {shape[-1]}, must be a multiple of {block} for {kind.name}")
        return name, kind, shape, offset, math.prod(shape) // block * width


def _block(path: Path, name: str, number: int) -> tuple[GGMLQuantizationType, int, int]:
    """The type of a tensor, the entries of one of its blocks, and the block's bytes."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ImportError("reading GGUF files needs the gguf package; pip install 'twotower[gguf]'") from error
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise ValueError(
            f"tensor {name} of {path} is stored as type {number}, which the installed gguf package does not know; "
            "use another quantisation of the model, or pip install --upgrade gguf"
        ) from error
    return kind, *gguf.GGML_QUANT_SIZES[kind]
