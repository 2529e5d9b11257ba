import json

import pytest
import tokenizers

from twotower.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS

TEXT = "I'm  HTTPServer's 1234567, naïve 日本!\n\n x=~y"

# Names of one pre-tokenizer each, and the words that llama.cpp cuts the text into by its expressions.
WORDS = {
    "gpt-2": "I|'m| | HTTPServer|'s| 1234567|,| naïve| 日本|!|\n\n| x|=~|y",
    "smollm": "I|'m| | HTTPServer|'s| |1|2|3|4|5|6|7|,| naïve| 日本|!|\n\n| x|=~|y",
    "llama-bpe": "I|'m| | HTTPServer|'s| |123|456|7|,| naïve| 日本|!\n\n| x|=~|y",
    "qwen2": "I|'m| | HTTPServer|'s| |1|2|3|4|5|6|7|,| naïve| 日本|!\n\n| x|=~|y",
    "default": "I|'|m| | HTTPServer|'|s| |123|456|7|,| naïve| 日本|!|\n\n| x|=~|y",
    "falcon": "I|'|m| | HTTPServer|'|s| |123|456|7|,| naïve| 日本|!|\n\n| x|=~|y",
    "tekken": "I|'m| | HTTPServer|'s| |1|2|3|4|5|6|7|,| naïve| 日本|!\n\n| x|=~|y",
    "gpt-4o": "I'm| | HTTPServer's| |123|456|7|,| naïve| 日本|!\n\n| x|=~|y",
    "deepseek-v3": "I|'m| | HTTPServer|'s| |123|456|7|,| naïve| |日本|!\n\n| x|=~|y",
    "afmoe": "I|'m| | HTTPServer|'s| |1|234|567|,| naïve| |日本|!\n\n| x|=~|y",
    "superbpe": "I'm  HTTPServer's |1|234|567|, naïve 日本!\n\n x=~y",
    "bloom": "I'm| | HTTPServer's| 1234567|,| naïve| 日本|!\n\n| x=~y",
    "viking": "I'm| | HTTPServer's| |1|2|3|4|5|6|7|,| naïve| 日本|!\n\n| x=~y",
    "gemma4": "I'm  HTTPServer's 1234567, naïve 日本!|\n\n| x=~y",
}


def words(name: str, text: str) -> list[str]:
    entries = [entry for entry in PRE_TOKENIZERS[name].entries() if entry["type"] == "Split"]
    raw = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": entries}
    found = tokenizers.Tokenizer.from_str(json.dumps(raw)).pre_tokenizer
    assert found is not None
    return [word for word, _ in found.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", WORDS)
def test_words(name: str) -> None:
    assert words(name, TEXT) == WORDS[name].split("|")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_expression_runs_and_loses_nothing(name: str) -> None:
    for text in (TEXT, "", " ", "\r\n\t", "a" * 40, "½²٣ ʰǅ «»"):
        assert "".join(words(name, text)) == text


def test_which_take_whole_words_and_which_begin_with_a_token() -> None:
    """`whole_words` is tokenizer.json's ignore_merges."""
    assert {n for n, p in PRE_TOKENIZERS.items() if p.whole_words} >= {"llama-bpe", "tekken", "glm4", "falcon3"}
    assert {n for n, p in PRE_TOKENIZERS.items() if p.adds_bos} == {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        *("tekken", "chameleon", "gemma4", "granite-embed-multi-311m"),
    }
