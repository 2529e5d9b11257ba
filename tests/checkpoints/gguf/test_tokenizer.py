import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers

from twotower.checkpoints import init, load_model, load_tokenizer
from twotower.checkpoints.gguf.special_tokens import SpecialTokens
from twotower.checkpoints.gguf.tokenizer import tokenizer_from_gguf

Write = Callable[..., Path]

DATA = Path(__file__).with_name("data") / "vocabularies.json.gz"
REAL = (
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "mpt"),
    *("phi-3", "qwen2", "qwen35", "refact", "starcoder"),
)


def build(**keys: Any) -> tokenizers.Tokenizer | None:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    metadata["general.name"] = metadata.pop("tokenizer.ggml.name", "")
    path = Path("model.gguf")
    text = tokenizer_from_gguf(path, metadata, SpecialTokens.read(path, metadata))
    return None if text is None else tokenizers.Tokenizer.from_str(text)


@pytest.mark.parametrize("name", REAL)
def test_llama_cpps_own_tests(name: str) -> None:
    """Its vocabularies of real models, cut down to the tokens that its test texts need, and the ids that it expects.
    The data are from its repository (MIT licence)."""
    data = json.loads(gzip.decompress(DATA.read_bytes()))
    vocabulary = data["vocabularies"][name]
    keys = {k: v for k, v in vocabulary.items() if k not in ("ids", "texts")}
    tokenizer = build(add_bos_token=False, **keys)
    assert tokenizer is not None
    texts = vocabulary.get("texts", data["texts"])
    assert len(texts) == len(vocabulary["ids"]) > 40
    for text, ids in zip(texts, vocabulary["ids"], strict=True):
        assert tokenizer.encode(text).ids == ids, text
        if name not in ("command-r", "mpt", "qwen2"):  # these make texts NFC
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


BYTES = [f"<0x{v:02X}>" for v in range(256)]
PIECES = ["▁a", "ab", "▁ab", "abc", "▁abc", "▁▁", "▁", "a", "b", "c", "é"]
SCORED = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", *BYTES, *PIECES],
    "token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
    "scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES))],
}
PAIRS = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["<s>", "a", "b", "Ġ", "ab", "<|im|>", "[PAD]"],
    "token_type": [3, 1, 1, 1, 1, 4, 5],
    "merges": ["a b"],
}


def tokens(tokenizer: tokenizers.Tokenizer | None, text: str) -> list[str]:
    assert tokenizer is not None
    return tokenizer.encode(text).tokens


def test_scored_pieces() -> None:
    assert tokens(build(**SCORED), "abc é\x01") == ["<s>", "▁abc", "▁", "é", "<0x01>"]
    assert tokens(build(**SCORED, add_space_prefix=False), "abc") == ["<s>", "abc"]
    assert tokens(build(**SCORED, add_bos_token=False, add_eos_token=True), "abc") == ["▁abc", "</s>"]
    assert tokens(build(**SCORED), "ab</s>ab") == ["<s>", "▁ab", "</s>", "▁ab"], "a space behind every control token"
    tokenizer = build(**SCORED)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode(" abc é").ids) == " abc é"


def test_a_users_token_may_look_like_a_piece_with_marks() -> None:
    keys = {**SCORED, "tokens": [*SCORED["tokens"], "  "], "token_type": [*SCORED["token_type"], 4]}
    assert tokens(build(**{**keys, "scores": [*SCORED["scores"], -1000.0]}), "a  b") == ["<s>", "▁a", "  ", "▁", "b"]


