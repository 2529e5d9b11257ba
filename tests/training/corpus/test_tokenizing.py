import itertools

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from twotower.training.corpus import tokenizing
from twotower.training.corpus.documents import Document
from twotower.training.corpus.tokenizing import tokenized

WORDS = (
    "the",
    "fox",
    " sang",
    "don't",
    "I'll",
    "grüße",
    "日本語",
    "привет",
    "x_1",
    "(a)",
    "12345",
    "...",
    "<turn>",
    "\t",
)
BETWEEN = (" ", " ", " ", "  ", "\n", "\n\n", ", ", "")
# The patterns with which GPT-2's and Llama 3's tokenizers part words
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def text(size: int, words: tuple[str, ...] = WORDS) -> str:
    rng = np.random.default_rng(0)
    return "".join(itertools.chain.from_iterable(zip(rng.choice(words, size), rng.choice(BETWEEN, size), strict=True)))


def trained(pre: pre_tokenizers.PreTokenizer | None, normalizer: normalizers.Normalizer | None) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=pre is None, unk_token=None))
    alphabet = [f"<0x{value:02X}>" for value in range(256)]
    if pre is not None:
        tokenizer.pre_tokenizer = pre
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    # Lines: without a pre-tokenizer a line is a word, and long tokens span several words.
    tokenizer.train_from_iterator(text(2000).splitlines(), trainer)
    tokenizer.add_tokens([AddedToken("<turn>", lstrip=True, rstrip=True)])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


KINDS = {
    "GPT-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "with a space before": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "GPT-2 by pattern": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(GPT_2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        ),
        normalizers.NFC(),
    ),
    "Llama 3": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        ),
        None,
    ),
    "SentencePiece": (None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "Metaspace": (pre_tokenizers.Metaspace(), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    tokenizer = trained(*KINDS[kind])
    monkeypatch.setattr(tokenizing, "_PIECE", 600)
    document = Document("", text(12_000))
    parts = [found.ids for found in tokenized([document], tokenizer, 10**6, False) if found.in_text]
    assert len(parts) > 50
    assert np.concatenate(parts).tolist() == tokenizer.encode(document.text, add_special_tokens=False).ids


def test_a_text_without_a_place_to_cut_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained(*KINDS["GPT-2"])
    monkeypatch.setattr(tokenizing, "_PIECE", 600)
    monkeypatch.setattr(tokenizing, "_PLACES", ())
    parts = [found.ids for found in tokenized([Document("", "abc" * 1000)], tokenizer, 10**6, False) if found.in_text]
    assert len(parts) == 4
    assert tokenizer.decode(np.concatenate(parts).tolist()) == "abc" * 1000


def test_a_rendered_text_continues_its_prompt(byte_tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer = trained(*KINDS["SentencePiece"])
    prompt, answer = "the fox", " sang the fox"
    ids = [found.ids for found in tokenized([Document(prompt, answer, True)], tokenizer, 10**6, False)]
    assert np.concatenate(ids).tolist() == tokenizer.encode(prompt + answer, add_special_tokens=False).ids
