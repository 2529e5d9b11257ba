"""Tools in chats, as OpenAI's clients use them: a regular expression says what the model writes."""

import json
import re

import httpx
import openai
import pydantic
import pytest

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.engine.aio import AsyncEngine
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

pytest.importorskip("llguidance")

TEMPLATE = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{{ messages[-1].content }}<tool_call>"
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
FIND = {"type": "function", "function": {"name": "find"}}
USER = {"role": "user", "content": "hi"}
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>'
UNCLOSED = CALL.removesuffix("</tool_call>")


@pytest.fixture(scope="module")
def ending(tiny, byte_tokenizer):
    """An engine of a model that can end its texts."""
    model = tiny("M*-E", vocab_size=260, eos_token_id=2, block_size=8)
    model.tokenizer = byte_tokenizer
    engine = AsyncEngine(model).start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(ending, serve):
    config = ServerConfig(model_names=("tiny",), max_context=3000)
    with serve(make_app(ending, config, ChatTemplate(TEMPLATE, {}))) as served:
        yield served.url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def asked(text, **settings):
    """A request whose answer is a text."""
    extra = {"regex": re.escape(text), "mode": "ar"}
    return {"model": "tiny", "messages": [USER], "tools": [ADD, FIND], "extra_body": extra, **settings}


def accumulated(client, **settings):
    with client.chat.completions.stream(**settings) as stream:
        return stream.get_final_completion()


@pytest.mark.parametrize("text", ["hello", CALL, f"I add.\n{CALL}\n{OTHER}", UNCLOSED, "<tool_call>{no}"])
def test_a_stream_accumulates_to_the_whole_answer(client, text):
    whole = client.chat.completions.create(**asked(text)).choices[0]
    streamed = accumulated(client, **asked(text)).choices[0]
    assert streamed.finish_reason == whole.finish_reason
    assert (streamed.message.content or None) == (whole.message.content or None)
    found, again = (
        [(call.type, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        for message in (whole.message, streamed.message)
    )
    assert found == again
    assert len(found) == text.count('"name"')


def test_a_call_has_an_id_and_the_answer_no_content(client):
    choice = client.chat.completions.create(**asked(f"{CALL}\n{CALL}")).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    first, second = choice.message.tool_calls
    assert first.id.startswith("call_")
    assert first.id != second.id
    assert first.function.name == "add"
    assert json.loads(first.function.arguments) == {"x": 1}


def test_the_name_of_a_streamed_call_comes_before_its_arguments(client):
    chunks = list(client.chat.completions.create(**asked(f"a{CALL}{OTHER}"), stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert [call.index for call in calls] == [0, 0, 1, 1]
    assert [call.function.name for call in calls] == ["add", None, "find", None]
    assert [bool(call.id) for call in calls] == [True, False, True, False]
    assert "".join(delta.content or "" for delta in deltas) == "a"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_text_cut_inside_a_call_is_content(client):
    choice = client.chat.completions.create(**asked(CALL, max_tokens=20)).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content == CALL[:20]
    assert choice.message.tool_calls is None


def test_without_parallel_calls_there_is_one(client):
    choice = client.chat.completions.create(**asked(CALL + OTHER, parallel_tool_calls=False)).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["add"]


def test_no_tool_is_called_where_none_may_be(client):
    choice = client.chat.completions.create(**asked(CALL, tool_choice="none")).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


def test_every_choice_has_its_own_calls(client):
    for answer in (
        client.chat.completions.create(**asked(CALL, n=3)),
        accumulated(client, **asked(CALL, n=3)),
    ):
        assert [len(choice.message.tool_calls) for choice in answer.choices] == [1, 1, 1]


def test_log_probabilities_come_beside_calls(client):
    whole = client.chat.completions.create(**asked(CALL, logprobs=True)).choices[0].logprobs.content
    chunks = client.chat.completions.create(**asked(CALL, logprobs=True), stream=True)
    pieces = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.token for one in pieces] == [one.token for one in whole]
    assert len(whole) >= len(CALL)


def test_a_template_sees_the_tools_unless_none_may_be_called(url):
    def prompt_tokens(**settings):
        body = {"messages": [USER], "max_tokens": 1, "mode": "ar", **settings}
        return httpx.post(f"{url}/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]

    plain = prompt_tokens()
    shown = json.dumps(ADD) + json.dumps(
        FIND | {"function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    )
    assert prompt_tokens(tools=[ADD, FIND]) == plain + len(shown)
    assert prompt_tokens(tools=[ADD, FIND], tool_choice="none") == plain
    body = {"messages": [USER], "tools": [ADD, FIND]}
    assert httpx.post(f"{url}/tokenize", json=body).json()["count"] == plain + len(shown)


def test_a_conversation_with_tools_goes_on(client):
    first = client.chat.completions.create(**asked(CALL)).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "2"}
    second = client.chat.completions.create(**asked("It is 2.", messages=[USER, first, result])).choices[0]
    assert second.message.content == "It is 2."


def test_openais_client_parses_arguments(client):
    class Add(pydantic.BaseModel):
        x: int

    tools = [openai.pydantic_function_tool(Add, name="add")]
    [parsed] = client.chat.completions.parse(**asked(CALL, tools=tools)).choices[0].message.tool_calls
    assert parsed.function.parsed_arguments == Add(x=1)
    with client.chat.completions.stream(**asked(CALL, tools=tools)) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [Add(x=1)]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"tools": "add"}, "tools"),
        ({"tools": [1]}, "tools.0"),
        ({"tools": [{}]}, "tools.0.type"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [ADD, {"type": "function"}]}, "tools.1.function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": 'a"b'}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools.0.function.parameters"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools.0.function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "tools": [ADD], "commit_rule": "remask"}, "commit_rule"),
        ({"tool_choice": "required", "tools": [ADD], "regex": "a"}, "regex"),
        ({"tool_choice": "required", "tools": [ADD], "ignore_eos": True}, "ignore_eos"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    ADD,
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "no"}}}},
                    },
                ],
            },
            "tools.1.function.parameters",
        ),
        ({"tool_choice": "always", "tools": [ADD]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [ADD]}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [ADD]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"parallel_tool_calls": "no", "tools": [ADD]}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_what_is_wrong_about_tools_is_named(url, settings, param):
    response = httpx.post(f"{url}/v1/chat/completions", json={"messages": [USER], **settings})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert "Value error" not in error["message"]
