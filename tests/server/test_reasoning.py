"""Reasoning is split from what an answer says, in whatever pieces it comes."""

import itertools

import pytest

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.server.reasoning import Thought, ThoughtFormat, Thoughts, begins_in_thought, thought_format

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
        ("[user]hi[assistant]", None, True, False, True),
        ("[user]hi[assistant]", None, False, False, False),
        ("[user]hi[assistant]<think>\n", None, True, True, True),
        ("[user]hi[assistant]<think>\n\n</think>\n\n", None, True, False, False),
        ("[user]what is <think>?[assistant]", None, True, False, True),
        ("[assistant]<think>I wo", "<think>I wo", True, True, True),
        ("[assistant]<think>I</think>He", "<think>I</think>He", True, False, False),
        ("[assistant]He", "He", True, False, False),
    ],
)
def test_the_end_of_the_prompt_says_whether_the_answer_begins_in_reasoning(prompt, continued, thinks, marked, implied):
    for format, begins in ((THINK, marked), (THINK._replace(implied=True), implied)):
        assert begins_in_thought(format, prompt, continued, thinks=thinks) == begins
