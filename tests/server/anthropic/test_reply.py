"""/v1/messages as Anthropic's own client uses it."""

import json

import httpx
import pytest

from twotower.engine.aio import AsyncEngine
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

anthropic = pytest.importorskip("anthropic", reason="its client is the one tested; pip install 'twotower[dev]'")

USER = {"role": "user", "content": "a"}
# What this client has no arguments for.
AR = {"mode": "ar", "ignore_eos": True, "temperature": 0}


def prompt_tokens(usage):
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens


@pytest.fixture(scope="module")
def claude(url):
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def ask(more=None, **settings):
    extra = AR | (more or {})
    return {"model": "tiny", "max_tokens": 12, "messages": [USER], "extra_body": extra, **settings}


def test_a_message_is_written(claude):
    answer = claude.messages.create(**ask())
    assert answer.id.startswith("msg_")
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "tiny")
    assert [(block.type, block.text) for block in answer.content] == [("text", "b 🎉é…z")]
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    assert (prompt_tokens(answer.usage), answer.usage.output_tokens) == (len("[user]aa"), 12)


@pytest.mark.parametrize(
    ("settings", "text", "reason", "stop"),
    [
        ({"stop_sequences": ["x", "é…"]}, "b 🎉", "stop_sequence", "é…"),
        ({"stop_sequences": ["x"], "more": {"stop": "🎉"}}, "b ", "stop_sequence", "🎉"),
        ({"stop_sequences": ["b"]}, None, "stop_sequence", "b"),
        ({"max_tokens": 2}, "b ", "max_tokens", None),
        ({"more": {"stop_token_ids": [4 + ord(" ")]}}, "b", "end_turn", None),
        (
            {"more": {"mode": "verified", "top_k": 5, "top_p": 1.0}, "thinking": {"type": "disabled"}},
            "b 🎉é…z",
            "max_tokens",
            None,
        ),
    ],
)
def test_whole_and_streamed_are_one_message(claude, settings, text, reason, stop):
    asked = ask(**settings)
    whole = claude.messages.create(**asked)
    assert [block.text for block in whole.content] == ([] if text is None else [text])
    assert (whole.stop_reason, whole.stop_sequence) == (reason, stop)
    with claude.messages.stream(**asked) as stream:
        pieces = list(stream.text_stream)
        streamed = stream.get_final_message()
    assert "".join(pieces) == (text or "")
    assert [(block.type, block.text) for block in streamed.content] == [("text", text)] * (text is not None)
    assert (streamed.stop_reason, streamed.stop_sequence) == (reason, stop)
    assert prompt_tokens(streamed.usage) == prompt_tokens(whole.usage) == len("[user]aa")
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0


