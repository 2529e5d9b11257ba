import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from twotower.checkpoints import init, load_model
from twotower.checkpoints.gguf.reader import read_gguf

Write = Callable[..., Path]

VALUES: dict[str, Any] = {
    "add_uint8": 200,
    "add_int8": -100,
    "add_uint16": 60000,
    "add_int16": -30000,
    "add_uint32": 4_000_000_000,
    "add_int32": -2_000_000_000,
    "add_uint64": 2**63,
    "add_int64": -(2**62),
    "add_float32": 0.5,
    "add_float64": 0.1,
    "add_bool": True,
    "add_string": "grüße",
}


def add_everything(writer: gguf.GGUFWriter) -> None:
    for name, value in VALUES.items():
        getattr(writer, name)(f"test.{name}", value)
    writer.add_array("test.strings", ["a", "", "日本"])
    writer.add_array("test.numbers", [1, -2, 3])
    writer.add_array("test.floats", [0.5, -1.25])
    writer.add_array("test.flags", [True, False])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.zeros((3, 4, 5), np.float16))


def test_metadata_and_tensors_are_those_of_the_gguf_package(write_metadata: Write) -> None:
    path = write_metadata(add_everything)
    found, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert found.metadata == fields
    assert {f"test.{name}" for name in VALUES} < set(found.metadata)
    assert found.metadata["test.strings"] == ["a", "", "日本"]
    assert list(found.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        ours = found.tensors[tensor.name]
        assert (ours.offset, ours.num_bytes, ours.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))


@pytest.mark.parametrize("part", [0.0005, 0.005, 0.02, 0.5, 0.99, 0.99999])
def test_truncated_file(llama: Any, write: Write, part: float) -> None:
    path = write(llama.model)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=rf"{path}.* is not a complete GGUF file"):
        read_gguf(path)


def test_a_header_cut_anywhere_is_refused(write_metadata: Write) -> None:
    path = write_metadata(add_everything)
    content = path.read_bytes()
    for length in range(0, len(content) - 150, 11):  # the tensors' data are the last 24 + 8 + 120 bytes
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="GGUF"):
            read_gguf(path)


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _file(*, tensors: bytes = b"", num_tensors: int = 0, keys: bytes = b"", num_keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + keys + tensors + bytes(64)


HUGE = 2**60
TENSOR = _string(b"blk.0.ffn_up.weight") + struct.pack("<IQQ", 2, 32, 32)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (_file(num_tensors=HUGE), "it claims 1152921504606846976 tensors"),
        (_file(num_keys=HUGE), "and 1152921504606846976 keys"),
        (_file(num_keys=1, keys=struct.pack("<Q", HUGE)), "metadata key 0 ends behind the file's end"),
        (_file(num_keys=1, keys=_string(b"k") + struct.pack("<IQ", 8, HUGE)), "k ends behind the file's end"),
        (_file(num_keys=1, keys=_string(b"k") + struct.pack("<IIQ", 9, 0, HUGE)), "k ends behind the file's end"),
        (_file(num_keys=1, keys=_string(b"k") + struct.pack("<IIQ", 9, 8, HUGE)), "k ends behind the file's end"),
        (_file(num_keys=1, keys=_string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "k is an array of the type 9"),
        (_file(num_keys=1, keys=_string(b"k") + struct.pack("<I", 77)), "k is of the unknown type 77"),
        (_file(num_keys=1, keys=_string(b"\xff") + struct.pack("<IB", 0, 1)), "metadata key 0 is not UTF-8"),
        (_file(num_keys=2, keys=2 * (_string(b"k") + struct.pack("<IB", 0, 1))), "the metadata key k twice"),
        (
            _file(num_tensors=1, tensors=_string(b"t") + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0)),
            "tensor t of .* bytes lies at",
        ),
        (_file(num_tensors=1, tensors=_string(b"t") + struct.pack("<I", 2**31)), "tensor t has 2147483648 dimensions"),
        (
            _file(num_tensors=1, tensors=TENSOR + struct.pack("<IQ", 0, HUGE)),
            "tensor blk.0.ffn_up.weight of 4096 bytes",
        ),
        (_file(num_tensors=1, tensors=TENSOR + struct.pack("<IQ", 0, 7)), "lies at 7, not a multiple of 32"),
        (_file(num_tensors=1, tensors=TENSOR + struct.pack("<IQ", 12, 0)), "rows of 32, must be a multiple of 256"),
        (_file(num_tensors=2, tensors=2 * (_string(b"t") + struct.pack("<IIQ", 0, 0, 0))), "the tensor t twice"),
        (
            _file(num_keys=1, keys=_string(b"general.alignment") + struct.pack("<II", 4, 0)),
            "general.alignment is 0, must be a power of two",
        ),
    ],
)
def test_a_lying_header_is_refused_before_anything_is_made(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf"model\.gguf is not a complete GGUF file .*{named}"):
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20, "an error takes kilobytes; believing a count takes gigabytes"
    assert time.monotonic() - begin < 1, "an error takes microseconds; counting to 2^60 takes centuries"
    tracemalloc.stop()


def test_another_format_version_or_byte_order_is_named(write_metadata: Write, tmp_path: Path) -> None:
    path = write_metadata(add_everything)
    content = bytearray(path.read_bytes())
    path.write_bytes(b"GGML" + content[4:])
    with pytest.raises(ValueError, match=r"begins with b'GGML', a GGUF file begins with b'GGUF'"):
        read_gguf(path)
    path.write_bytes(content[:4] + struct.pack("<I", 1) + content[8:])
    with pytest.raises(ValueError, match="is of GGUF version 1, must be 2 or 3"):
        read_gguf(path)
    big = write_metadata(lambda w: w.add_uint32("test.number", 1), "big.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match=r"big\.gguf is big-endian; turn it with .*gguf-convert-endian"):
        read_gguf(big)


def test_a_type_that_the_package_does_not_know_is_named(write_metadata: Write) -> None:
    path = write_metadata(lambda w: w.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 32), np.float32)))
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    content[at : at + 4] = (999).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tensor blk\.0\.ffn_up\.weight of .* is stored as type 999"):
        read_gguf(path)


def test_a_split_model_is_whole_given_any_part(tmp_path: Path, llama: Any, write: Write) -> None:
    init(write(llama.model), tmp_path / "whole")
    (tmp_path / "model.gguf").unlink()
    write(llama.model, parts=8)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) == 3
    expected = load_model(tmp_path / "whole").released_tensors()
    for i, part in enumerate(parts):
        init(part, tmp_path / f"from_{i}")
        found = load_model(tmp_path / f"from_{i}").released_tensors()
        assert all(found[name].equal(expected[name]) for name in expected)


def test_parts_that_are_missing_renamed_or_of_another_model_are_named(tmp_path: Path, llama: Any, write: Write) -> None:
    write(llama.model, parts=8)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    content = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"3 parts and model-00002-of-00003\.gguf is not beside it"):
        read_gguf(parts[2])
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(ValueError, match=r"tensor .* is in both .*00001-of-00003\.gguf and .*00002-of-00003\.gguf"):
        read_gguf(parts[2])
    other = tmp_path / "other.gguf"
    other.write_bytes(content)
    with pytest.raises(ValueError, match=r"is part 2 of 3; rename it to NAME-00002-of-00003\.gguf"):
        read_gguf(other)
