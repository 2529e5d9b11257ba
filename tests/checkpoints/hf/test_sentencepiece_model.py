"""SentencePiece models, written by hand in their format, and where the package is there, trained and judged by it."""

import io
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers

from twotower.checkpoints.hf.sentencepiece_model import PieceKind, read_sentencepiece, sentencepiece_tokenizer
from twotower.checkpoints.vocabulary import normal_form

TEXTS = [
    "",
    " ",
    "hello world",
    " hello",
    "  two  spaces ",
    "line\n\n  more\ttab",
    "naïve é ü ß",
    "日本語 テスト 🤗",
    "def f(x):\n    return x+1\n",
    "1234 3.14",
    "▁ already ▁▁x▁",
    "ﬁ ½ ａｂｃ\u00a0\u3000wide",
    "<0x41> [INST] x<tool>",
]


def field(number: int, content: bytes | int | float) -> bytes:
    if isinstance(content, bytes):
        size = len(content)
        assert size < 1 << 14
        return varint(number << 3 | 2) + varint(size) + content
    if isinstance(content, float):
        return varint(number << 3 | 5) + struct.pack("<f", content)
    return varint(number << 3) + varint(content)


def varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def model(pieces: Sequence[tuple[str, float, int]], trainer: dict[int, int], normalizer: dict[int, int]) -> bytes:
    entries = [field(1, piece.encode()) + field(2, score) + field(3, kind) for piece, score, kind in pieces]
    specs = [b"".join(field(n, v) for n, v in spec.items()) for spec in (trainer, normalizer)]
    return b"".join(field(1, entry) for entry in entries) + field(2, specs[0]) + field(3, specs[1])


CONTROL = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
BYTES = [(f"<0x{value:02X}>", 0.0, 6) for value in range(256)]
WORDS = ["▁a", "ab", "▁ab", "abc", "▁", "a", "b", "c", "é"]
BPE = {3: 2, 35: 1}
AS_LLAMA = {4: 0}  # no removal of extra spaces


def test_what_is_in_a_model(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model([*CONTROL, ("▁a", -1.5, 1)], BPE, {3: 0, 4: 0, 5: 1}))
    found = read_sentencepiece(file)
    assert found.pieces == ("<unk>", "<s>", "</s>", "▁a")
    assert found.scores == (0.0, 0.0, 0.0, -1.5)
    assert found.of_kind(PieceKind.CONTROL) == [1, 2]
    assert (found.model_type, found.byte_fallback, found.add_dummy_prefix) == (2, True, False)
    assert (found.remove_extra_whitespaces, found.escape_whitespaces) == (False, True)


def encode(tmp_path: Path, content: bytes, text: str, *, every: bool = True) -> list[str]:
    (tmp_path / "tokenizer.model").write_bytes(content)
    raw = sentencepiece_tokenizer(read_sentencepiece(tmp_path / "tokenizer.model"), prefix_every_chunk=every)
    return tokenizers.Tokenizer.from_str(normal_form(raw)).encode(text).tokens


def bpe(*more: tuple[str, float, int], **normalizer: int) -> bytes:
    words = [(word, -float(i), 1) for i, word in enumerate(WORDS)]
    return model([*CONTROL, *BYTES, *words, *more], BPE, AS_LLAMA)


def test_merges_go_by_score_and_characters_without_a_piece_become_bytes(tmp_path: Path) -> None:
    # "▁a" before "ab": the pair with the better score is merged first, wherever it is
    assert encode(tmp_path, bpe(), "abc") == ["▁ab", "c"]
    assert encode(tmp_path, bpe(), "x") == ["▁", "<0x78>"]
    assert encode(tmp_path, bpe(), "  a") == ["▁", "▁", "▁a"]


def test_control_tokens_are_found_in_texts_and_the_space_comes_behind_each_or_only_first(tmp_path: Path) -> None:
    assert encode(tmp_path, bpe(), "a</s>b") == ["▁a", "</s>", "▁", "b"]
    assert encode(tmp_path, bpe(), "a</s>b", every=False) == ["▁a", "</s>", "b"]


def test_user_defined_pieces_are_never_split_or_merged(tmp_path: Path) -> None:
    assert encode(tmp_path, bpe(("bca", 0.0, 4)), "abcab") == ["▁a", "bca", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no pieces"),
        (b"hello", "is not a SentencePiece model"),
        (b"\x0a\xff\x01", "is not a SentencePiece model: .*ends inside a field"),
        (b"\xff" * 20, "is not a SentencePiece model: .*more than 10 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is only a pointer to the file"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_sentencepiece(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (model(CONTROL, {3: 3}, {}), "is of whole words, must be BPE or unigram"),
        (model(CONTROL, {3: 2, 24: 1}, {}), "must put spaces before words"),
        (model([*CONTROL, ("x", 0.0, 5)], BPE, {}), "has unused pieces"),
        (model([*CONTROL, ("▁▁", 0.0, 4)], BPE, {}), r"user-defined pieces that can't be converted: \['▁▁'\]"),
    ],
)
def test_what_a_tokenizer_json_cannot_express_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(tmp_path, content, "a")


@pytest.mark.parametrize(
    ("kind", "fallback", "rule", "prefix", "strips"),
    [
        *itertools.product(("bpe",), (True, False), ("identity",), (True, False), (True, False)),
        *itertools.product(("unigram",), (True, False), ("identity",), (True,), (True, False)),
        ("bpe", True, "nmt_nfkc", True, True),
        ("unigram", True, "nmt_nfkc", False, False),
    ],
)
def test_texts_are_encoded_as_the_sentencepiece_package_does(
    tmp_path: Path, kind: str, fallback: bool, rule: str, prefix: bool, strips: bool
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=written,
        vocab_size=330 if fallback else 90,
        model_type=kind,
        byte_fallback=fallback,
        normalization_rule_name=rule,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=strips,
        user_defined_symbols=["[INST]", "<tool>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    judge = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    raw = sentencepiece_tokenizer(read_sentencepiece(tmp_path / "tokenizer.model"), prefix_every_chunk=True)
    ours = tokenizers.Tokenizer.from_str(normal_form(raw))
    # In a unigram tokenizer.json the name of a byte is a piece too, which texts may spell
    for text in TEXTS[: -1 if kind == "unigram" else None]:
        ids = judge.encode(text)
        assert ours.encode(text).ids == ids, text
        if fallback and "▁" not in text:  # the package shows unknown characters as ⁇
            assert ours.decode(ids) == judge.decode(ids)
