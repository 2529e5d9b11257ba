import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from twotower.decoding.text import TextStream

SAMPLE = "Zoë 🦉 naïve 漢字, plain ASCII and 👩‍👩‍👧 \n" * 3


@pytest.fixture(scope="module")
def byte_fallback_tokenizer() -> tokenizers.Tokenizer:
    """As in SentencePiece: byte n is token 4 + n, and the decoder gives up on a whole run of bytes at once."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<mask>": 3} | {f"<0x{n:02X}>": 4 + n for n in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<mask>"])
    return tokenizer


@pytest.fixture(scope="module", params=["byte_tokenizer", "byte_fallback_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return request.getfixturevalue(request.param)


def tokens(text: str | bytes) -> list[int]:
    return [4 + byte for byte in (text.encode() if isinstance(text, str) else text)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pieces_join_to_the_text_and_hold_no_broken_character(size: int, tokenizer: tokenizers.Tokenizer) -> None:
    stream, ids = TextStream(tokenizer, (1,)), tokens(SAMPLE)
    pieces = [stream.push(ids[at : at + size]) for at in range(0, len(ids), size)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == stream.text == SAMPLE
    assert stream.flush() == ""


def test_a_character_comes_when_its_last_byte_does(tokenizer: tokenizers.Tokenizer) -> None:
    stream = TextStream(tokenizer, tuple(tokens("a")))
    assert [stream.push([t]) for t in tokens("b🦉é")] == ["b", "", "", "", "🦉", "", "é"]


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer: tokenizers.Tokenizer) -> None:
    stream = TextStream(tokenizer, (1,))
    assert [stream.push([t]) for t in tokens(b"ok\xf0\x9f")] == ["o", "k", "", ""]
    rest = stream.flush()
    assert set(rest) == {"\ufffd"}
    assert stream.text == "ok" + rest
    assert stream.flush() == ""


@pytest.mark.parametrize("text", [SAMPLE, "漢字" * 30, "🦉" * 40])
def test_a_prompt_may_end_anywhere_even_inside_a_character(text: str, tokenizer: tokenizers.Tokenizer) -> None:
    ids, data = tokens(text), text.encode()
    for at in range(0, len(ids), 5 if len(ids) > 60 else 1):
        stream = TextStream(tokenizer, tuple(ids[:at]))
        whole_characters = len(data[:at].decode(errors="ignore"))
        joined = "".join(stream.push([t]) for t in ids[at:]) + stream.flush()
        assert joined == text[whole_characters:]


def test_a_real_replacement_character_at_the_prompts_end_is_not_repeated(tokenizer: tokenizers.Tokenizer) -> None:
    stream = TextStream(tokenizer, tuple(tokens("a\ufffd")))
    assert stream.push(tokens("b")) + stream.flush() == "b"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_cut_off_by_the_end_spares_those_before_it(cut: int, tokenizer: tokenizers.Tokenizer) -> None:
    stream = TextStream(tokenizer, (1,))
    for token in tokens("漢字🦉".encode()[:-cut]):
        stream.push([token])
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.text.rstrip("\ufffd") == "漢字"
    assert len(stream.text) <= 2 + 4 - cut


def test_special_tokens_have_no_text(tokenizer: tokenizers.Tokenizer) -> None:
    stream = TextStream(tokenizer, (1, *tokens("a")))
    assert stream.push([*tokens("b"), 2, 3, *tokens("c")]) == "bc"


def test_a_word_keeps_its_leading_space_after_the_prompt() -> None:
    """SentencePiece decoders strip the first space of what they are given: the prompt's tail stands before it."""
    tokenizer = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([2]) == "b"
    stream = TextStream(tokenizer, (1,))
    assert [stream.push([t]) for t in (2, 3, 2)] == [" b", "c", " b"]


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=40), text=st.text(max_size=60), data=st.data())
def test_any_text_any_cut(tokenizer: tokenizers.Tokenizer, prompt: str, text: str, data: st.DataObject) -> None:
    stream, ids = TextStream(tokenizer, tuple(tokens(prompt))), tokens(text)
    pieces = []
    while ids:
        size = data.draw(st.integers(1, len(ids)))
        pieces.append(stream.push(ids[:size]))
        ids = ids[size:]
    pieces.append(stream.flush())
    assert "".join(pieces) == stream.text == text