def test_missing_arrays_get_the_formats_defaults() -> None:
    keys = {key: value for key, value in SCORED.items() if key != "token_type"}
    tokenizer = build(**keys)
    assert tokens(tokenizer, "ab</s>") == ["<s>", "▁ab", "<0x3C>", "<0x2F>", "<0x73>", "<0x3E>"], "all are normal"
    keys = {key: value for key, value in PAIRS.items() if key != "token_type"}
    assert tokens(build(**keys), "ab b") == ["ab", "Ġ", "b"]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({**SCORED, "scores": None}, r"lacks tokenizer\.ggml\.scores, the order of merging"),
        ({**PAIRS, "merges": None}, r"lacks tokenizer\.ggml\.merges, without which BPE merges nothing"),
        ({**PAIRS, "tokens": None}, r"lacks tokenizer\.ggml\.tokens, its vocabulary"),
        ({**PAIRS, "token_type": [1]}, r"tokenizer\.ggml\.token_type of model\.gguf has 1 entries for 7 tokens"),
        ({**SCORED, "scores": [0.0]}, r"tokenizer\.ggml\.scores of model\.gguf has 1 entries for 270 tokens"),
        ({**PAIRS, "tokens": ["a"] * 7}, r"holds \['a'\] more than once"),
        ({**SCORED, "tokens": ["x", *SCORED["tokens"][1:3], "y", *SCORED["tokens"][4:]]}, "lacks 1 of 256 byte tokens"),
        ({**PAIRS, "add_bos_token": True}, r"puts a token bos around texts, but tokenizer\.ggml\.bos_token_id"),
        ({**PAIRS, "pre": "llama-bpe"}, r"puts a token bos around texts"),
        ({**PAIRS, "model": "bert"}, r"is WordPiece \(bert\), must be byte-pair encoding"),
        ({**PAIRS, "model": "t5"}, r"is SentencePiece unigram \(t5\), must be byte-pair encoding"),
        ({**PAIRS, "model": "rwkv"}, r"is RWKV \(rwkv\), must be"),
        ({**PAIRS, "model": "new"}, r"is 'new', must be"),
    ],
)
def test_what_is_missing_or_of_another_kind_is_named(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(**{key: value for key, value in keys.items() if value is not None})


def test_added_and_unused_tokens_of_byte_pairs() -> None:
    tokenizer = build(**PAIRS)
    assert tokenizer is not None
    assert tokens(tokenizer, "ab<|im|>b<s>") == ["ab", "<|im|>", "b", "<s>"]
    assert tokenizer.decode([5, 0, 1]) == "<|im|>a", "control tokens are not shown, a user's are"
    assert tokenizer.id_to_token(6) is None, "padding is no token"
    assert tokens(build(**{**PAIRS, "merges": ["a b", "b a"]}), "ba") == ["b", "a"], "a merge without a token is none"


def test_phi_3s_control_tokens_take_the_space_behind_them() -> None:
    """The format can't say so; llama.cpp goes by the model's name."""
    assert tokens(build(**PAIRS, name="Phi 3 mini"), "ab<s> ab") == ["ab", "<s>", "Ġ", "ab"]
    assert tokens(build(**PAIRS, name="Microsoft Phi-3"), "ab<s> ab") == ["ab", "<s> ", "ab"]


def test_no_tokenizer_is_no_fault() -> None:
    assert build() is build(model="none") is None


def test_a_pre_tokenizer_that_can_not_be_expressed_is_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert build(**{**PAIRS, "pre": "kimi-k2"}) is None
    assert "no tokenizer.json written, its pre-tokenizer kimi-k2 can't be expressed there" in caplog.text


def test_the_default_pre_tokenizer_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert tokens(build(**{k: v for k, v in PAIRS.items() if k != "pre"}), "ab") == ["ab"]
    assert "names no pre-tokenizer, so it is tokenised as llama.cpp does by default" in caplog.text


def test_init_writes_tokenizer_template_and_ends(tmp_path: Path, llama: Any, write: Write) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(SCORED["tokens"])
        writer.add_token_types(SCORED["token_type"])
        writer.add_token_scores(SCORED["scores"])
        writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")

    init(write(llama.model, extra=extra), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokens(tokenizer, "abc") == ["<s>", "▁abc"]
    assert tokenizer is not None
    assert tokenizer.token_to_id("<mask>") == 273, "behind the 3 rows of the embedding that no token has"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ bos_token }}{{ messages[0].content }}"
    config = load_model(tmp_path / "out").config
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