def test_events_of_a_stream_have_names_and_an_order(http):
    body = {"model": "tiny", "max_tokens": 4, "messages": [USER], "stream": True, **AR}
    with http.stream("POST", "/v1/messages", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    names = [line[7:] for line in lines if line.startswith("event: ")]
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert names == [event["type"] for event in events]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["usage"]["input_tokens"] == len("[user]aa")  # what is cached is known later
    assert events[-2]["usage"]["output_tokens"] == 4


def test_a_message_of_the_assistant_at_the_end_is_gone_on_with(claude):
    said = [USER, {"role": "assistant", "content": "xyz"}]
    assert claude.messages.create(**ask(messages=said, max_tokens=2)).content[0].text == "ab"


def test_the_model_is_listed(claude):
    assert [model.id for model in claude.models.list()] == ["tiny"]
    assert claude.models.retrieve("tiny").id == "tiny"


def test_tokens_are_counted(claude):
    said = {"model": "tiny", "messages": [USER], "system": "be kind"}
    count = claude.messages.count_tokens(**said).input_tokens
    assert count == len("[system]be kind[user]aa")
    assert prompt_tokens(claude.messages.create(**said, max_tokens=1).usage) == count


def test_the_tokens_of_more_than_fits_are_counted(claude):
    said = [{"role": "user", "content": "a" * 5000}]
    assert claude.messages.count_tokens(model="tiny", messages=said).input_tokens == len("[user]a") + 5000
    with pytest.raises(
        anthropic.BadRequestError, match="prompt is too long: this model's maximum context length is 2000 tokens"
    ):
        claude.messages.create(model="tiny", messages=said, max_tokens=1)


def test_what_claude_code_sends_is_taken(http):
    cached = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": "tiny",
        "max_tokens": 4,
        "system": [{"type": "text", "text": "You are kind.", **cached}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a", **cached}]}],
        "metadata": {"user_id": "someone"},
        "thinking": {"type": "adaptive", "budget_tokens": 0},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "tools": [],
        "stream": False,
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219", "x-api-key": "none"}
    answer = http.post("/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("fields", "status", "kind", "message"),
    [
        ({"model": "other"}, 404, "not_found_error", "the model 'other' does not exist"),
        ({"messages": []}, 400, "invalid_request_error", "messages is [], must be a list of at least 1"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_request_error", "messages.0.content is missing"),
        ({"max_tokens": 100_000}, 400, "invalid_request_error", "lower max_tokens"),
        ({"temperature": 200}, 400, "invalid_request_error", "temperature is 200"),
        ({"stop_sequences": ["a", ""]}, 400, "invalid_request_error", "stop_sequences.1 is \"\", must be a text of at"),
        ({"stop_sequences": ["a"] * 129}, 400, "invalid_request_error", "must be a list of at most 128"),
        ({"thinking": {"type": "on"}}, 400, "invalid_request_error", "thinking.type is \"on\", must be one of"),
        ({"tools": [{"name": "a b"}]}, 400, "invalid_request_error", "tools.0.name is \"a b\", must be 1 to 128"),
        ({"tools": [{"type": "bash", "name": "bash"}]}, 400, "invalid_request_error", "tools.0.type is \"bash"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice.name is missing"),
        (
            {"messages": [USER, {"role": "assistant", "content": ["a", {"type": "tool_use"}]}]},
            400,
            "invalid_request_error",
            "messages.1.content.1.name is missing",
        ),
        ({"thread": {"type": "stop"}}, 400, "invalid_request_error", "thread.type is \"stop\", must be one of"),
        ({"container": "c"}, 400, "invalid_request_error", "container is not supported"),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "messages.1.content.0 is a part of type \"image\", and this model reads only text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0.content.0 is a part of type \"image\"",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_errors_have_anthropics_shape(http, path, fields, status, kind, message):
    answer = http.post(path, json={"model": "tiny", "max_tokens": 4, "messages": [USER]} | fields)
    if path.endswith("count_tokens") and fields.keys() & {"max_tokens", "temperature"}:
        assert answer.status_code == 200  # nothing is written
        return
    assert answer.status_code == status
    assert answer.json().keys() == {"type", "error"}
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == kind
    assert message in answer.json()["error"]["message"]


def test_a_body_that_is_no_json_and_a_path_that_is_none(http):
    for path in ("/v1/messages", "/v1/messages/batches"):
        error = http.post(path, content=b"{").json()
        assert (error["type"], error["error"]["type"]) == (
            "error",
            "not_found_error" if path.endswith("batches") else "invalid_request_error",
        )


def test_a_key_may_be_in_x_api_key(engine, serve):
    with serve(make_app(engine, ServerConfig(model_names=("tiny",), api_keys=("one",)))) as served:
        right = anthropic.Anthropic(base_url=served.url, api_key="one", max_retries=0)
        with pytest.raises(anthropic.BadRequestError, match="has no chat template"):
            right.messages.create(model="tiny", max_tokens=1, messages=[USER])
        for key in ("two", "ön", ""):
            headers = {"x-api-key": key.encode()}
            refused = httpx.post(f"{served.url}/v1/messages", json={"messages": [USER]}, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"


def test_an_engine_that_fails_ends_a_stream_with_an_error(model, serve, app):
    engine = AsyncEngine(model).start()
    with serve(make_app(engine, ServerConfig(model_names=("tiny",), max_context=2000), app.service.template)) as served:
        client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
        with client.messages.stream(**ask(max_tokens=1900)) as stream:
            pieces = iter(stream.text_stream)
            next(pieces)
            engine.close()
            with pytest.raises(anthropic.APIStatusError, match="the engine "):
                list(pieces)
        with pytest.raises(anthropic.InternalServerError, match="api_error"):
            client.messages.create(**ask())
