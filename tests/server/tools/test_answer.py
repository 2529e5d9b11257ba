"""Calls in texts of every format, and what only looks like one; in whatever pieces a text comes."""

import random

import pytest

from twotower.server.tools.answer import Answer, Marks
from twotower.server.tools.calls import Call
from twotower.server.tools.hermes import Hermes

FUNCTIONS = {"add": {"type": "object"}, "find": {"type": "object"}}
ADD, FIND = Call("add", '{"x": 1}'), Call("find", "{}")
HERMES_ADD = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
HERMES_FIND = '<tool_call>{"name":"find","arguments":{}}</tool_call>'


def parts(pieces, marks, *, one_call=False):
    answer = Answer(marks, FUNCTIONS, one_call=one_call)
    found = [part for piece in pieces for part in answer.push(piece)] + answer.end()
    text = "".join(part for part in found if isinstance(part, str))
    return text, [part for part in found if isinstance(part, Call)]


def cuts(text):
    """The text whole, in single characters, in two pieces at every place, and in random ones."""
    yield [text]
    yield list(text)
    yield from ([text[:i], text[i:]] for i in range(1, len(text)))
    for seed in range(20):
        places = sorted(random.Random(seed).choices(range(len(text) + 1), k=5))
        yield [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


CASES = {
    Hermes(): [
        ("", "", []),
        ("hello", "hello", []),
        ("  hello \n", "  hello \n", []),
        (HERMES_ADD, "", [ADD]),
        (f"\n\n{HERMES_ADD}\n", "", [ADD]),
        (f"I add.\n{HERMES_ADD}\n{HERMES_FIND}", "I add.", [ADD, FIND]),
        (f"{HERMES_ADD} and {HERMES_FIND}.", " and .", [ADD, FIND]),
        ('<tool_call>{"name": "add", "arguments": {"x": 1}}', "", [ADD]),  # ended without closing it
        ('<tool_call>{"name": "add", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [ADD]),
        ('<tool_call>{"name": "add", "parameters": {"x": 1}}</tool_call>', "", [ADD]),
        ('<tool_call>{"name": "find"}</tool_call>', "", [FIND]),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", [Call("other", "{}")]),
        (
            '<tool_call>{"name": "add", "arguments": {"x": "}</tool_call>\\"{é🎉"}}</tool_call>',
            "",
            [Call("add", '{"x": "}</tool_call>\\"{é🎉"}')],
        ),
        (
            '<tool_call>{"name": "add", "arguments": {"x": "a\nb"}}</tool_call>',
            "",
            [Call("add", '{"x": "a\\nb"}')],
        ),
        ('<tool_call>{"name": "add", "arguments": {"x": "\\ud800"}}', "", [Call("add", '{"x": "\\ud800"}')]),
        # what only begins like a call
        *((text, text, []) for text in ("<", "<tool_cal", "<tool_call>", "<tool_call> ", "a <tool_call> b", "<<<")),
        *(
            (text, text, [])
            for text in (
                '<tool_call>{"name": "add", "arguments": {"x": 1}',
                '<tool_call>{"name": "add", "arguments": no}</tool_call>',
                '<tool_call>{"name": "add", "arguments": "no"}</tool_call>',
                '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
                '<tool_call>{"name": "add", "arguments": {"x": NaN}}</tool_call>',
                '<tool_call>{"name": "add", "arguments": {"x": 1e999}}</tool_call>',
                '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
                '<tool_call>{"arguments": {}}</tool_call>',
                "<tool_call>{}</tool_call>",
                "<tool_call>[]</tool_call>",
                '<tool_call>{"name": "add\\',
            )
        ),
        (f"<tool_call> no {HERMES_ADD}", "<tool_call> no", [ADD]),
        (f"<tool_call>{{no}}</tool_call>{HERMES_ADD}", "<tool_call>{no}</tool_call>", [ADD]),
    ],
}


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [(format, *case) for format, cases in CASES.items() for case in cases],
    ids=lambda value: type(value).__name__ if isinstance(value, Hermes) else None,
)
def test_an_answer_is_content_and_calls_in_whatever_pieces_it_comes(format, text, content, calls):
    for pieces in cuts(text):
        assert parts(pieces, Marks(format)) == (content, calls), pieces


def test_one_call_is_all_that_is_asked_for():
    assert parts([HERMES_ADD + HERMES_FIND], Marks(Hermes()), one_call=True) == ("", [ADD])


def test_content_goes_on_as_soon_as_it_is_no_call():
    answer = Answer(Marks(Hermes()), FUNCTIONS)
    assert answer.push("a <tool_c") == ["a"]
    assert answer.push("alm") == [" <tool_calm"]
    assert answer.push("<tool_call>{") == []
    assert answer.push('"name": "find"}') == []
    assert answer.push("</tool_call>") == [FIND]


def test_deep_nesting_is_no_call():
    text = '<tool_call>{"name": "add", "arguments": ' + "[" * 100_000 + "]" * 100_000 + "}</tool_call>"
    assert parts([text], Marks(Hermes())) == (text, [])


@pytest.mark.parametrize("size", [1, 7])
def test_a_long_call_is_read_once(size):
    text = "{}" * 100_000
    call = f'<tool_call>{{"name": "find", "arguments": {{"q": "{text}"}}}}</tool_call>'
    answer = Answer(Marks(Hermes()), FUNCTIONS)
    pieces = [call[i : i + size] for i in range(0, len(call), size)]
    assert [part for piece in pieces for part in answer.push(piece)] == [Call("find", f'{{"q": "{text}"}}')]
