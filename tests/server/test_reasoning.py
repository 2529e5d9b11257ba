"""Reasoning is split from what an answer says, in whatever pieces it comes."""

import itertools

import pytest

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.decoding.constraint import behind
from twotower.server.reasoning import Thought, ThoughtFormat, Thoughts, thought_at_start, thought_format, thought_rules

THINK = ThoughtFormat("<think>", "</think>")
# What an answer is -> its reasoning and the rest: of one that begins with a mark, and of one that is open already.
MARKED = [
    ("", "", ""),
    ("hello", "", "hello"),
    (" \n hello <think>no</think> \n", "", " \n hello <think>no</think> \n"),
    ("<think>why</think>hello", "why", "hello"),
    ("\n<think>\n why \n\n how\n</think>\n\n hello \n", "why \n\n how", "hello \n"),
    ("<think>\n\n</think>\n\nhello", "", "hello"),
    ("<think></think>", "", ""),
    ("<think>why</think> \n", "why", ""),
    ("</think>\n\nhello", "", "hello"),
    ("<think>why", "why", ""),
    ("<think>why \n", "why", ""),
    ("<think>why</thi", "why</thi", ""),
    ("<think>a<think>b</think>c</think>d", "a<think>b", "c</think>d"),
    ("<think>a</thi</think></think>b", "a</thi", "</think>b"),
    ("<think>a < b </ c </thin>", "a < b </ c </thin>", ""),
    ("<thin", "", "<thin"),
    (" <", "", " <"),
    ("<thinking>no</think>", "", "<thinking>no</think>"),
    (" \n", "", " \n"),
]
OPEN = [
    ("", "", ""),
    ("why</think>hello", "why", "hello"),
    ("\nwhy\n</think>\n\nhello", "why", "hello"),
    ("why \n\nhow", "why \n\nhow", ""),
    ("\n\n</think>\n\nhello", "", "hello"),
    ("<think>why</think>hello", "why", "hello"),
    ("<thinking</think>", "<thinking", ""),
    ("<thi", "<thi", ""),
    (" \n", "", ""),
]


def cuts(text):
    """The text in every way to cut it into at most four pieces, and in single characters."""
    yield list(text)
    for count in range(4):
        for places in itertools.combinations_with_replacement(range(len(text) + 1), count):
            yield [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def split(pieces, format, *, is_open):
    reader = Thoughts(format, open=is_open)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.end()
    kinds = [isinstance(part, Thought) for part in parts]
    assert kinds == sorted(kinds, reverse=True), "reasoning comes first"
    assert all(part.text if isinstance(part, Thought) else part for part in parts), "no part is empty"
    thoughts = "".join(part.text for part in parts if isinstance(part, Thought))
    return thoughts, "".join(part for part in parts if isinstance(part, str))


@pytest.mark.parametrize(
    ("is_open", "text", "thought", "rest"), [*((False, *case) for case in MARKED), *((True, *case) for case in OPEN)]
)
def test_reasoning_is_split_in_whatever_pieces_the_answer_comes(is_open, text, thought, rest):
    for pieces in cuts(text):
        assert split(pieces, THINK, is_open=is_open) == (thought, rest), pieces


def test_reasoning_goes_on_as_it_comes():
    reader = Thoughts(THINK, open=True)
    assert reader.push("\nwhy") == [Thought("why")]
    assert reader.push(" so ") == [Thought(" so")]
    assert reader.push("</t") == []
    assert reader.push("o") == [Thought(" </to")]
    assert reader.push("</think>a") == ["a"]
    assert reader.push(" ") == [" "]


@pytest.mark.parametrize(
    ("template", "parser", "format"),
    [
        ("{{ '<think>' }}", "auto", THINK),
        ("{{ content.split('</think>') }}", "auto", THINK),
        ("[THINK]", "auto", ThoughtFormat("[THINK]", "[/THINK]")),
        ("<seed:think>", "auto", ThoughtFormat("<seed:think>", "</seed:think>")),
        ("plain", "auto", None),
        (None, "auto", None),
        ("{{ '<think>' }}", "none", None),
        ("plain", "qwen3", THINK),
        (None, "deepseek_r1", THINK._replace(implied=True)),
    ],
)
def test_the_template_says_the_marks_unless_a_parser_is_named(template, parser, format):
    assert thought_format(parser, None if template is None else ChatTemplate(template, {})) == format


@pytest.mark.parametrize(
    ("prompt", "continued", "thinks", "marked", "implied"),
    [
        ("[user]hi[assistant]", None, True, "possible", "open"),
        ("[user]hi[assistant]", None, False, "over", "over"),
        ("[user]hi[assistant]<think>\n", None, True, "open", "open"),
        ("[user]hi[assistant]<think>\n\n</think>\n\n", None, True, "over", "over"),
        ("[user]what is <think>?[assistant]", None, True, "possible", "open"),
        ("[assistant]<think>I wo", "<think>I wo", True, "open", "open"),
        ("[assistant]<think>I</think>He", "<think>I</think>He", True, "over", "over"),
        ("[assistant]He", "He", True, "over", "over"),
    ],
)
def test_the_end_of_the_prompt_says_whether_the_answer_begins_in_reasoning(prompt, continued, thinks, marked, implied):
    for format, start in ((THINK, marked), (THINK._replace(implied=True), implied)):
        assert thought_at_start(format, prompt, continued, thinks=thinks) == start


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"const": 7}'),
        ("regex", "7/?"),
        ("grammar", 'start: seven\nseven: "7"'),
        ("grammar", 'root ::= "7"'),
        ("grammar", 'start: %json {"const": 7}'),
    ],
)
@pytest.mark.parametrize("own_tokens", [False, True])
def test_what_is_held_comes_behind_the_reasoning(kind, text, own_tokens):
    """`{` and `}` stand for tokens of their own, as of a tokenizer that has the marks as control tokens."""
    llguidance = pytest.importorskip("llguidance")
    vocabulary = [bytes([i]) for i in range(256)]
    added = {"<think>": 256, "</think>": 257} if own_tokens else {}
    tokens = llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Bytes([*vocabulary, b"\xff<think>", b"\xff</think>", b"\xff<end>"]))
    )
    marks = {"<think>": [256], "</think>": [257]} if own_tokens else {m: list(m.encode()) for m in THINK[:2]}
    opening, closing = marks.values()

    def matches(start, *parts):
        grammar = behind(kind, text, thought_rules(THINK, start, added))
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = [i for part in parts for i in (part if isinstance(part, list) else part.encode())] + [_Bytes.eos_token_id]
        return matcher.validate_tokens(ids) == len(ids)

    assert matches("over", "7")
    assert not matches("over", opening, "why", closing, "7")
    assert matches("possible", "7")
    assert matches("possible", opening, "why\n7 é… <thin", closing, "\n\n7")
    assert matches("possible", opening, closing, "7")
    assert not matches("possible", "why", closing, "7")
    assert not matches("possible", opening, "why")
    assert not matches("possible", opening, "why", closing, "8")
    assert not matches("possible", opening, "why", closing, "why", closing, "7")
    assert matches("open", "why\n", closing, "7")
    assert matches("open", closing, "7")
    assert not matches("open", "7")
    assert not matches("open", "why", closing, "8")


class _Bytes:
    """A vocabulary as llguidance reads it."""

    eos_token_id = 258
    bos_token_id = None

    def __init__(self, tokens):
        self.tokens = tokens
        self.special_token_ids = [256, 257, 258]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())
