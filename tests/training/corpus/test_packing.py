import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from twotower.config import TwoTowerConfig
from twotower.training.corpus.documents import Document, LongText
from twotower.training.corpus.packing import pack
from twotower.training.corpus.text import TextConfig

MODEL = TwoTowerConfig(vocab_size=260, hidden_size=8, pattern="-", intermediate_size=8, bos_token_id=1, eos_token_id=2)


def rows(documents: list[Document], tokenizer: tokenizers.Tokenizer, length: int, **config: bool) -> list[tuple]:
    packed = pack(documents, tokenizer, MODEL, TextConfig(length=length, **config))
    return [tuple(part.tolist() for part in found.row) for found in packed]


def test_documents_are_packed_and_cut(byte_tokenizer: tokenizers.Tokenizer) -> None:
    a, b = 4 + ord("a"), 4 + ord("b")
    found = rows([Document("", "aa"), Document("", "bba"), Document("", "")], byte_tokenizer, 6)
    assert found == [
        # neither is BOS scored, nor what fills the last row
        ([1, a, a, 2, 1, b], [False, True, True, True, False, True], [0, 0, 0, 0, 1, 1]),
        ([b, a, 2, 1, 1, 1], [True, True, True, False, False, False], [0, 0, 0, 1, 1, 1]),
    ]


def test_a_long_document_goes_on_as_another_one(byte_tokenizer: tokenizers.Tokenizer) -> None:
    found = rows([Document("", "abcdefgh")], byte_tokenizer, 5)
    assert [row[0] for row in found] == [[1, *range(4 + 97, 4 + 101)], [*range(4 + 101, 4 + 105), 2]]
    assert [row[1] for row in found] == [[False, *[True] * 4], [True] * 5]


def spelled(text: str) -> list[int]:
    return [4 + byte for byte in text.encode()]


def test_names_of_control_tokens_are_tokens_in_prompts_alone(byte_tokenizer: tokenizers.Tokenizer) -> None:
    document = Document("</s><mask>", "a</s><mask>")
    with pytest.warns(UserWarning, match="spells </s>, which is learnt as text; --control-tokens"):
        ((ids, scored, _),) = rows([document], byte_tokenizer, 21)
    assert ids == [1, 2, *spelled("<mask>a</s><mask>"), 2, 1][:21]
    assert scored == [False] * 8 + [True] * 12 + [False]
    assert byte_tokenizer.encode("</s>").ids == [2]  # the caller's tokenizer is as it was


def test_texts_have_control_tokens_where_that_is_asked_for_but_no_mask(byte_tokenizer: tokenizers.Tokenizer) -> None:
    ((ids, scored, _),) = rows([Document("", "a</s><mask>")], byte_tokenizer, 10, control_tokens=True)
    assert ids == [1, *spelled("a"), 2, *spelled("<mask>"), 2]
    assert scored == [False] + [True] * 9


def test_a_prompt_that_brings_its_bos_gets_no_other(byte_tokenizer: tokenizers.Tokenizer) -> None:
    ((ids, scored, _),) = rows([Document("<s>a", "b")], byte_tokenizer, 4)
    assert (ids, scored) == ([1, *spelled("ab"), 2], [False, False, True, True])
    ((ids, scored, _),) = rows([Document("", "<s>ab")], byte_tokenizer, 4, control_tokens=True)
    assert (ids, scored) == ([1, *spelled("ab"), 2], [False, True, True, True])


