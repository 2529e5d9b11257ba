import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from twotower.checkpoints.vocabulary import append_mask, byte_token, fit, merge_closure, scored_bpe, scored_merges, trim

CONTROL = ["<unk>", "<s>", "</s>"]
BYTES = [byte_token(value) for value in range(256)]
FIRST_PIECE = len(CONTROL) + len(BYTES)
# Scores by place, best first; runs of spaces are worst, as in Llama.
PIECES = [" t", "he", " a", " the", "an", "aa", "aaa", "and", " and", "  ", "   ", "    ", " ", *"theandxyz", "é", "漢"]
NAMES = CONTROL + BYTES + PIECES
SCORES = [0.0] * FIRST_PIECE + [-float(i) - 1e6 * piece.isspace() for i, piece in enumerate(PIECES)]


def piece_id(piece: str) -> int:
    return FIRST_PIECE + PIECES.index(piece)


@pytest.fixture(scope="module")
def text() -> str:
    return scored_bpe(NAMES, SCORES, control=range(3), unknown=0, first_token=1)


@pytest.fixture(scope="module")
def tokenizer(text: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(text)


def reference_encode(text: str, names: Sequence[str] = NAMES, scores: Sequence[float] = SCORES) -> list[int]:
    """llama2.c's encoder: characters or bytes, then again and again the best-scored neighbours, leftmost on a tie."""
    pieces = {piece: i for i, piece in enumerate(names) if i >= FIRST_PIECE}
    ids: list[int] = []
    for character in f" {text}" if text else "":
        ids += [pieces[character]] if character in pieces else [3 + byte for byte in character.encode()]
    while True:
        best, place = -1e10, None
        for j, (left, right) in enumerate(itertools.pairwise(ids)):
            merged = pieces.get(names[left] + names[right])
            if merged is not None and min(left, right) >= FIRST_PIECE and scores[merged] > best:
                best, place = scores[merged], (j, merged)
        if place is None:
            return [1, *ids]
        ids[place[0] : place[0] + 2] = [place[1]]


def texts_of(alphabet: Sequence[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(alphabet), max_size=25).map("".join)


def test_encodes_as_the_reference_does(tokenizer: tokenizers.Tokenizer) -> None:
    @settings(max_examples=300, deadline=None)
    @given(texts_of([*PIECES, *"  abé𝒳\n", "\u2581"]))
    def check(text: str) -> None:
        assert tokenizer.encode(text).ids == reference_encode(text)

    check()


def test_llamas_runs_of_spaces_which_all_score_alike() -> None:
    lengths = [2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15, 1]  # by id
    names = [*CONTROL, *BYTES, " t", *(" " * n for n in lengths), "t"]
    scores = [0.0] * FIRST_PIECE + [-1.0] + [-1e9] * len(lengths) + [-2.0]
    tokenizer = tokenizers.Tokenizer.from_str(scored_bpe(names, scores, control=range(3), unknown=0, first_token=1))
    for n in range(1, 70):
        for text in (" " * n, "t" + " " * n + "t"):
            assert tokenizer.encode(text).ids == reference_encode(text, names, scores)


@pytest.mark.slow
@pytest.mark.parametrize("space_prefix", [True, False])
def test_lossless_for_any_text(space_prefix: bool) -> None:
    built = scored_bpe(NAMES, SCORES, control=range(3), unknown=0, first_token=1, space_prefix=space_prefix)
    tokenizer = tokenizers.Tokenizer.from_str(built)

    @settings(max_examples=500, deadline=None)
    @given(st.text() | texts_of([*PIECES, "\u2581", "<0x41>", "\x00", "\r\n", "\ufffd", "e\u0301", "🏴‍☠️"]))
    def check(text: str) -> None:
        assume(not any(control in text for control in CONTROL))  # those are tokens, which no text shows
        assert tokenizer.decode(tokenizer.encode(text).ids) == text

    check()


@pytest.mark.parametrize(
    ("given_text", "tokens"),
    [
        ("", ["<s>"]),
        ("the", ["<s>", " the"]),
        (" the", ["<s>", " ", " the"]),
        # " a" is merged first, and no piece is made of it and "n": " and" can't be reached
        ("and", ["<s>", " a", "n", "d"]),
        ("\u2581", ["<s>", " ", "<0xE2>", "<0x96>", "<0x81>"]),
        ("<0x41>", ["<s>", " ", "<0x3C>", "<0x30>", "x", "<0x34>", "<0x31>", "<0x3E>"]),
    ],
)
def test_known_encodings(tokenizer: tokenizers.Tokenizer, given_text: str, tokens: list[str]) -> None:
    assert tokenizer.encode(given_text).tokens == tokens


def test_control_tokens_are_read_in_texts_and_not_decoded(tokenizer: tokenizers.Tokenizer) -> None:
    """The exception to losslessness that `scored_bpe` names."""
    ids = tokenizer.encode("the</s>the").ids
    assert ids == [1, piece_id(" the"), 2, piece_id(" the")]
    assert tokenizer.decode(ids) == "the the"


def test_merges_rank_by_score_then_id_then_parts() -> None:
    pieces = ["x", "y", "xy", None, "yx", "xyx"]
    scores = [0.0, 0.0, -2.0, 0.0, -2.0, -1.0]
    assert scored_merges(pieces, scores) == [("x", "yx"), ("xy", "x"), ("x", "y"), ("y", "x")]


def test_no_merge_makes_or_uses_a_control_or_byte_token() -> None:
    assert scored_merges(["<", "s", None, "<s"], [0.0] * 4) == [("<", "s")]
    merges = scored_merges([None, None, "a", "b", "ab"], [0.0] * 5)
    assert merges == [("a", "b")]


def mergeable() -> list[str | None]:
    return [None if i < FIRST_PIECE else name for i, name in enumerate(NAMES)]


def test_closure_takes_a_piece_with_all_it_passes_through() -> None:
    kept = merge_closure(mergeable(), SCORES, [piece_id(" the")], 100)
    assert [NAMES[i] for i in kept] == [" t", "he", " the", " ", "t", "h", "e"]


def test_closure_leaves_out_what_merging_misses() -> None:
    pieces = ["a", "b", "c", "d", "bc", "ab", "abcd"]
    assert merge_closure(pieces, [0.0] * 7, [6], 10) == [], "no two pieces make abcd"
    assert merge_closure([*pieces, "abc"], [0.0] * 8, [6], 10) == [0, 1, 2, 3, 4, 6, 7], "a bc, abc d"
    assert merge_closure(mergeable(), SCORES, [piece_id(" and")], 100) == [], "see test_known_encodings"


def test_closure_fills_up_to_size_in_order_of_wanting() -> None:
    pieces = ["a", "b", "c", "ab", "abc"]
    scores = [0.0, 0.0, 0.0, -1.0, -2.0]
    assert merge_closure(pieces, scores, [4, 2], 4) == [2], "abc needs 5 places, c one"
    assert merge_closure(pieces, scores, [3, 4, 2], 4) == [0, 1, 2, 3]
    assert merge_closure(pieces, scores, [4, 0, 1], 5) == [0, 1, 2, 3, 4]
    assert merge_closure([None, "a"], [0.0, 0.0], [1, 0], 1) == [1]


def random_closure(seed: int, size: int) -> list[int]:
    ids = list(range(FIRST_PIECE, len(NAMES)))
    random.Random(seed).shuffle(ids)
    return merge_closure(mergeable(), SCORES, [*range(FIRST_PIECE), *ids], size)


def test_trimmed_rows_have_the_documented_order(text: str) -> None:
    keep = [piece_id("y"), piece_id(" t"), 200]
    trimmed = trim(text, keep)
    assert trimmed.mask_token_id == 3
    assert trimmed.rows == (0, 1, 2, 0, *range(3, 259), piece_id(" t"), piece_id("y"))
    assert trimmed.new_id(0) == 0, "the unknown token itself, not the mask that copies it"
    assert trimmed.new_id(3) == 4
    with pytest.raises(ValueError, match="is used by the config and not kept"):
        trimmed.new_id(piece_id("x"))
    tokenizer = tokenizers.Tokenizer.from_str(trimmed.tokenizer)
    assert tokenizer.token_to_id("<mask>") == 3
    assert [tokenizer.id_to_token(i) for i in (0, 1, 4, 259, 260)] == ["<unk>", "<s>", "<0x00>", "<0xFF>", " t"]
    assert tokenizer.get_vocab_size() == len(trimmed.rows)
    assert tokenizer.encode("<mask>y").ids == [1, 3, 3 + 1 + ord(" "), trimmed.new_id(piece_id("y"))]


@pytest.mark.slow
@pytest.mark.parametrize("size", [FIRST_PIECE, FIRST_PIECE + 9, FIRST_PIECE + 16])
def test_kept_tokens_encode_as_before(text: str, tokenizer: tokenizers.Tokenizer, size: int) -> None:
    kept = random_closure(size, size)
    trimmed = trim(text, kept)
    small = tokenizers.Tokenizer.from_str(trimmed.tokenizer)
    compared = 0

    @settings(max_examples=300, deadline=None)
    @given(texts_of([*PIECES, "é", "\n"]))
    def check(sample: str) -> None:
        nonlocal compared
        ids = tokenizer.encode(sample).ids
        if set(ids) <= set(kept):
            compared += 1
            assert small.encode(sample).ids == [trimmed.new_id(i) for i in ids]
        assert small.decode(small.encode(sample).ids) == sample

    check()
    assert compared > 0


def test_trim_refuses_other_vocabularies(text: str) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str()
    bytes_alone = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str()
    for other in (words, bytes_alone):
        with pytest.raises(ValueError, match="not a BPE with 256 byte tokens"):
            trim(other, [0])
    with pytest.raises(ValueError, match=r"keep_tokens has \[-1, 99999\], which are no tokens; ids are in \[0, "):
        trim(text, [5, -1, 99999])
    raw = json.loads(text)
    raw["post_processor"] = {"type": "Sequence", "processors": []}
    with pytest.raises(ValueError, match="post-processor is a Sequence, must be TemplateProcessing"):
        trim(json.dumps(raw), [5])


@pytest.mark.parametrize("beyond", [0, 7])
def test_appended_mask_has_the_asked_id(text: str, tokenizer: tokenizers.Tokenizer, beyond: int) -> None:
    mask = len(NAMES) + beyond
    masked = tokenizers.Tokenizer.from_str(append_mask(text, mask))
    assert masked.token_to_id("<mask>") == mask
    assert masked.encode("the<mask>").ids == [1, piece_id(" the"), mask]
    assert masked.decode([1, piece_id(" the"), mask]) == "the"
    sample = "the and </s> aaaa  é"
    assert masked.encode(sample).ids == tokenizer.encode(sample).ids


def test_a_tokenizer_with_a_mask_of_its_own_keeps_it(text: str) -> None:
    """As Gemma's: its mask is a token like any other, which the backbone may write."""
    taken = append_mask(text, len(NAMES))
    masked = tokenizers.Tokenizer.from_str(append_mask(taken, len(NAMES) + 1))
    assert masked.encode("the<mask><|mask|>").ids == [1, piece_id(" the"), len(NAMES), len(NAMES) + 1]
    trimmed = trim(taken, [5])
    small = tokenizers.Tokenizer.from_str(trimmed.tokenizer)
    assert small.token_to_id("<|mask|>") == trimmed.mask_token_id
    assert small.token_to_id("<mask>") == trimmed.new_id(len(NAMES))
    for i in range(2, 4):
        taken = append_mask(taken, len(NAMES) + i)
    with pytest.raises(ValueError, match=r"already has all of .* pass mask_token_id of one"):
        append_mask(taken, len(NAMES) + 9)


def test_mask_beyond_added_tokens_that_are_beyond_the_vocabulary() -> None:
    """Qwen's layout: added tokens follow the vocabulary, and the embedding is padded past both."""
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    plain.add_special_tokens(["<|end|>", "<|start|>"])
    masked = tokenizers.Tokenizer.from_str(append_mask(plain.to_str(), 9))
    assert masked.encode("a<|end|>b<|start|><mask>").ids == [0, 2, 1, 3, 9]


def test_appending_a_mask_is_refused_where_it_would_be_wrong(text: str) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str()
    with pytest.raises(ValueError, match="the tokenizer is a WordLevel, must be a BPE"):
        append_mask(words, 1)


def test_vocabularies_that_can_not_be_built() -> None:
    with pytest.raises(ValueError, match=r"holds the pieces \['z'\] more than once"):
        scored_bpe([*NAMES, "z"], [*SCORES, 0.0], control=range(3), unknown=0, first_token=1)
    with pytest.raises(ValueError, match="lacks 1 of 256 byte tokens, first <0x07>"):
        scored_bpe([n for n in NAMES if n != "<0x07>"], SCORES[1:], control=range(3), unknown=0, first_token=1)


def test_user_defined_pieces_are_matched_whole() -> None:
    built = scored_bpe(
        [*NAMES, "the end"],
        [*SCORES, 0.0],
        control=range(3),
        unknown=0,
        first_token=None,
        user_defined=[len(NAMES)],
    )
    tokenizer = tokenizers.Tokenizer.from_str(built)
    assert tokenizer.encode("the end").ids == [len(NAMES)]
    assert tokenizer.decode([len(NAMES)]) == "the end"


def test_built_tokenizers_are_in_the_librarys_own_form(text: str) -> None:
    for built in (text, append_mask(text, len(NAMES)), trim(text, [5]).tokenizer):
        assert tokenizers.Tokenizer.from_str(built).to_str(pretty=True) == built


def unigram() -> str:
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("▁a", -3.5)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer.to_str()


@pytest.mark.parametrize("mask", [5, 9])
def test_a_mask_behind_a_unigram_vocabulary_changes_no_encoding(mask: int) -> None:
    usual, found = (tokenizers.Tokenizer.from_str(text) for text in (unigram(), append_mask(unigram(), mask)))
    assert found.token_to_id("<mask>") == mask
    assert found.encode("a<mask>").ids[-1] == mask
    for text in ("a a</s>aa b", "aba", ""):
        assert found.encode(text).ids == usual.encode(text).ids


@pytest.mark.parametrize("text", ["unigram", "bpe"])
def test_added_tokens_without_a_row_are_encoded_as_ordinary_text(text: str, byte_tokenizer: Any) -> None:
    raw = tokenizers.Tokenizer.from_str(unigram() if text == "unigram" else byte_tokenizer.to_str())
    num_rows = raw.get_vocab_size()
    raw.add_special_tokens(["<pad>"])
    fitted = fit(raw.to_str(), num_rows)
    assert fitted.left_out == ("<pad>",)
    found = tokenizers.Tokenizer.from_str(fitted.tokenizer)
    assert raw.encode("a<pad>").ids[-1] == num_rows
    assert max(found.encode("a<pad>").ids) < num_rows
    assert found.encode("a</s>").ids == raw.encode("a</s>").ids


def test_a_tokenizer_whose_tokens_have_rows_is_kept_as_it_is(byte_tokenizer: Any) -> None:
    text = byte_tokenizer.to_str(pretty=True)
    assert fit(text, 260) == (text, ())
    assert fit(text, 300) == (text, ())


def test_a_vocabulary_larger_than_the_embedding_is_another_models(byte_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"has 2 tokens without a row in the embedding of 258, first .* with id 258"):
        fit(byte_tokenizer.to_str(), 258)
    processor = tokenizers.processors.TemplateProcessing("<pad> $A", None, [("<pad>", 260)])
    tokenizer = tokenizers.Tokenizer.from_str(byte_tokenizer.to_str())
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.post_processor = processor
    with pytest.raises(ValueError, match="first '<pad>' with id 260; take the tokenizer and the weights of one model"):
        fit(tokenizer.to_str(), 260)
