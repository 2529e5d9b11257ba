"""Calls that must be made, which a grammar holds: a random model makes them as a good one does."""

import contextlib
import json

import httpx
import openai
import pytest
import tokenizers

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.engine.aio import AsyncEngine
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

pytest.importorskip("llguidance")

TEMPLATE = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{{ messages[-1].content }}<tool_call>"
PARSERS = ("hermes", "llama3_json", "mistral", "qwen3_coder", "json")
FIND = {"type": "function", "function": {"name": "find"}}
USER = {"role": "user", "content": "hi"}
# What a random model may write in few tokens.
SHORT = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"enum": ["°C", "K"]},
        "ok": {"type": "boolean"},
        "of": {"$ref": "#/$defs/Of"},
    },
    "required": ["n", "unit", "ok", "of"],
    "$defs": {"Of": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}},
}
MEASURE = {"type": "function", "function": {"name": "measure", "parameters": SHORT}}


@pytest.fixture(scope="module")
def clients(tiny, byte_tokenizer, serve):
    """A client for each way of writing calls, of one model that can end its texts."""
    model = tiny("M*-E", vocab_size=260, eos_token_id=2, block_size=8)
    model.tokenizer = byte_tokenizer
    engine = AsyncEngine(model).start()
    with contextlib.ExitStack() as held:
        made = {}
        for parser in PARSERS:
            config = ServerConfig(model_names=("tiny",), max_context=3000, tool_parser=parser)
            served = held.enter_context(serve(make_app(engine, config, ChatTemplate(TEMPLATE, {}))))
            made[parser] = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        yield made
    engine.close()


@pytest.fixture(scope="module")
def client(clients):
    return clients["hermes"]


def accumulated(client, **settings):
    with client.chat.completions.stream(**settings) as stream:
        return stream.get_final_completion()


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    ("mode", "choice"),
    [
        (None, {"type": "function", "function": {"name": "measure"}}),
        ("ar", "required"),
        ("verified", "required"),
        ("diffusion", "required"),
        (
            "verified",
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "find"}}]},
            },
        ),
    ],
)
def test_a_call_that_must_be_made_is_one_of_the_function(clients, parser, mode, choice):
    extra = {"mode": mode, "seed": 7}
    settings = {"model": "tiny", "messages": [USER], "tools": [MEASURE, FIND], "tool_choice": choice, "max_tokens": 900}
    whole = clients[parser].chat.completions.create(**settings, extra_body=extra, parallel_tool_calls=False).choices[0]
    chunked = accumulated(clients[parser], **settings, extra_body=extra, parallel_tool_calls=False).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    [call], [again] = whole.message.tool_calls, chunked.message.tool_calls
    assert (call.function.name, call.function.arguments) == (again.function.name, again.function.arguments)
    arguments = json.loads(call.function.arguments)
    if isinstance(choice, dict):
        assert call.function.name == ("find" if "allowed_tools" in choice else "measure")
    if call.function.name == "find":
        assert arguments == {}
    else:
        assert arguments.keys() == {"n", "unit", "ok", "of"}
        assert 0 <= arguments["n"] <= 99
        assert arguments["unit"] in ("°C", "K")
        assert isinstance(arguments["ok"], bool)
        assert all(isinstance(one, bool) for one in arguments["of"])


@pytest.mark.slow
def test_verified_forces_the_text_of_ar(clients):
    for client in clients.values():
        answers = [
            client.chat.completions.create(
                model="tiny",
                messages=[USER],
                tools=[MEASURE],
                tool_choice="required",
                temperature=0,
                max_tokens=60,
                extra_body={"mode": mode, "return_token_ids": True},
            ).choices[0]
            for mode in ("ar", "verified")
        ]
        assert answers[0].model_extra["token_ids"] == answers[1].model_extra["token_ids"]


