"""Vocabularies are told apart by their own tokens, and added ones make no difference."""

import pytest
import tokenizers

from twotower.checkpoints.hf import load_tokenizer
from twotower.checkpoints.vocabulary import append_mask, fit
from twotower.training.corpus.spellings import difference, spellings


@pytest.fixture(scope="module")
def stories() -> tokenizers.Tokenizer:
    found = load_tokenizer("stories")
    assert found is not None
    return found


def test_some_tokens_from_first_to_last_are_spelled(stories: tokenizers.Tokenizer) -> None:
    held = spellings(stories)
    assert len(held) == 256
    assert (min(held), max(held)) == (4, stories.get_vocab_size() - 1)  # 0 to 3 are added ones
    assert all(stories.id_to_token(i) == name for i, name in held.items())


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_a_mask_added_tokens_and_one_left_out_make_no_difference(kind: str, stories: tokenizers.Tokenizer) -> None:
    plain = stories
    if kind == "Unigram":
        plain = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), *((c, -1.0) for c in "abc")], 0))
    held, size = spellings(plain), plain.get_vocab_size()
    masked = tokenizers.Tokenizer.from_str(append_mask(plain.to_str(), size + 3))
    masked.add_tokens(["<tool>"])
    without = tokenizers.Tokenizer.from_str(fit(masked.to_str(), size + 4).tokenizer)
    assert without.token_to_id("<tool>") is None
    for one in (masked, without):
        assert difference(held, one) is None
        assert difference(spellings(one), plain) is None


def test_the_first_token_of_another_vocabulary_is_named(stories: tokenizers.Tokenizer) -> None:
    hybrid = load_tokenizer("hybrid")
    assert hybrid is not None
    found = difference(spellings(stories), hybrid)
    assert found is not None
    assert (stories.id_to_token(found.token_id), hybrid.id_to_token(found.token_id)) == (found.held, found.found)
    assert found.held != found.found
    assert difference({5000: "far"}, hybrid) == (5000, "far", None)
