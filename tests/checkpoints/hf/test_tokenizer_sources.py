"""Folders that have their tokenizer in other files than tokenizer.json, judged by transformers."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

from twotower.checkpoints.hf.tokenizer_file import read_tokenizer_text
from twotower.checkpoints.hf.tokenizer_sources import byte_symbols

TEXTS = [
    "",
    "hello world",
    "  two  spaces ",
    "line\n\n  more\ttab",
    "don't WE'LL 12345",
    "naïve e\u0301 é",
    "日本語 テスト 🤗",
    "<|endoftext|>a<|im_start|>user\nhi <|im_end|> x <tool> y",
    "<s>a</s> <new> b",
]


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """The model of a byte-level BPE."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder of files, JSON given as objects, of a model of `model_type`."""

    def make(files: dict[str, Any], model_type: str = "llama") -> Path:
        for name, content in ({"config.json": {"model_type": model_type}} | files).items():
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return make


def check(directory: Path, *, special: bool = True) -> tokenizers.Tokenizer:
    """Asserts that texts have the ids that transformers' tokenizer of the folder gives them."""
    text = read_tokenizer_text(directory)
    assert text is not None
    ours, theirs = tokenizers.Tokenizer.from_str(text), transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=special).input_ids
        assert ours.encode(text, add_special_tokens=special).ids == ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    return ours


def files_of(trained: dict[str, Any], **vocab: int) -> dict[str, Any]:
    merges = "#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in trained["model"]["merges"])
    return {"vocab.json": trained["model"]["vocab"] | vocab, "merges.txt": merges}


def entry(content: str, **flags: bool) -> dict[str, Any]:
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content} | usual | flags


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True, "add_bos_token": True},
        {"tokenizer_class": "CodeGenTokenizer"},
    ],
)
def test_vocab_and_merges_of_gpt2s_kind(folder, trained, settings):
    end = len(trained["model"]["vocab"])
    files = files_of(trained, **{"<|endoftext|>": end}) | ({"tokenizer_config.json": settings} if settings else {})
    assert check(folder(files, "gpt2")).token_to_id("<|endoftext|>") == end


@pytest.mark.parametrize("listed", ["added_tokens_decoder", "added_tokens.json"])
def test_vocab_and_merges_of_qwens_kind_with_added_tokens(folder, trained, listed):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    places = {name: len(trained["model"]["vocab"]) + i for i, name in enumerate(names)}
    settings: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None}
    files = files_of(trained)
    if listed == "added_tokens_decoder":
        settings[listed] = {str(i): entry(name, special=name != "<tool>") for name, i in places.items()}
    else:
        files |= {listed: places}
        files["special_tokens_map.json"] = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    ours = check(folder(files | {"tokenizer_config.json": settings}, "qwen2"))
    assert {name: ours.token_to_id(name) for name in names} == places
    assert {i for i, token in ours.get_added_tokens_decoder().items() if token.special} >= {places["<|im_end|>"]}


@pytest.mark.parametrize(
    ("settings", "mapped"),
    [
        ({"add_bos_token": True, "bos_token": "<s>"}, {}),
        ({"bos_token": "<s>", "pad_token": "<new>"}, {}),
        ({}, {"unk_token": "<new>"}),
        ({"added_tokens_decoder": {"256": entry("<s>"), "257": entry("</s>", lstrip=True, rstrip=True)}}, {}),
        ({"added_tokens_decoder": {"258": entry("<new>", special=False)}}, {}),
        ({"added_tokens_decoder": {"256": entry("<new>"), "257": entry("</s>")}}, {}),  # 256 is <s>
    ],
)
def test_files_beside_a_tokenizer_json_add_tokens_and_flags(folder, settings, mapped):
    tokenizer = tokenizers.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(byte_symbols())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer.json": json.loads(tokenizer.to_str()), "tokenizer_config.json": settings}
    check(folder(files | ({"special_tokens_map.json": mapped} if mapped else {})))


def test_a_tokenizer_json_that_the_files_beside_it_agree_with_is_kept_as_it_is(folder, byte_tokenizer):
    text = json.dumps(json.loads(byte_tokenizer.to_str()), indent=3)
    directory = folder({"tokenizer.json": text, "tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": True}})
    assert read_tokenizer_text(directory) == text


def tekken(**changes: Any) -> dict[str, Any]:
    tokens = [bytes([value]) for value in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w"]
    special = [{"rank": i, "token_str": name} for i, name in enumerate(["<unk>", "<s>", "</s>"])]
    config = {"pattern": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "default_vocab_size": 264}
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(tokens)]
    return {"config": config | {"default_num_special_tokens": 4}, "vocab": vocab, "special_tokens": special} | changes


def test_mistrals_tekken(folder):
    ours = check(folder({"tekken.json": tekken()}, "mistral"), special=False)
    assert ours.encode("hello").ids == [1, 4 + 259]  # BOS first, as Mistral's own package does
    assert ours.token_to_id("<SPECIAL_3>") == 3
    assert ours.get_vocab_size() == 264  # " w" is beyond the size


PIECES = b"aGVsbG8= 0\nIHdvcmxk 1\n".decode()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab.json": {"a": 0}}, "lacks merges.txt, without which its tokenizer can't be read"),
        ({"merges.txt": "a b\n"}, "lacks vocab.json"),
        ({"vocab.json": {"a": 0}, "merges.txt": "a b\n"}, "not how its tokenizer, None, splits texts into words"),
        (
            {"vocab.json": {}, "merges.txt": "a b c\n", "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
            r"merges\.txt has the line 'a b c', must have two parts",
        ),
        ({"tokenizer.model": PIECES}, r"tokenizer\.model is a tiktoken file, .* download the tokenizer\.json"),
        ({"qwen.tiktoken": PIECES}, r"qwen\.tiktoken is a tiktoken file"),
        ({"vocab.txt": "[PAD]\n"}, "is a WordPiece vocabulary"),
        ({"tekken.json": tekken(special_tokens=None)}, r"tekken\.json lacks"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "is only a pointer to the file"),
    ],
)
def test_what_cannot_be_made_exactly_is_refused_in_a_sentence(folder, files, message):
    with pytest.raises(ValueError, match=message):
        read_tokenizer_text(folder(files))


def test_a_folder_without_a_tokenizer_has_none(folder):
    assert read_tokenizer_text(folder({})) is None
