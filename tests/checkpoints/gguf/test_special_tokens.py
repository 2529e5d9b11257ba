import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from twotower.checkpoints.chat_template import ChatTemplate, Turn
from twotower.checkpoints.gguf.special_tokens import SpecialTokens

TOKENS = ["<unk>", "<s>", "</s>", "a", "<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<|end|>", "<end>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def read(
    tokens: list[str] = TOKENS, model: str = "gpt2", templates: Mapping[str, str] | None = None, **keys: Any
) -> SpecialTokens:
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.model": model}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return SpecialTokens.read(Path("model.gguf"), metadata | dict(templates or {}))


def ends(special: SpecialTokens) -> list[str]:
    return [special.texts[i] for i in special.ends]


def test_ends_are_those_of_llama_cpp_with_the_files_own_first() -> None:
    plain = ["a", "b", "c", "d"]
    assert ends(read(plain, eos_token_id=2, eot_token_id=1, eom_token_id=3)) == ["c", "b", "d"]
    assert ends(read(plain, eos_token_id=2, fim_pad_token_id=0)) == ["c", "a"]
    named = ["</s>", "<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<|end|>"]
    assert ends(read(eos_token_id=5)) == ["<|endoftext|>", *(name for name in named if name != "<|endoftext|>")]
    assert ends(read(plain)) == []


def test_names_that_end_nothing_beside_others() -> None:
    """Harmony's `<|end|>` ends a message but not the answer; Gemma 4's `</s>` is HTML."""
    assert ends(read(["<|end|>", "<|return|>", "<|call|>"])) == ["<|return|>", "<|call|>"]
    assert ends(read(["<|end|>", "<|return|>"])) == ["<|end|>", "<|return|>"]
    assert ends(read(["</s>", "<|tool_response>", "a"])) == ["<|tool_response>"]


def test_defaults_and_ids_outside_of_the_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    assert read(model="llama").ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert read().ids == {}
    with caplog.at_level(logging.WARNING):
        assert read(bos_token_id=99, model="llama").ids["bos"] == 1
    assert "tokenizer.ggml.bos_token_id is 99, left out: there are 9 tokens" in caplog.text


def test_templates_write_the_texts_of_tokens(tmp_path: Path) -> None:
    templates = {"tokenizer.chat_template": TEMPLATE}
    special = read(bos_token_id=1, eos_token_id=2, unknown_token_id=0, padding_token_id=5, templates=templates)
    for name, content in special.documents().items():
        (tmp_path / name).write_bytes(content)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chat_template.jinja", "tokenizer_config.json"]
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([Turn("user", "hello")]) == "<s>[user] hello</s>"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["unk_token"], config["pad_token"]) == ("<unk>", "<|endoftext|>")


def test_named_templates_are_found_by_us_and_by_transformers(tmp_path: Path) -> None:
    templates = {"tokenizer.chat_template": "default", "tokenizer.chat_template.tool_use": "tools"}
    special = read(bos_token_id=1, templates=templates)
    for name, content in special.documents().items():
        (tmp_path / name).write_bytes(content)
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert (template.render([Turn("user", "")]), template.render([Turn("user", "")], tools=[{}])) == (
        "default",
        "tools",
    )
    theirs = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), **theirs
    )
    assert tokenizer.get_chat_template() == "default"
    assert tokenizer.get_chat_template(tools=[{}]) == "tools"


def test_a_token_around_texts_without_its_id_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"model\.gguf puts a token bos around texts, but tokenizer\.ggml\.bos_token_id"
    ):
        read(add_bos_token=True).processor(adds_bos=False)
    assert read().processor(adds_bos=False) is None


def test_a_file_without_a_vocabulary() -> None:
    special = SpecialTokens.read(Path("model.gguf"), {"tokenizer.ggml.eos_token_id": 7})
    assert (special.ends, special.documents()) == ((7,), {})
