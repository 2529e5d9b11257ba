"""Objects of a client's schema have the properties that it names and no others, unless it says that they may."""

import json

import httpx
import pytest

from twotower.server.schemas import closed

NAMED = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CLOSED = NAMED | {"additionalProperties": False}


@pytest.mark.parametrize(
    "put",
    [
        lambda inner: inner,
        lambda inner: {"type": "array", "items": inner},
        lambda inner: {"anyOf": [inner, {"type": "null"}]},
        lambda inner: {"$defs": {"x": inner}, "$ref": "#/$defs/x"},
        lambda inner: {"type": "array", "prefixItems": [inner]},
        lambda inner: {"type": "object", "additionalProperties": inner},
        lambda inner: {"oneOf": [inner], "discriminator": {"propertyName": "a"}},
        lambda inner: {"type": "object", "properties": {"properties": inner}, "additionalProperties": False},
    ],
)
def test_objects_are_closed_wherever_a_schema_has_them(put):
    assert closed(put(NAMED)) == put(CLOSED)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {}},
        NAMED | {"additionalProperties": True},
        NAMED | {"patternProperties": {"^x": {}}},
        NAMED | {"required": ["a", "b"]},
        NAMED | {"minProperties": 2},
        # what an object may have is said by several parts together, or one part says what it must not match
        {"allOf": [NAMED, {"type": "object", "properties": {"b": {}}}]},
        {"oneOf": [NAMED, {"type": "object", "properties": {"b": {}}}]},
        {"type": "array", "items": NAMED, "contains": NAMED},
        {"not": NAMED, "anyOf": [NAMED]},
        NAMED | {"anyOf": [{"properties": {"b": {}}}]},
        NAMED | {"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"b": {}}}}},
        {"$ref": "#/$defs/x", "required": ["c"], "$defs": {"x": NAMED}},
        # no schemas at all
        {"properties": 1, "items": [], "anyOf": {}},
        {"enum": [{"properties": {"a": 1}}], "default": {"properties": {"a": 1}}},
    ],
    ids=json.dumps,
)
def test_what_says_more_stays_as_it_is(schema):
    assert closed(schema) == schema


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"type": "string", "format": "binary"}, {"type": "string"}),
        ({"type": ["integer", "null"], "format": "int64"}, {"type": ["integer", "null"]}),
        ({"type": "string", "format": "date-time"}, {"type": "string", "format": "date-time"}),
        ({"type": "array", "uniqueItems": False}, {"type": "array"}),
        ({"type": "array", "uniqueItems": True}, {"type": "array", "uniqueItems": True}),
        ({"type": "object", "propertyNames": {"type": "string"}}, {"type": "object"}),
        ({"propertyNames": {"pattern": "^x"}}, {"propertyNames": {"pattern": "^x"}}),
        ({"properties": {"format": {"const": 1}}, "minProperties": 1},) * 2,
        ({"allOf": [{"type": "string", "format": "path"}]}, {"allOf": [{"type": "string"}]}),
    ],
    ids=json.dumps,
)
def test_keys_that_demand_nothing_are_left_out(given, left):
    assert closed(given) == left


def test_what_other_tools_call_a_format_is_no_error(obedient_url):
    """OpenAPI's, pydantic's and zod's schemas have formats that JSON Schema doesn't know."""
    pytest.importorskip("llguidance")
    path = {"type": "string", "format": "path", "enum": ["a/b"]}
    schema = {"type": "object", "properties": {"where": path}, "required": ["where"]}
    body = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"enable_thinking": False}}
    url = f"{obedient_url}/v1/chat/completions"
    answer = httpx.post(url, json=body | {"guided_json": schema}).json()["choices"][0]["message"]
    assert json.loads(answer["content"]) == {"where": "a/b"}
    tool = {"type": "function", "function": {"name": "open", "parameters": schema}}
    forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    [call] = httpx.post(url, json=body | forced).json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"where": "a/b"}


def test_a_deep_schema_is_closed():
    schema: dict = NAMED
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    assert json.dumps(closed(schema)).count("additionalProperties") == 301


def test_the_given_schema_is_not_changed():
    before = json.dumps(NAMED)
    closed(NAMED)
    assert json.dumps(NAMED) == before


@pytest.mark.parametrize("field", ["guided_json", "response_format", "structured_outputs", "a text", "tools"])
def test_answers_have_only_what_the_schema_names(obedient_url, field):
    """A model that writes a comma wherever one may stand would go on with properties of its own."""
    pytest.importorskip("llguidance")
    inner = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    schema = {"type": "object", "properties": {"inner": inner}, "required": ["inner"]}
    given = {
        "guided_json": {"guided_json": schema},
        "a text": {"guided_json": json.dumps(schema)},
        "response_format": {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": False}}
        },
        "structured_outputs": {"structured_outputs": {"json": schema}},
        "tools": {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
    }[field]
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 200, "temperature": 0, **given}
    body["logit_bias"] = {str(ord(",") + 4): 100}
    body["chat_template_kwargs"] = {"enable_thinking": False}
    answer = httpx.post(f"{obedient_url}/v1/chat/completions", json=body, timeout=60).json()
    message = answer["choices"][0]["message"]
    text = message["tool_calls"][0]["function"]["arguments"] if field == "tools" else message["content"]
    assert json.loads(text)["inner"].keys() == {"yes"}
