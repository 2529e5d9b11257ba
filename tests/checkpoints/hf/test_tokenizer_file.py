from pathlib import Path

import pytest
import tokenizers

from twotower.checkpoints.hf import load_tokenizer


def test_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    bpe = tokenizers.models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="<unk>")
    tokenizers.Tokenizer(bpe).save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.encode("ab").ids == [3]


def test_a_tokenizer_encodes_whole_texts_whatever_its_last_user_set(
    byte_tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    expected = byte_tokenizer.encode("Once upon a time").ids
    others = tokenizers.Tokenizer.from_str(byte_tokenizer.to_str())  # the fixture is every test's
    others.enable_truncation(4)
    others.enable_padding(length=32)
    others.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert [encoding.ids for encoding in loaded.encode_batch(["Once upon a time", "O"])] == [expected, expected[:1]]


@pytest.mark.parametrize("content", [b"", b"{", b"<html>", b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_broken_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json (is not JSON|has no model with a vocabulary)"):
        load_tokenizer(tmp_path)


def test_tokens_without_a_row_are_left_out(byte_tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    larger = tokenizers.Tokenizer.from_str(byte_tokenizer.to_str())
    larger.add_special_tokens(["<pad>"])
    larger.save(str(tmp_path / "tokenizer.json"))
    for num_rows, spelled in ((261, 1), (260, 5)):
        loaded = load_tokenizer(tmp_path, num_rows)
        assert loaded is not None
        assert len(loaded.encode("<pad>").ids) == spelled
    with pytest.raises(ValueError, match="take the tokenizer and the weights of one model"):
        load_tokenizer(tmp_path, 100)
