"""Items as messages of a chat."""

import pytest

from twotower.server.errors import ApiError
from twotower.server.responses.items import InputItem, chat_messages


def said(*items, instructions=None):
    messages = chat_messages(instructions, [InputItem.model_validate(item) for item in items])
    return [(m.role, m.content, m.more) for m in messages]


def message(role, *texts, kind="input_text"):
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text} for text in texts]}


ASKED = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "c1",
    "name": "add",
    "arguments": '{"x": 1}',
    "status": "completed",
}
GIVEN = {"type": "function_call_output", "call_id": "c1", "output": "2"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([{"role": "user", "content": "a"}], [("user", "a", {})]),
        ([message("user", "a", "b")], [("user", "a\nb", {})]),
        ([message("assistant", "a", kind="output_text") | {"id": "msg_1", "status": None}], [("assistant", "a", {})]),
        ([message("user", "a"), message("user", "b")], [("user", "a", {}), ("user", "b", {})]),
        ([ASKED, GIVEN], [("assistant", "", {"tool_calls": [CALL]}), ("tool", "2", {"tool_call_id": "c1"})]),
        (
            [THOUGHT, message("assistant", "a", kind="output_text"), ASKED, ASKED, GIVEN],
            [
                ("assistant", "a", {"reasoning_content": "hm", "tool_calls": [CALL, CALL]}),
                ("tool", "2", {"tool_call_id": "c1"}),
            ],
        ),
        (
            [THOUGHT | {"content": None, "summary": [{"type": "summary_text", "text": "hm"}]}, THOUGHT],
            [("assistant", "", {"reasoning_content": "hm\nhm"})],
        ),
        ([THOUGHT | {"content": [], "encrypted_content": "x"}], [("assistant", "", {})]),
        ([GIVEN | {"output": [{"type": "input_text", "text": "2"}]}], [("tool", "2", {"tool_call_id": "c1"})]),
        ([GIVEN | {"output": {"x": 2}}], [("tool", '{"x": 2}', {"tool_call_id": "c1"})]),
    ],
)
def test_items_are_what_a_chat_has_for_them(items, expected):
    assert said(*items) == expected


def test_instructions_come_first_and_are_one_with_a_message_of_the_system():
    assert said(message("user", "a"), instructions="be kind") == [("system", "be kind", {}), ("user", "a", {})]
    assert said(message("developer", "b"), instructions="be kind") == [("developer", "be kind\nb", {})]


def test_a_text_is_what_the_user_says():
    assert [(m.role, m.content) for m in chat_messages(None, "hi")] == [("user", "hi")]


@pytest.mark.parametrize(
    ("item", "error"),
    [
        ({"type": "message"}, "input.0.role is missing"),
        (ASKED | {"name": None}, "input.0.name is missing"),
        (ASKED | {"call_id": 3}, "input.0.call_id must be a text"),
        (GIVEN | {"call_id": None}, "input.0.call_id is missing"),
        (GIVEN | {"output": [{"type": "input_image"}]}, 'input.0.output.0 is a part of type "input_image"'),
        ({"type": "mcp_call"}, 'input.0 is an item of type "mcp_call", which this server can\'t read; leave it out'),
    ],
)
def test_an_item_that_cannot_be_read_is_named(item, error):
    with pytest.raises(ApiError) as raised:
        said(item)
    assert raised.value.detail.startswith(error)
