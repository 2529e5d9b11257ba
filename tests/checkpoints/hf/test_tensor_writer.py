import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.checkpoints.hf.tensor_writer import write_tensors


def specs_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def mixed_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "z.weight": torch.randn(3, 5),
        "b.half": torch.randn(7).half(),
        "a.brain": torch.randn(1, 4, 3).bfloat16(),
        "y.scalar": torch.tensor(2.5),
        "a.double": torch.randn(2, 2, dtype=torch.float64),
        "a.weight": torch.randn(4, 4).t(),  # not contiguous
        "empty": torch.empty(0, 3),
    }


def listing(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_single_file_has_the_bytes_the_library_writes(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    write_tensors(tmp_path / "ours", specs_of(tensors), reversed(tensors.items()))
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert listing(tmp_path / "ours") == {"model.safetensors": (tmp_path / "theirs").read_bytes()}


@pytest.mark.parametrize("limit", [1, 40, 64, 100, 150])
def test_shards_are_those_of_transformers(tmp_path: Path, limit: int) -> None:
    tensors = {k: v.contiguous() for k, v in mixed_tensors().items()}
    write_tensors(tmp_path, specs_of(tensors), tensors.items(), max_shard_bytes=limit)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": split.metadata["total_size"]},
        "weight_map": split.tensor_to_filename,
    }
    assert set(listing(tmp_path)) == {*split.filename_to_tensors, "model.safetensors.index.json"}
    for name, shard in split.filename_to_tensors.items():
        read = load_file(tmp_path / name)
        assert set(read) == set(shard)
        assert all(torch.equal(read[key], tensors[key]) for key in shard)


def test_documents_stand_beside_the_tensors(tmp_path: Path) -> None:
    write_tensors(
        tmp_path, {"a": TensorSpec(torch.float32, (1,))}, [("a", torch.ones(1))], documents={"x.txt": b"hello"}
    )
    assert (tmp_path / "x.txt").read_bytes() == b"hello"


def test_at_most_two_tensors_are_alive(tmp_path: Path) -> None:
    """The one being written, and the next while it is being made; a shard's worth would be 20."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for i in range(20):
            tensor = torch.full((100,), float(i))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"t{i}", tensor

    write_tensors(tmp_path, {f"t{i}": TensorSpec(torch.float32, (100,)) for i in range(20)}, stream())
    assert most == 2
    assert load_file(tmp_path / "model.safetensors")["t7"][0] == 7


def write_version(path: Path, value: float, shard: int = 10**9) -> None:
    tensors = {"a": torch.full((4,), value), "b": torch.full((4,), -value)}
    documents = {"config.json": str(value).encode()}
    write_tensors(path, specs_of(tensors), tensors.items(), max_shard_bytes=shard, documents=documents)


@pytest.mark.parametrize("shard", [16, 10**9])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, shard: int) -> None:
    write_version(tmp_path, 1.0)
    before = listing(tmp_path)

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.full((4,), 2.0)
        raise RuntimeError("the disk is full")

    specs = {"a": TensorSpec(torch.float32, (4,)), "b": TensorSpec(torch.float32, (4,))}
    with pytest.raises(RuntimeError, match="disk is full"):
        write_tensors(tmp_path, specs, interrupted(), max_shard_bytes=shard, documents={"config.json": b"2.0"})
    assert listing(tmp_path) == before


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensors \['a'\] were announced and not given"):
        write_tensors(tmp_path / "new", {"a": TensorSpec(torch.float32, (4,))}, [])
    assert listing(tmp_path / "new") == {}


@pytest.mark.parametrize(("first", "second"), [(10**9, 16), (16, 10**9), (16, 16)])
def test_a_second_write_replaces_every_file_of_the_first(tmp_path: Path, first: int, second: int) -> None:
    write_version(tmp_path / "again", 1.0, first)
    (tmp_path / "again" / ".incomplete").mkdir()  # left by a killed process
    (tmp_path / "again" / "optimizer.safetensors").write_bytes(b"not ours")
    write_version(tmp_path / "again", 2.0, second)
    write_version(tmp_path / "fresh", 2.0, second)
    assert listing(tmp_path / "again") == listing(tmp_path / "fresh") | {"optimizer.safetensors": b"not ours"}


def test_a_directory_interrupted_while_files_move_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_version(tmp_path, 1.0, 16)
    moved = []

    def replace(source: Path, target: Path) -> None:
        if len(moved) == 2:
            raise OSError("killed")
        moved.append(target.name)
        source.rename(target)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(OSError, match="killed"):
        write_version(tmp_path, 2.0, 16)
    assert moved == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert set(listing(tmp_path)) == set(moved), "no index and no config, so nothing reads the mixture"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "tensor a was given twice or is not announced"),
        ([("x", torch.ones(2))], "tensor x was given twice or is not announced"),
        ([("a", torch.ones(3))], r"tensor a is .*\(3,\).*, was announced as .*\(2,\)"),
        ([("a", torch.ones(2).half())], "tensor a is .*float16.*, was announced as .*float32"),
    ],
)
def test_tensors_other_than_announced(tmp_path: Path, given: list[tuple[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path, {"a": TensorSpec(torch.float32, (2,))}, given)


def test_shard_limit_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes is 0, must be at least 1"):
        write_tensors(tmp_path, {}, [], max_shard_bytes=0)