@pytest.mark.parametrize(("first", "content"), [('"', '"yes"'), ("<", None)])
def test_an_answer_that_may_be_a_call_is_that_or_follows_its_format(client, byte_tokenizer, first, content):
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "yes"}}}
    [liked] = byte_tokenizer.encode(first, add_special_tokens=False).ids
    settings = {"tools": [FIND], "response_format": format, "logit_bias": {liked: 50}, "parallel_tool_calls": False}
    choice = client.chat.completions.create(model="tiny", messages=[USER], max_tokens=200, **settings).choices[0]
    assert choice.message.content == content
    assert choice.finish_reason == ("stop" if content else "tool_calls")


@pytest.mark.slow
@pytest.mark.parametrize("parser", PARSERS)
def test_a_thousand_tools_are_told_apart(clients, parser):
    names = [f"f{i}" for i in range(1000)]
    tools = [{"type": "function", "function": {"name": name, "parameters": SHORT}} for name in names]
    named = {"type": "function", "function": {"name": "f517"}}
    for choice, possible in ((named, ["f517"]), ("required", names)):
        extra = {"truncate_prompt_tokens": 20, "mode": "ar", "seed": 3}
        settings = {"tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 400, "extra_body": extra}
        answer = clients[parser].chat.completions.create(model="tiny", messages=[USER], tools=tools, **settings)
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name in possible


@pytest.mark.slow
def test_more_tools_than_a_grammar_has_room_for_are_refused_in_a_sentence(client):
    def schema(i):
        return {"type": "object", "properties": {f"p{i}_{k}": {"type": "string"} for k in range(12)}}

    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema(i)}} for i in range(1000)]
    body = {"messages": [USER], "tools": tools, "tool_choice": "required", "truncate_prompt_tokens": 20}
    error = httpx.post(f"{client.base_url}chat/completions", json=body, timeout=60).json()["error"]
    assert error["param"] == "tool_choice"
    assert error["message"] == (
        'tool_choice is "required", must be a constraint that llguidance can follow (it is too large); correct it'
    )


def test_a_schema_may_refer_to_itself(client):
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}, "additionalProperties": False}
    schema = {"type": "object", "properties": {"first": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": node}}
    tools = [{"type": "function", "function": {"name": "walk", "parameters": schema | {"required": ["first"]}}}]
    settings = {"tools": tools, "tool_choice": "required", "seed": 1, "max_tokens": 900}
    [call] = (
        client.chat.completions.create(model="tiny", messages=[USER], parallel_tool_calls=False, **settings)
        .choices[0]
        .message.tool_calls
    )
    assert json.loads(call.function.arguments)["first"] is not None


ONE = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        ({"$ref": "#/$defs/One", "$defs": {"One": ONE}}, {"a": 1}),
        ({"anyOf": [ONE, ONE]}, {"a": 1}),
        (
            {"patternProperties": {"^x$": {"const": 1}}, "additionalProperties": False, "minProperties": 1},
            {"x": 1},
        ),
        (
            {"properties": {'a"b': {"const": 1}, "c\nd>e": {"const": 2}}, "required": ['a"b', "c\nd>e"]},
            {'a"b': 1, "c\nd>e": 2},
        ),
        ({"properties": {"très 🎉": {"const": "日本"}}, "required": ["très 🎉"]}, {"très 🎉": "日本"}),
    ],
    ids=["a reference", "any of", "a pattern", "marks", "Unicode"],
)
def test_arguments_follow_any_schema_in_every_format(clients, parser, schema, arguments):
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    settings = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300}
    made = clients[parser].chat.completions.create(model="tiny", messages=[USER], **settings)
    [call] = made.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == arguments


def test_arguments_that_are_required_but_not_described_may_be_anything(client):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"required": ["anything"]}}}]
    body = {"messages": [USER], "tools": tools, "tool_choice": "required", "max_tokens": 40}
    assert httpx.post(f"{client.base_url}chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": 5},
        {"properties": {"a": {"enum": []}}, "required": ["a"]},
        {"properties": {"a": {"type": "string", "pattern": "("}}, "required": ["a"]},
        {"$ref": "#/nowhere"},
        {"allOf": 3},
    ],
)
def test_a_schema_that_no_call_can_follow_is_named(client, schema):
    tools = [FIND, {"type": "function", "function": {"name": "f", "parameters": schema}}]
    body = {"messages": [USER], "tools": tools, "tool_choice": "required"}
    response = httpx.post(f"{client.base_url}chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools.1.function.parameters")


