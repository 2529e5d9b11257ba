import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twotower.checkpoints.hf.tensor_files import TensorSpec, check_shapes, scan


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two files and their index: a and b in the first, c in the second."""
    save_file({"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(1, 4)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_headers_tell_dtypes_shapes_and_files(sharded: Path) -> None:
    found = scan(sharded)
    assert found.specs == {
        "a": TensorSpec(torch.float32, (2,)),
        "b": TensorSpec(torch.bfloat16, (3,)),
        "c": TensorSpec(torch.float32, (1, 4)),
    }
    assert {name: file.name for name, file in found.files.items()}["c"] == "two.safetensors"


def test_stream_reads_what_is_asked_for(sharded: Path) -> None:
    read = dict(scan(sharded).stream(["c", "a"]))
    assert set(read) == {"a", "c"}
    assert torch.equal(read["a"], torch.ones(2))
    assert torch.equal(read["c"], torch.ones(1, 4))


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks two\.safetensors, named by model\.safetensors\.index\.json"):
        scan(sharded)


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        scan(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    # A pickle that would leave a trace if anything loaded it.
    (tmp_path / name).write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / "ran").encode() + b"\ntR.")
    with pytest.raises(FileNotFoundError, match=f"only as pickles.*{name}"):
        scan(tmp_path)
    assert not (tmp_path / "ran").exists()


def good_file(path: Path) -> bytes:
    save_file({"a": torch.ones(64)}, path)
    return path.read_bytes()


@pytest.mark.parametrize("cut", [0, 5, 40, 100, -1])
def test_truncated_file(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(good_file(file)[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file.*download it again"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>404 not found</html>" * 9, "not a complete safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is only a pointer to the file; fetch it with: git lfs pull"),
    ],
)
def test_file_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        scan(tmp_path)


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"c": torch.ones(1, 4), "a": torch.ones(2)}, sharded / "two.safetensors")
    with pytest.raises(ValueError, match=r"tensor a is in both .*one\.safetensors and .*two\.safetensors"):
        scan(sharded)


def test_index_names_a_tensor_the_shard_lacks(sharded: Path) -> None:
    write_index(
        sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors", "d": "one.safetensors"}
    )
    with pytest.raises(ValueError, match=r"disagrees with the files: b, d not in the file it names"):
        scan(sharded)


def test_shard_holds_a_tensor_the_index_lacks(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(ValueError, match="b in the files but not in the index"):
        scan(sharded)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "\xff"])
def test_broken_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index\.json (is not JSON|has no weight_map)"):
        scan(sharded)


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", 7])
def test_index_may_not_point_outside(sharded: Path, name: object) -> None:
    write_index(sharded, {"a": name})
    with pytest.raises(ValueError, match="must be plain file names"):
        scan(sharded)


def test_index_beside_a_single_file_is_ambiguous_unless_its_files_are_gone(sharded: Path) -> None:
    save_file({"single": torch.ones(2)}, sharded / "model.safetensors")
    with pytest.raises(ValueError, match="holds both"):
        scan(sharded)
    (sharded / "two.safetensors").unlink()
    assert set(scan(sharded).specs) == {"single"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "adapter_model.safetensors",
            r"holds an adapter \(adapter_model\.safetensors\), which changes another model's",
        ),
        ("consolidated.safetensors", r"only in Mistral's form \(consolidated\.safetensors\); download model\.saf"),
        (
            "model.fp16.safetensors",
            r"holds model\.fp16\.safetensors, but neither .* rename a single file to model\.saf",
        ),
        ("model-00001-of-00002.safetensors", r"holds model-00001-of-00002\.safetensors, but neither .* download the"),
    ],
)
def test_weights_under_other_names_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        scan(tmp_path)


def test_other_weights_beside_the_models_are_not_read(tmp_path: Path) -> None:
    for name in ("model", "consolidated", "model-00001-of-00002", "model.fp16"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    assert set(scan(tmp_path).specs) == {"model"}


def test_an_adapter_beside_weights_is_not_passed_over(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config\.json\)"):
        scan(tmp_path)


def test_tensor_twice_in_one_header(tmp_path: Path) -> None:
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        scan(tmp_path)


def test_every_difference_is_told_at_once() -> None:
    spec = TensorSpec(torch.float32, (2, 3))
    expected: dict[str, tuple[int, ...]] = {"same": (2, 3), "turned": (3, 2)} | {f"gone.{i}": (1,) for i in range(7)}
    with pytest.raises(ValueError) as raised:
        check_shapes(expected, {"same": spec, "turned": spec, "extra": spec}, "somewhere")
    text = str(raised.value)
    assert "the tensors of somewhere do not fit its config" in text
    assert "7 missing: gone.0, gone.1, gone.2, gone.3, gone.4 and 2 more" in text
    assert "1 unexpected: extra" in text
    assert "1 of the wrong shape: turned is (2, 3), must be (3, 2)" in text
    check_shapes({"same": (2, 3)}, {"same": spec}, "somewhere")
