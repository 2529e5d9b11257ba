"""Calls and reasoning in responses, as OpenAI's client sees them: a regular expression says what the model writes."""

import json
import re

import openai
import pytest

pytest.importorskip("llguidance")

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS = [
    {"type": "function", "name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": True},
    {"type": "function", "name": "find", "parameters": None},
]
ARGUMENTS = '{"x": 1, "y": "é🎉"}'
ADD = f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>'
FIND = '<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>'
ADDED, FOUND = ("function_call", "add", ARGUMENTS), ("function_call", "find", "{}")

# A random model would reason where it may.
PLAIN = {"mode": "ar", "seed": 0, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def client(obedient_url):
    return openai.OpenAI(base_url=f"{obedient_url}/v1", api_key="none", max_retries=0)


def asked(text, **settings):
    """A request whose answer is a text, its reasoning included."""
    extra = {"regex": re.escape(text), **PLAIN}
    return {"model": "tiny", "input": "hi", "tools": TOOLS, "extra_body": extra, **settings}


def items(response):
    def told(item):
        return (item.name, item.arguments) if item.type == "function_call" else (item.content[0].text,)

    return [(item.type, *told(item)) for item in response.output]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hello", [("message", "hello")]),
        (ADD, [ADDED]),
        (f"I add.\n{ADD}\n{FIND}", [("message", "I add."), ADDED, FOUND]),
        ("<think>\nhm\n</think>\n\nhi", [("reasoning", "hm"), ("message", "hi")]),
        (f"<think>hm</think>{FIND}", [("reasoning", "hm"), FOUND]),
    ],
)
def test_whole_and_streamed_are_one_response(client, text, found):
    whole = client.responses.create(**asked(text))
    events = list(client.responses.create(**asked(text), stream=True))
    with client.responses.stream(**asked(text)) as stream:
        accumulated = stream.get_final_response()
    for response in (whole, events[-1].response, accumulated):
        assert (items(response), response.status) == (found, "completed")
        assert all(item.status == "completed" for item in response.output)
        assert len({item.id for item in response.output}) == len(found)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == events[-1].response.output
    assert whole.usage.output_tokens_details.reasoning_tokens == (len("hm") if "think" in text else 0)


def test_events_of_a_call_and_of_reasoning(client):
    events = list(client.responses.create(**asked(f"<think>hm</think>{ADD}"), stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    kinds = [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]  # pieces are as many as steps
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    begun = next(e for e in events if e.type == "response.output_item.added" and e.output_index == 1)
    assert (begun.item.name, begun.item.arguments, begun.item.status) == ("add", "", "in_progress")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"tool_choice": "none"}, [("message", f"{ADD}{FIND}")]),
        ({"parallel_tool_calls": False}, [ADDED]),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]}},
            [ADDED, FOUND],
        ),
    ],
)
def test_a_choice_says_what_may_be_called(client, settings, found):
    response = client.responses.create(**asked(f"{ADD}{FIND}", **settings))
    assert items(response) == found
    assert [tool.name for tool in response.tools] == ["add", "find"]


SHORT = {"type": "object", "properties": {"unit": {"enum": ["°C", "K"]}}, "required": ["unit"]}
NAMED = {"type": "function", "name": "measure"}


@pytest.mark.parametrize("choice", ["required", NAMED, {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}])
def test_a_call_may_be_demanded(client, choice):
    tools = [{"type": "function", "name": "measure", "parameters": SHORT}]
    request = {"model": "tiny", "input": "hi", "tools": tools, "tool_choice": choice, "max_output_tokens": 500}
    response = client.responses.create(**request, parallel_tool_calls=False, extra_body=PLAIN)
    [call] = response.output
    assert (response.status, call.name) == ("completed", "measure")
    assert json.loads(call.arguments)["unit"] in ("°C", "K")


def test_a_schema_that_no_call_can_follow_is_named(client):
    schema = {"type": "object", "properties": {"x": {"type": "no"}}}
    tools = [{"type": "function", "name": "measure", "parameters": schema}]
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(model="tiny", input="hi", tools=tools, tool_choice="required")
    assert raised.value.param == "tools.0.parameters"
    assert raised.value.body["message"].startswith("tools.0.parameters is")


def test_a_response_and_the_outputs_of_its_calls_are_sent_back(client):
    said = [{"role": "user", "content": "hi"}]
    first = client.responses.create(**asked(f"<think>hm</think>ok{ADD}", input=said))
    call = first.output[-1]
    said += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "2"}]
    second = client.responses.create(**asked("3", input=said) | {"tools": []})
    assert items(second) == [("message", "3")]
    shown = {"id": call.call_id, "type": "function", "function": {"name": "add", "arguments": json.loads(ARGUMENTS)}}
    assert second.usage.input_tokens == len(f"[user]hi[assistant]okhm{[shown]}[tool]2".encode())
