"""Anthropic's requests as chats."""

import pytest

from twotower.server.anthropic.protocol import MessagesRequest
from twotower.server.errors import ApiError


def chat(*messages, **fields):
    return MessagesRequest.model_validate({"messages": list(messages), **fields}).chat()


def said(*messages, **fields):
    return [(m.role, m.content, m.more) for m in chat(*messages, **fields).messages]


def text(words, **more):
    return {"type": "text", "text": words, **more}


USE = {"type": "tool_use", "id": "t1", "name": "add", "input": {"x": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "2"}
CALL = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "a"}], [("user", "a", {})]),
        ([{"role": "user", "content": [text("a"), text("b", cache_control={})]}], [("user", "a\nb", {})]),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": [text("b")]}],
            [("user", "a\nb", {})],
        ),
        (
            [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, text("a")]}],
            [("assistant", "a", {"reasoning_content": "hm"})],
        ),
        (
            [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, text("a")]}],
            [("assistant", "a", {})],
        ),
        (
            [{"role": "assistant", "content": [text("a"), USE]}, {"role": "user", "content": [RESULT, text("b")]}],
            [("assistant", "a", {"tool_calls": [CALL]}), ("tool", "2", {"tool_call_id": "t1"}), ("user", "b", {})],
        ),
        (
            [{"role": "user", "content": [RESULT | {"content": [text("2"), text("3")]}, RESULT | {"content": None}]}],
            [("tool", "2\n3", {"tool_call_id": "t1"}), ("tool", "", {"tool_call_id": "t1"})],
        ),
    ],
)
def test_blocks_are_what_a_chat_has_for_them(messages, expected):
    assert said(*messages) == expected


def test_the_system_text_comes_first():
    user = {"role": "user", "content": "a"}
    assert said(user, system="s")[0] == ("system", "s", {})
    assert said(user, system=[text("s"), text("t")])[0] == ("system", "s\nt", {})
    assert said(user, system=[]) == said(user)


def test_an_image_in_the_system_text_is_named():
    with pytest.raises(ApiError, match=r"system\.1 is a part of type"):
        chat({"role": "user", "content": "a"}, system=[text("s"), {"type": "image"}])


def test_settings_have_the_names_of_chats():
    asked = chat(
        {"role": "user", "content": "a"},
        max_tokens=3,
        stop="x",
        stop_sequences=["y"],
        top_k=4,
        min_p=0.5,
        thinking={"type": "disabled"},
        chat_template_kwargs={"b": 1},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    )
    assert (asked.max_tokens, asked.stop, asked.top_k, asked.min_p) == (3, ["x", "y"], 4, 0.5)
    assert asked.chat_template_kwargs == {"enable_thinking": False, "b": 1}
    assert asked.reasoning_effort == "low"
    assert asked.structure().text == '{"type": "object"}'
    assert asked.continue_final_message is None
