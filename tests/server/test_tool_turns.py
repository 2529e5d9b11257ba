"""Conversations with tools under templates that can't take them as they are."""

import pytest

from twotower.checkpoints.chat_template import ChatTemplate, Turn
from twotower.checkpoints.hf import resolve
from twotower.server.chat import render
from twotower.server.config import ServerConfig
from twotower.server.protocol import ChatRequest
from twotower.server.service import Service
from twotower.server.tool_turns import told, with_short_ids
from twotower.server.tools.hermes import Hermes

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
USER = {"role": "user", "content": "1 + 1?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
OTHER = {"id": "call_2", "type": "function", "function": {"name": "add", "arguments": "é"}}


def prompt(engine, template, **body):
    service = Service(engine, ServerConfig(), ChatTemplate(template, {}))
    made = ChatRequest.model_validate({"messages": [USER], **body})
    return render(service, made.messages, made)


def test_a_template_without_tools_has_them_described(engine):
    said = prompt(engine, LINES, tools=[ADD])
    assert said.startswith("user: You can call these functions:\n")
    assert '\n{"name": "add", "parameters": {"type": "object", "properties": {}}}\n' in said
    assert '<tool_call>\n{"name": "name", "arguments": {"parameter": "value"}}\n</tool_call>' in said
    assert said.endswith("\n\n1 + 1?\n")
    system = {"role": "system", "content": "Be kind."}
    assert prompt(engine, LINES, tools=[ADD], messages=[system, USER]).startswith("system: Be kind.\n\nYou can call")
    assert prompt(engine, LINES, tools=[ADD], tool_choice="none") == "user: 1 + 1?\n"
    assert prompt(engine, LINES) == "user: 1 + 1?\n"


def test_calls_and_results_are_text_where_the_template_knows_none(engine):
    messages = [
        USER,
        {"role": "assistant", "content": "I add.", "tool_calls": [CALL, OTHER]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "tool", "tool_call_id": "call_2", "content": "3"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "4"},
    ]
    call = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
    assert prompt(engine, LINES, messages=messages) == (
        f"user: 1 + 1?\nassistant: I add.\n{call}\n"
        '<tool_call>\n{"name": "add", "arguments": é}\n</tool_call>\n'
        "user: <tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>\n"
        f"assistant: {call}\nuser: <tool_response>\n4\n</tool_response>\n"
    )


def test_a_template_with_tools_gets_them_as_they_are(engine):
    each = "{% for m in messages %}{{ m.role }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    messages = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]
    assert prompt(engine, "{{ tools[0].function.name }}" + each, tools=[ADD], messages=messages) == (
        'adduserassistant[{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]tool'
    )


def test_tools_are_described_even_before_an_answer_alone():
    described, answer = told([Turn("assistant", "a")], [ADD], Hermes())
    assert (described.role, answer.content) == ("user", "a")


@pytest.mark.parametrize("check", ["!= 9", "< 9"])
def test_mistrals_templates_see_ids_of_nine_characters(check):
    turns = [
        Turn("assistant", "", {"tool_calls": [CALL, {"function": {"name": "f"}}, CALL | {"id": "abcDEF123"}]}),
        Turn("tool", "2", {"tool_call_id": "call_1"}),
        Turn("tool", "2"),
    ]
    [answer, result, other] = with_short_ids(
        turns, ChatTemplate("{% if tool_call.id|length " + check + " %}{% endif %}", {})
    )
    first, second, third = (call["id"] for call in answer.more["tool_calls"])
    assert len(first) == len(second) == 9
    assert third == "abcDEF123"
    assert result.more["tool_call_id"] == first
    assert other.more == {}
    assert with_short_ids(turns, ChatTemplate("", {})) == turns


@pytest.mark.parametrize("shipped", ["stories", "hybrid"])
def test_the_shipped_templates_take_a_conversation_with_tools(engine, shipped):
    template = ChatTemplate.load(resolve(shipped))
    service = Service(engine, ServerConfig(), template)
    messages = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]
    body = ChatRequest.model_validate({"messages": messages, "tools": [ADD]})
    said = render(service, body.messages, body)
    assert all(part in said for part in ('{"name": "add"', "<tool_call>", "<tool_response>\n2\n"))