@pytest.fixture(scope="module")
def marked(tiny, byte_tokenizer, serve):
    """A client of a model with Mistral's marks among its control tokens."""
    tokenizer = tokenizers.Tokenizer.from_str(byte_tokenizer.to_str())
    tokenizer.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "<|im_end|>"])
    model = tiny("M*-E", vocab_size=263, eos_token_id=2, block_size=8)
    model.tokenizer = tokenizer
    engine = AsyncEngine(model).start()
    template = ChatTemplate("{{ messages[-1].content }}{% if tools %}[TOOL_CALLS] [ARGS]{% endif %}", {})
    with serve(make_app(engine, ServerConfig(model_names=("tiny",), max_context=300), template)) as served:
        yield openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    engine.close()


def test_marks_that_are_control_tokens_are_seen_and_others_are_no_content(marked):
    grammar = 'start: "a" <[262]> <[260]> "find" <[261]> "{}" <[262]>'
    settings = {"model": "tiny", "messages": [USER], "tools": [FIND], "extra_body": {"grammar": grammar}}
    whole = marked.chat.completions.create(**settings).choices[0].message
    assert (whole.content, whole.tool_calls[0].function.name, whole.tool_calls[0].function.arguments) == (
        "a",
        "find",
        "{}",
    )
    streamed = accumulated(marked, **settings).choices[0].message
    assert (streamed.content, streamed.tool_calls[0].function.name) == ("a", "find")
    none = marked.chat.completions.create(**settings, tool_choice="none").choices[0].message
    assert (none.content, none.tool_calls) == ("afind{}", None)


def test_a_forced_call_is_written_with_the_control_tokens(marked):
    extra = {"return_token_ids": True}
    choice = marked.chat.completions.create(
        model="tiny", messages=[USER], tools=[FIND], tool_choice="required", max_tokens=9, extra_body=extra
    ).choices[0]
    assert choice.model_extra["token_ids"][:6] == [260, *(4 + byte for byte in b"find"), 261]
    assert choice.message.tool_calls[0].function.name == "find"


@pytest.fixture(scope="module")
def thinking(tiny, byte_tokenizer, serve):
    """A client of a model that thinks before it answers, until token 261."""
    tokenizer = tokenizers.Tokenizer.from_str(byte_tokenizer.to_str())
    tokenizer.add_special_tokens(["<think>", "</think>"])
    model = tiny("M*-E", vocab_size=262, eos_token_id=2, block_size=8)
    model.tokenizer = tokenizer
    engine = AsyncEngine(model).start()
    template = ChatTemplate("{{ messages[-1].content }}{{ tools | tojson if tools }}<think>{#</think><tool_call>#}", {})
    with serve(make_app(engine, ServerConfig(model_names=("tiny",), max_context=1000), template)) as served:
        yield openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    engine.close()


def test_a_call_that_must_be_made_comes_behind_the_reasoning(thinking):
    settings = {"tools": [FIND], "tool_choice": "required", "parallel_tool_calls": False, "logit_bias": {261: 2}}
    answer = thinking.chat.completions.create(model="tiny", messages=[USER], seed=1, max_tokens=800, **settings)
    message = answer.choices[0].message
    assert message.model_extra["reasoning_content"]
    assert [call.function.name for call in message.tool_calls] == ["find"]
    assert message.content is None


def test_a_schema_is_named_behind_reasoning_too(thinking):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"allOf": 3}}}]
    body = {"messages": [USER], "tools": tools, "tool_choice": "required"}
    response = httpx.post(f"{thinking.base_url}chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools.0.function.parameters")
