"""Calls in texts of every format, and what only looks like one; in whatever pieces a text comes."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.server.tools.answer import Answer, Marks
from twotower.server.tools.calls import Call
from twotower.server.tools.hermes import Hermes
from twotower.server.tools.json_list import JsonList
from twotower.server.tools.llama3 import Llama3
from twotower.server.tools.mistral import Mistral
from twotower.server.tools.xml import FunctionXml

FUNCTIONS = {"add": {"type": "object", "properties": {"x": {"type": "integer"}}}, "find": {"type": "object"}}
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


HERMES = [
    ("", "", []),
    ("hello", "hello", []),
    ("  hello \n", "  hello \n", []),
    (HERMES_ADD, "", [ADD]),
    (f"\n\n{HERMES_ADD}\n", "", [ADD]),
    (f"I add.\n{HERMES_ADD}\n{HERMES_FIND}", "I add.", [ADD, FIND]),
    (f"{HERMES_ADD} and {HERMES_FIND}.", " and .", [ADD, FIND]),
    ('<tool_call>{"name": "add", "arguments": {"x": 1}}', "", [ADD]),  # ended without closing it
    (f"{HERMES_ADD[:-3]}", "", [ADD]),  # cut while it closed it
    ('<tool_call>{"name": "add", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [ADD]),
    ('<tool_call>{"name": "add", "parameters": {"x": 1}}</tool_call>', "", [ADD]),
    ('<tool_call>{"name": "find"}</tool_call>', "", [FIND]),
    ('<tool_call>[{"name": "find"}, {"name": "add", "arguments": {"x": 1}}]</tool_call>', "", [FIND, ADD]),
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
]

LLAMA_ADD = '{"name": "add", "parameters": {"x": 1}}'
LLAMA3 = [
    ("hello", "hello", []),
    (LLAMA_ADD, "", [ADD]),
    (f" {LLAMA_ADD} ", "", [ADD]),
    (f"<|python_tag|>{LLAMA_ADD}", "", [ADD]),
    (f'{LLAMA_ADD}; {{"name": "find", "parameters": {{}}}}', "", [ADD, FIND]),
    (f'<|python_tag|>{LLAMA_ADD};{{"name": "find", "parameters": {{}}}}', "", [ADD, FIND]),
    (f"I add.\n{LLAMA_ADD}", "I add.", [ADD]),
    ('{"type": "function", "function": {"name": "add", "parameters": {"x": 1}}}', "", [ADD]),
    ('{\n  "name": "add",\n  "parameters": {"x": 1}\n}', "", [ADD]),
    ('<|python_tag|>{"name": "other", "parameters": {}}', "", [Call("other", "{}")]),
    # JSON that is an answer
    *(
        (text, text, [])
        for text in (
            '{"name": "other", "parameters": {}}',
            '{"name": "add"}',
            '{"colour": "red"}',
            f"Such as {LLAMA_ADD}",
            '{"name": "add", "parameters": {"x": 1}',
            "{",
            "{}",
            "if (a) {\n  b;\n}\n",
            "<|python_tag|>print(1)",
            "<|python",
            '{"name": "add", "parameters": {"x": }}',
        )
    ),
]
MISTRAL_ADD = '[TOOL_CALLS][{"name": "add", "arguments": {"x": 1}}'
MISTRAL = [
    ("hello", "hello", []),
    (f"{MISTRAL_ADD}]", "", [ADD]),
    (f'{MISTRAL_ADD}, {{"name": "find", "arguments": {{}}, "id": "abcdefghi"}}]', "", [ADD, FIND]),
    (f"I add. {MISTRAL_ADD}]", "I add.", [ADD]),
    ('[TOOL_CALLS] [{"arguments": {"x": 1}, "name": "add"}]', "", [ADD]),
    ('[TOOL_CALLS]add[ARGS]{"x": 1}', "", [ADD]),
    ('[TOOL_CALLS]add[ARGS]{"x": 1}[TOOL_CALLS]find[ARGS]{}', "", [ADD, FIND]),
    ('[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]{"x": 1}', "", [ADD]),
    ('[TOOL_CALLS]add{"x": 1}', "", [ADD]),
    ('[TOOL_CALLS]{"name": "add", "arguments": {"x": 1}}', "", [ADD]),
    *(
        (text, text, [])
        for text in (
            "[TOOL",
            "[TOOL_CALLS]",
            "[TOOL_CALLS]add",
            "[TOOL_CALLS]add[ARGS]",
            '[TOOL_CALLS]add[ARGS]{"x": 1',
            "[TOOL_CALLS]add[ARGS]{x}",
            "[TOOL_CALLS]what is it? {}",
            "[TOOL_CALLS]add[NO]{}",
            "[TOOL_CALLS][]",
            "[TOOL_CALLS][1]",
            "[TOOL_CALLS]" + "a" * 400,
            "[1, 2]",
        )
    ),
]
XML_ADD = "<tool_call>\n<function=add>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
XML_FIND = "<tool_call><function=find></function></tool_call>"
XML = [
    ("hello", "hello", []),
    (XML_ADD, "", [ADD]),
    (f"I add.\n\n{XML_ADD}\n{XML_FIND}\n", "I add.", [ADD, FIND]),
    ("<function=add><parameter=x>1</parameter></function>", "", [ADD]),
    ("<function=find>\n</function>\n</tool_call>", "", [FIND]),
    ('<function=add>{"x": 1}</function>', "", [ADD]),
    ('<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>', "", [ADD]),
    (
        "<tool_call><function=find>\n<parameter=q>\n <a>\n</b>\n\n</parameter><parameter=z>2</parameter></function>",
        "",
        [Call("find", '{"q": " <a>\\n</b>\\n", "z": "2"}')],
    ),
    *(
        (text, text, [])
        for text in (
            "<tool_call>",
            "<function=",
            "<function=add",
            "<function=add>",
            "<function=add><param",
            "<function=add><parameter=x>1",
            "<function=add><parameter=x>1</parameter>",
            "<function=add>no</function>",
            "<function=add>{no}</function>",
            "<function=add>[1]</function>",
            "<tool_call><func",
            "<tool_call> no",
            "<function=" + "a" * 400,
            "<function=add><parameter=x\n</parameter></function>",
        )
    ),
]
JSON_ADD = '[{"name": "add", "arguments": {"x": 1}}]'
JSON = [
    ("hello", "hello", []),
    (JSON_ADD, "", [ADD]),
    ('{"name": "add", "arguments": {"x": 1}}', "", [ADD]),
    (f"I add.\n{JSON_ADD}", "I add.", [ADD]),
    ('[{"name": "add", "arguments": {"x": 1}}, {"name": "find", "arguments": {}}]', "", [ADD, FIND]),
    (f"<TOOLCALL>{JSON_ADD}</TOOLCALL>", "", [ADD]),
    (f"<|tool_call|>{JSON_ADD}", "", [ADD]),
    (f"<tool_calls>\n{JSON_ADD}\n</tool_calls>", "", [ADD]),
    (f"functools{JSON_ADD}", "", [ADD]),
    (f"I add.\n```json\n{JSON_ADD}\n```\n", "I add.", [ADD]),
    (f"```json\n{JSON_ADD}", "", [ADD]),
    ('```json\n[{"name": "other", "arguments": {}}]\n```', '```json\n[{"name": "other", "arguments": {}}]\n```', []),
    (
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "add", "parameters": {"x": 1}}]<|END_ACTION|>',
        "",
        [ADD],
    ),
    *(
        (text, text, [])
        for text in (
            '[{"name": "add", "arguments": {"x": 1}}',
            '[{"name": "other", "arguments": {}}]',
            '[{"name": "add", "arguments": {}}, {"name": "other", "arguments": {}}]',
            "[1, 2, 3]",
            "[link](https://example.org)",
            f"Such as {JSON_ADD}",
            "<TOOLCALL>no</TOOLCALL>",
            "<TOOLCALL>[]</TOOLCALL>",
            "functools[no]",
            "<|tool",
        )
    ),
]
FORMATS = [
    *((Hermes(), case) for case in HERMES),
    *((Llama3(), case) for case in LLAMA3),
    *((Mistral(named=False), case) for case in MISTRAL),
    *((FunctionXml(), case) for case in XML),
    *((JsonList(), case) for case in JSON),
]


@pytest.mark.parametrize(("format", "case"), FORMATS, ids=[f"{type(f).__name__}-{c[0][:50]!r}" for f, c in FORMATS])
def test_an_answer_is_content_and_calls_in_whatever_pieces_it_comes(format, case):
    text, content, calls = case
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


@pytest.mark.parametrize(
    "format",
    [Hermes(), Llama3(), Mistral(named=False), Mistral(named=True), FunctionXml(), JsonList(), JsonList("<TOOLCALL>")],
)
def test_what_a_format_writes_it_reads(format):
    calls = [
        Call("add", '{"x": 1}'),
        Call("find", '{"q": "a \\"b\\" </tool_call> {", "é": "🎉\\n"}'),
        Call("find", "{}"),
    ]
    text = format.write(calls)
    for pieces in cuts(text):
        assert parts(pieces, Marks(format)) == ("", calls)


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<function=add>", "<function=", "</function>", "<parameter=x>", "</parameter>"),
    *("[TOOL_CALLS]", "[ARGS]", "[", "]", "{", "}", '{"name": "add", "arguments": {"x": 1}}', '"', "\\", ",", ";", "a"),
    *(
        '{"name": "find", "parameters": {}}',
        "add",
        "<|python_tag|>",
        "<TOOLCALL>",
        "</TOOLCALL>",
        "functools[",
        "```json",
        "```",
        "\n",
        " ",
    ),
    *("1", "<", ">", "é", '{"name": ', '"add"', "<|tool_call|>"),
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.lists(st.integers(0, 200), max_size=8),
    st.booleans(),
)
def test_pieces_make_no_difference_to_any_text(text, places, one_call):
    ends = sorted({place for place in places if place < len(text)})
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    for format in (Hermes(), Llama3(), Mistral(named=False), FunctionXml(), JsonList()):
        marks = Marks(format)
        whole = parts([text], marks, one_call=one_call)
        assert parts(pieces, marks, one_call=one_call) == whole
        assert parts(list(text), marks, one_call=one_call) == whole
        assert whole[1] or whole[0] == text


@pytest.mark.parametrize(
    ("marks", "unit"),
    [
        (Marks(Hermes()), "<tool_call>{"),
        (Marks(Mistral(named=True)), "[TOOL_CALLS]find[ARGS]{"),
        (Marks(JsonList()), '\n```json\n{"name":'),
        (Marks(FunctionXml()), "<function=find>\n<parameter=x>\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_text_that_begins_calls_again_and_again_is_read_in_linear_time(marks, unit):
    text = f"a{unit * 20_000}".rstrip()
    began = time.process_time()
    assert parts([text], marks) == (text, [])
    assert time.process_time() - began < 10  # 0.2 s each; in the square of the length it is minutes