def test_the_name_of_the_mask_is_text_though_the_tokenizer_does_not_mark_it_as_special(
    byte_tokenizer: tokenizers.Tokenizer,
) -> None:
    raw = json.loads(byte_tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["special"] = False
    words = tokenizers.Tokenizer.from_str(json.dumps(raw))
    ((ids, _, _),) = rows([Document("", "a<mask>b")], words, 10)
    assert ids == [1, *spelled("a<mask>b"), 2][:10]


def test_a_mask_that_is_a_word_of_the_vocabulary_is_not_scored() -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<mask>": 3, "a": 4, "b": 5}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ((ids, scored, _),) = rows([Document("", "a <mask> b")], words, 5)
    assert ids == [1, 4, 3, 5, 2]
    assert scored == [False, True, False, True, True]


def test_prompts_stay_with_their_texts(byte_tokenizer: tokenizers.Tokenizer) -> None:
    documents = [Document("p" * 3, "abc"), Document("q" * 3, "abcd"), Document("", "ef"), Document("r", "g")]
    packed = list(pack(documents, byte_tokenizer, MODEL, TextConfig(length=12, prompt_field="prompt")))
    found = [tuple(part.tolist() for part in row) for row, *_ in packed]
    # the short ones go into what the first leaves; nothing is cut
    p, q = [1, *spelled("pppabc"), 2], [1, *spelled("qqqabcd"), 2]
    assert found[0] == (
        [*p, 1, *spelled("ef"), 2],
        [False] * 4 + [True] * 4 + [False] + [True] * 3,
        [0] * 8 + [1] * 4,
    )
    assert found[1][0] == [*q, 1, 1, 1]
    assert found[1][1] == [False] * 4 + [True] * 5 + [False] * 3
    assert found[1][2] == [0] * 9 + [1] * 3
    assert [(num_padding, num_lost) for _, num_padding, num_lost in packed] == [(0, 0), (3, 0), (8, 0)]


def test_what_is_longer_than_a_row_keeps_its_prompts_end_and_its_texts_beginning(
    byte_tokenizer: tokenizers.Tokenizer,
) -> None:
    def cut(prompt: str, text: str) -> tuple[list[int], list[bool], int]:
        config = TextConfig(length=9, prompt_field="prompt")
        (((ids, scored, _), num_padding, num_lost),) = pack([Document(prompt, text)], byte_tokenizer, MODEL, config)
        assert num_padding == 0
        return ids.tolist(), scored.tolist(), num_lost

    assert cut("01234567", "abcdefgh") == ([1, *spelled("4567abcd")], [False] * 5 + [True] * 4, 9)
    # a short text is left whole, and a short prompt
    assert cut("0123456789", "a") == ([1, *spelled("456789a"), 2], [False] * 7 + [True] * 2, 4)
    assert cut("01", "abcdefgh") == ([1, *spelled("01abcdef")], [False] * 3 + [True] * 6, 3)


def test_more_documents_than_rows_can_wait_are_all_there_once(byte_tokenizer: tokenizers.Tokenizer) -> None:
    documents = [Document("p", chr(97 + n % 26) * (1 + 7 * n % 17)) for n in range(600)]
    packed = list(pack(documents, byte_tokenizer, MODEL, TextConfig(length=20, prompt_field="prompt")))
    texts = [tuple(d.text.encode()) for d in documents]
    found = []
    for row, *_ in packed:
        for number in set(row.document[row.scored].tolist()):
            own = row.ids[(row.document == number) & row.scored]
            found.append(tuple((own[:-1] - 4).tolist()))
            assert own[-1] == 2
    assert sorted(found) == sorted(texts)
    assert sum(p.num_padding for p in packed) < 0.1 * 20 * len(packed)


def test_a_rendered_text_ends_with_its_own_end_token_and_has_control_tokens(
    byte_tokenizer: tokenizers.Tokenizer,
) -> None:
    ((ids, scored, _),) = rows([Document("<s>q", "a</s>\n", rendered=True)], byte_tokenizer, 6)
    assert ids == [1, *spelled("qa"), 2, 1, 1]
    assert scored == [False, False, True, True, False, False]
    ((ids, _, _),) = rows([Document("<s>q", "a", rendered=True)], byte_tokenizer, 4)
    assert ids == [1, *spelled("qa"), 2]


@pytest.mark.parametrize("prompt_field", [None, "prompt"])
def test_a_document_is_packed_alike_whole_and_in_chunks(
    byte_tokenizer: tokenizers.Tokenizer, prompt_field: str | None
) -> None:
    text = "".join(chr(97 + n % 26) if n % 7 else " " for n in range(150_000))
    chunked = Document("", LongText(lambda: iter([text[:70_000], text[70_000:70_001], text[70_001:]])))
    config = TextConfig(length=1000, prompt_field=prompt_field)
    whole, parts = (
        [(*row, lost) for row, _, lost in pack([Document("", "a"), document], byte_tokenizer, MODEL, config)]
        for document in (Document("", text), chunked)
    )
    assert len(whole) == (151 if prompt_field is None else 2)
    for one, other in zip(whole, parts, strict=True):
        assert all((a == b).all() for a, b in zip(one[:3], other[:3], strict=True))
        assert one[3] == other[3]
    if prompt_field is not None:
        assert {row[3] for row in whole} == {0, 150_002 - 1000}
