"""/v1/responses as OpenAI's own client uses it."""

import json
import re

import openai
import pydantic
import pytest

from twotower.engine.aio import AsyncEngine
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

AR = {"mode": "ar", "ignore_eos": True}


def ask(more=None, **settings):
    extra = AR | (more or {})
    return {"model": "tiny", "input": "a", "max_output_tokens": 12, "temperature": 0, "extra_body": extra, **settings}


def test_a_response_is_written(client):
    answer = client.responses.create(**ask(instructions="be kind", metadata={"a": "b"}, top_p=0.5, store=True))
    assert answer.id.startswith("resp_")
    assert answer.output_text == "b 🎉é…z"
    [message] = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert (answer.object, answer.model, answer.status) == ("response", "tiny", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.input_tokens == len("[system]be kind[user]aa")
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (12, answer.usage.input_tokens + 12)
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert (answer.temperature, answer.top_p, answer.metadata) == (0, 0.5, {"a": "b"})
    assert (answer.error, answer.previous_response_id, answer.tools, answer.tool_choice) == (None, None, [], "auto")


@pytest.mark.parametrize(
    ("settings", "text", "status"),
    [
        ({}, "b 🎉é…z", "incomplete"),
        ({"more": {"stop": "🎉"}}, "b ", "completed"),
        ({"more": {"stop": "b"}}, "", "completed"),
        ({"more": {"mode": "verified"}, "max_output_tokens": 2}, "b ", "incomplete"),
    ],
)
def test_a_stream_has_the_whole_sequence_of_events(client, settings, text, status):
    whole = client.responses.create(**ask(**settings))
    events = list(client.responses.create(**ask(**settings, stream=True)))
    kinds = [event.type.removeprefix("response.") for event in events]
    before = ["created", "in_progress", "output_item.added", "content_part.added"]
    after = ["output_text.done", "content_part.done", "output_item.done", status]
    assert (kinds[:4], kinds[-4:]) == (before, after)
    assert {*kinds[4:-4]} <= {"output_text.delta"}
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert "".join(event.delta for event in events[4:-4]) == text == events[-4].text
    last = events[-1].response
    assert last.output_text == whole.output_text == text
    assert (last.status, last.usage.output_tokens) == (whole.status, whole.usage.output_tokens)
    assert {event.response.id for event in (*events[:2], events[-1])} == {last.id}
    assert (events[0].response.status, events[0].response.output) == ("in_progress", [])


def test_the_clients_stream_accumulates_the_response(client):
    request = ask(more={"stop": "z"})
    with client.responses.stream(**request) as stream:
        seen = [event.type for event in stream]
        final = stream.get_final_response()
    assert seen[-1] == "response.completed"
    assert final.output_text == client.responses.create(**request).output_text == "b 🎉é…"


def test_a_conversation_goes_on_with_the_items_of_the_response(client):
    said = [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]
    first = client.responses.create(**ask(input=said, more={"stop": "z"}))
    said += first.output
    said.append({"role": "user", "content": "xyz"})
    second = client.responses.create(**ask(input=said))
    assert second.usage.input_tokens == len("[user]a[assistant]b 🎉é…[user]xyza".encode())


class City(pydantic.BaseModel):
    name: str


def test_an_answer_is_parsed(obedient_url):
    pytest.importorskip("llguidance")
    client = openai.OpenAI(base_url=f"{obedient_url}/v1", api_key="none", max_retries=0)
    request = {
        "model": "tiny",
        "input": "a",
        "max_output_tokens": 200,
        "temperature": 0,
        "reasoning": {"effort": "none"},
    }
    schema = {"type": "object", "properties": {"name": {"enum": ["Ulm"]}}, "required": ["name"]}
    format = {"type": "json_schema", "name": "city", "schema": schema | {"additionalProperties": False}}
    answer = client.responses.create(**request, text={"format": format})
    assert json.loads(answer.output_text) == {"name": "Ulm"}
    assert answer.text.format.type == "json_schema"
    assert answer.text.format.schema_["properties"]["name"] == {"enum": ["Ulm"]}
    # only a bound makes the random model end the name
    bounded = pydantic.create_model("City", name=(str, pydantic.Field(max_length=3)))
    parsed = client.responses.parse(**request, text_format=bounded)
    assert len(parsed.output_parsed.name) <= 3
    with client.responses.stream(**request, text_format=bounded) as stream:
        assert len(stream.get_final_response().output_parsed.name) <= 3
    written = client.responses.create(**request, text={"format": {"type": "text"}}, extra_body={"regex": "[ab]{3}"})
    assert re.fullmatch("[ab]{3}", written.output_text)


def test_what_clients_send_by_themselves_is_taken(http):
    body = {
        "model": "tiny",
        "input": "a",
        "max_output_tokens": 2,
        "store": True,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"verbosity": "medium", "format": {"type": "text"}},
        "prompt_cache_key": "k",
        "truncation": "disabled",
        "background": False,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "previous_response_id": None,
        "top_logprobs": 0,
        "max_tool_calls": None,
        "service_tier": "auto",
        "stream_options": {"include_obfuscation": False},
    }
    answer = http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["reasoning"] == {"effort": "low", "summary": "auto"}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": None}, "input", "input is missing"),
        ({"input": [{"content": "a"}]}, "input.0.role", "input.0.role is missing"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "this server keeps none; send the item itself"),
        ({"input": [{"type": "computer_call"}]}, "input.0", 'input.0 is an item of type "computer_call"'),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0",
            'is a part of type "input_image", and this model reads only text',
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the earlier items in input"),
        ({"conversation": "conv_1"}, "conversation", "send the earlier items in input"),
        ({"max_tokens": 5}, "max_tokens", "max_tokens is not supported"),
        ({"background": True}, "background", "background is not supported"),
        ({"truncation": "auto"}, "truncation", "truncation is not supported"),
        ({"prompt": {"id": "x"}}, "prompt", "prompt is not supported"),
        ({"include": ["web_search_call.results"]}, "include.0", "must be one of"),
        ({"max_output_tokens": 100_000}, "max_output_tokens", "lower max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "is missing"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "must be of type"),
        (
            {"text": {"format": {"type": "json_object"}}, "mode": "diffusion"},
            "text.format",
            "text.format is true, must",
        ),
        (
            {"tools": [{"type": "web_search"}]},
            "tools.0.type",
            'tools.0.type is "web_search", must be one of "function"',
        ),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "tools has no such function"),
    ],
)
def test_errors_name_the_field(http, fields, param, message):
    answer = http.post("/v1/responses", json={"model": "tiny", "input": "a", "max_output_tokens": 2} | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"] == param


def test_an_engine_that_fails_ends_a_stream_with_a_failed_response(model, serve, app):
    engine = AsyncEngine(model).start()
    config = ServerConfig(model_names=("tiny",), max_context=2000)
    with serve(make_app(engine, config, app.service.template)) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        events = client.responses.create(**ask(max_output_tokens=1900), stream=True)
        assert next(events).type == "response.created"
        engine.close()
        seen = []
        with pytest.raises(openai.APIError, match="the engine ") as caught:
            seen.extend(events)
        assert caught.value.code == "engine_failed"
        assert seen[-1].type == "response.failed"
        assert seen[-1].response.error.message.startswith("the engine ")
        with pytest.raises(openai.InternalServerError, match="the engine"):
            client.responses.create(**ask())
