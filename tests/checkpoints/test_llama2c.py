import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from twotower.checkpoints import init, load_model, read_pieces
from twotower.checkpoints.llama2c import open_llama2c

Bytes = Callable[..., bytes]


@pytest.fixture
def file(tmp_path: Path, llama2c_bytes: Bytes, llama2c_vocabulary: Bytes) -> Path:
    """Weights and tokenizer in one file, head not tied."""
    path = tmp_path / "story.bin"
    path.write_bytes(llama2c_bytes() + llama2c_vocabulary())
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_same_model_in_another_format(
    tmp_path: Path, llama: Any, llama2c_bytes: Bytes, tied: bool
) -> None:
    (tmp_path / "story.bin").write_bytes(llama2c_bytes(tied=tied))
    init(tmp_path / "story.bin", tmp_path / "from_llama2c")
    init(llama.directory, tmp_path / "from_llama")
    found = load_model(tmp_path / "from_llama2c")
    expected = load_model(tmp_path / "from_llama").released_tensors()
    if tied:
        expected = {name: tensor for name, tensor in expected.items() if "lm_head" not in name}
    tensors = found.released_tensors()
    assert list(tensors) == list(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    config = found.config
    assert (config.layer_norm_epsilon, config.rope_theta, config.use_rope) == (1e-5, 10000.0, True)
    assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (1, 1, tied)


@pytest.mark.parametrize(
    "byte_form",
    [lambda v: f"<0x{v:02X}>".encode(), lambda v: bytes([v]), lambda v: chr(v).encode()],
    ids=["name", "byte", "character"],
)
def test_tokenizer_after_the_weights_or_beside_them(
    tmp_path: Path,
    llama2c_bytes: Bytes,
    llama2c_vocabulary: Bytes,
    pieces: list[str],
    byte_form: Callable[[int], bytes],
) -> None:
    together, apart = tmp_path / "together.bin", tmp_path / "apart" / "weights.bin"
    apart.parent.mkdir()
    together.write_bytes(llama2c_bytes() + llama2c_vocabulary(byte_form))
    apart.write_bytes(llama2c_bytes())
    assert open_llama2c(apart).tokenizer is None
    apart.with_name("tokenizer.bin").write_bytes(llama2c_vocabulary(byte_form))
    text = open_llama2c(together).tokenizer
    assert text is not None
    assert open_llama2c(apart).tokenizer == text
    tokenizer = tokenizers.Tokenizer.from_str(text)
    assert tokenizer.encode("abc é!").tokens == ["<s>", " abc", " ", "é", "<0x21>"]
    assert tokenizer.decode(tokenizer.encode("abc é!").ids) == "abc é!"
    assert read_pieces(together).pieces == (*[None] * 259, *pieces)
    assert read_pieces(apart).scores[259:] == tuple(-float(i) for i in range(len(pieces)))


def test_the_tokenizer_in_the_file_goes_before_the_one_beside_it(file: Path) -> None:
    file.with_name("tokenizer.bin").write_bytes(b"of another model")
    assert len(read_pieces(file).pieces) > 259


def test_no_tokenizer_to_read(tmp_path: Path, llama2c_bytes: Bytes) -> None:
    (tmp_path / "story.bin").write_bytes(llama2c_bytes())
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in it and no tokenizer\.bin beside it"):
        read_pieces(tmp_path / "story.bin")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\0" * 20, "has 20 bytes, less than a llama2.c header"),
        (struct.pack("<7i", 0x616B3432, 1, 2, 3, 4, 5, 6), "format version 1, must be version 0"),
        (struct.pack("<7i", 32, 64, 2, 5, 5, 300, 64), "is not a llama2.c file"),
        (struct.pack("<7i", 32, 64, 2, 4, 3, 300, 64), "is not a llama2.c file"),
        (struct.pack("<7i", 32, 64, 0, 4, 2, 300, 64), "is not a llama2.c file"),
        (struct.pack("<7i", 12, 64, 2, 4, 2, 300, 64), "is not a llama2.c file"),
        (b"<!DOCTYPE html><html>not found</html>", "is not a llama2.c file"),
    ],
)
def test_other_files(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / "story.bin").write_bytes(header)
    with pytest.raises(ValueError, match=message):
        open_llama2c(tmp_path / "story.bin")


@pytest.mark.parametrize("missing", [1, 4, 1000])
def test_truncated_weights(tmp_path: Path, llama2c_bytes: Bytes, missing: int) -> None:
    content = llama2c_bytes()
    (tmp_path / "story.bin").write_bytes(content[:-missing])
    with pytest.raises(
        ValueError, match=f"has {len(content) - missing} bytes, its header asks for {len(content)}; it is"
    ):
        open_llama2c(tmp_path / "story.bin")


@pytest.mark.parametrize("tied", [False, True])
def test_truncated_weights_are_not_taken_for_a_missing_table(tmp_path: Path, llama2c_bytes: Bytes, tied: bool) -> None:
    content = llama2c_bytes(tied=tied)
    table = 4 * 64 * 8  # sequence length · head width
    (tmp_path / "story.bin").write_bytes(content[:-table])
    with pytest.raises(ValueError, match="it is cut off"):
        open_llama2c(tmp_path / "story.bin")


def test_broken_tokenizers(tmp_path: Path, llama2c_bytes: Bytes, llama2c_vocabulary: Bytes) -> None:
    (tmp_path / "story.bin").write_bytes(llama2c_bytes())
    good = llama2c_vocabulary()

    def opened_with(content: bytes) -> None:
        (tmp_path / "tokenizer.bin").write_bytes(content)
        open_llama2c(tmp_path / "story.bin")

    opened_with(good)
    with pytest.raises(ValueError, match=r"tokenizer\.bin is cut off at token 272 of 273"):
        opened_with(good[:-11])
    with pytest.raises(ValueError, match="has a token 272 of 3 bytes that does not fit"):
        opened_with(good[:-1])
    with pytest.raises(ValueError, match=f"holds {len(good) + 1} bytes .*, must be {len(good)} bytes"):
        opened_with(good + b"\0")
    with pytest.raises(ValueError, match="has b'z' as token 68, must be the byte 65"):
        opened_with(good.replace(b"\x01\0\0\0A", b"\x01\0\0\0z"))
    with pytest.raises(ValueError, match=r"has b'\\xff\\xff' as token \d+, must be UTF-8"):
        opened_with(good.replace("é".encode(), b"\xff\xff"))
