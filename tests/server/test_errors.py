"""What goes wrong is a 4xx in OpenAI's shape that names the field, and never a 5xx."""

import re

import httpx
import openai
import pytest

from twotower.engine.aio import AsyncEngine
from twotower.engine.config import EngineConfig
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

PATHS = {"/v1/completions": {"prompt": "ab"}, "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]}}
# Fields of OpenAI's two APIs and of other servers that this one can't follow, with a value that asks for something.
UNSUPPORTED = {
    "suffix": "end",
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "audio"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
    "use_beam_search": True,
    "length_penalty": 2.0,
    "repeat_penalty": 1.1,
    "mirostat_mode": 2,
    "max_token": 5,
    "no_such_field": 1,
}


def refused(response: httpx.Response, status: int, param: str | None = None) -> str:
    """Checks an error's shape and returns its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    return error["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_field_that_is_not_supported_is_named(http, path, field):
    body = {"model": "tiny", **PATHS[path], field: UNSUPPORTED[field]}
    assert field in refused(http.post(path, json=body), 400, field)


def test_a_completion_has_no_tools(http):
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert "tools" in refused(http.post("/v1/completions", json={"prompt": "a", "tools": tools}), 400, "tools")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", 101),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 1.5),
        ("seed", 2**63),
        ("seed", 10**40),
        ("seed", 1.5),
        ("n", 0),
        ("n", -3),
        ("n", 65),
        ("n", 10**30),
        ("max_tokens", -2),
        ("max_tokens", 2000),
        ("max_tokens", 10**30),
        ("max_tokens", "7"),
        ("stop", [""]),
        ("stop", ["a"] * 129),
        ("stop", "x" * 257),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stream", 1),
        ("mode", "fast"),
        ("block_size", 0),
        ("block_size", 2.5),
        ("block_size", 2**63),
        ("steps_per_block", -1),
        ("steps_per_block", 2**63),
        ("confidence_threshold", 1.01),
        ("commit_rule", "all"),
        ("ignore_eos", "yes"),
        ("user", 3),
        ("logprobs", -1),
        ("logprobs", "1"),
        ("frequency_penalty", 2.5),
        ("presence_penalty", "1"),
        ("repetition_penalty", 0),
        ("min_p", -0.1),
        ("typical_p", 1.5),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"500": 1}),
        ("logit_bias", {"3": 1}),
        ("bad_words", "a"),
        ("min_tokens", -1),
        ("truncate_prompt_tokens", -2),
        ("best_of", 0),
        ("prompt_logprobs", 21),
    ],
)
def test_a_bad_value_is_named(http, path, field, value):
    param = f"{field}.0" if value == [1] else field
    assert field in refused(http.post(path, json={"model": "tiny", **PATHS[path], field: value}), 400, param)


@pytest.mark.parametrize(
    "body", [{"stream_options": {"include_usage": True, "x": 1}}, {"messages": [{"role": "user", "content": 1}]}]
)
def test_a_nested_field_has_its_path(http, body):
    path = "/v1/completions" if "stream_options" in body else "/v1/chat/completions"
    param = "stream_options.x" if "stream_options" in body else "messages.0.content"
    refused(http.post(path, json={"model": "tiny", "stream": True} | PATHS[path] | body), 400, param)


@pytest.mark.parametrize("given", [{"n": 17}, {"best_of": 17}, {"prompt": ["a"] * 9, "n": 2}])
def test_more_texts_than_the_engine_ever_takes_are_not_asked_for_again(http, given):
    """It runs 4 and lets 12 wait: a 429 would have the client come back for ever."""
    assert "the limit is 16" in refused(http.post("/v1/completions", json={"prompt": "a"} | given), 400, "n")


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        *(([], "prompt"), ([-1], "prompt"), ([260], "prompt"), ([2**70], "prompt"), ([[1], [260]], "prompt")),
        *((["a", 1], "prompt.1"), ([1, "a"], "prompt.0"), ({"a": 1}, "prompt"), (5, "prompt"), ([1.5], "prompt.0")),
        (["a", ["b"]], "prompt.1"),
    ],
)
def test_a_bad_prompt_is_named(http, prompt, param):
    refused(http.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 1}), 400, param)


@pytest.mark.parametrize("prompt", [None, "", [""], [[]]])
def test_an_empty_prompt_begins_with_bos(http, prompt):
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 1})
    assert response.json()["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "robot", "content": "a"}], "messages.0.role"),
        ([{"content": "a"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": ["a", 5]}], "messages.0.content.1"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "messages.0.content.0"),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages.0.tool_calls.0.function.name"),
        ([{"role": "assistant", "tool_calls": {"id": "a"}}], "messages.0.tool_calls"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "messages"),
    ],
)
def test_bad_messages_are_named(http, messages, param):
    refused(http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages}), 400, param)


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
    ],
)
def test_chat_settings_that_contradict_each_other(http, settings, param):
    body = {"model": "tiny", **PATHS["/v1/chat/completions"], **settings}
    refused(http.post("/v1/chat/completions", json=body), 400, param)


@pytest.mark.parametrize(
    "field",
    [
        *({"temperature": -1}, {"regex": "a", "mode": "diffusion"}, {"top_k": -5}, {"ignore_eos": "yes"}),
        *({"mode": "fast"}, {"top_p": 1.5}, {"ignore_eos": True, "regex": "a", "mode": "ar"}, {"temperature": "0.5"}),
        {"stop": [""]},
    ],
)
def test_errors_speak_json(http, field):
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **field})
    message = refused(response, 400, next(iter(field)))
    assert not re.search(r"\b(None|True|False|SettingError)\b|'\w*'|\(\)", message), message


@pytest.mark.parametrize("path", PATHS)
def test_bodies_that_are_no_request(http, path):
    def sent(content, **headers):
        return http.post(path, content=content, headers={"content-type": "application/json"} | headers)

    deep = b'{"model": "tiny", "prompt": ' + b"[" * 500_000
    for content in (b"", b"{", b"nonsense", b"\xff\xfe\x00", b'{"model": "\xc3\x28"}', deep, deep + b"]" * 500_000):
        refused(sent(content), 400)
    for content in (b"[]", b"3", b"null", b'"text"', b"[" * 5000 + b"]" * 5000, b"NaN", b"1" * 5000):
        refused(sent(content), 400)
    refused(sent(b'{"model": "\\ud800", "prompt": "\\udfff"}'), 400)
    refused(sent(b'{"model": "tiny", "temperature": NaN}'), 400)
    refused(sent(b'{"model": "tiny"}', **{"content-type": "text/plain"}), 400)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_too_much_of_everything(http, path):
    def prompt(text):
        return {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}

    message = refused(http.post(path, json={"model": "tiny"} | prompt("x" * 100_000)), 400, "prompt")
    assert "2000 tokens" in message
    assert http.post(path, json={"model": "tiny"} | prompt("x" * 100_000)).json()["error"]["code"] == (
        "context_length_exceeded"
    )
    assert "2097152 bytes" in refused(http.post(path, json={"model": "tiny"} | prompt("x" * 10_000_000)), 413)
    many = {f"field{i}": i for i in range(100_000)}
    assert http.post(path, json={"model": "tiny"} | prompt("x") | many).status_code == 400


def test_100k_token_ids_are_too_long(http):
    refused(http.post("/v1/completions", json={"model": "tiny", "prompt": [7] * 100_000}), 400, "prompt")
    refused(
        http.post("/v1/completions", json={"model": "tiny", "prompt": [7] * 1999, "max_tokens": 2}), 400, "max_tokens"
    )
    refused(http.post("/v1/completions", json={"model": "tiny", "prompt": [0.5] * 100_000}), 400, "prompt.0")


def test_bodies_without_a_length_are_limited_too(http):
    def pieces():
        for _ in range(100):
            yield b" " * 100_000

    response = http.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    refused(response, 413)


def test_unknown_places(http):
    refused(http.get("/v1/nowhere"), 404)
    refused(http.get("/v1/completions"), 405)
    assert "'gpt'" in refused(http.post("/v1/completions", json={"model": "gpt", "prompt": "a"}), 404, "model")
    assert "'gpt'" in refused(http.get("/v1/models/gpt"), 404, "model")


def test_openais_client_sees_its_own_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", frequency_penalty=3)
    assert caught.value.param == "frequency_penalty"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context length is 2000 tokens"):
        client.completions.create(model="tiny", prompt="a" * 2001, stream=True)


def test_without_a_template_chat_says_so(engine, serve):
    with serve(make_app(engine, ServerConfig(model_names=("bare",)))) as served:
        body = {"model": "bare", **PATHS["/v1/chat/completions"]}
        response = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert "no chat template" in refused(response, 400, "messages")


@pytest.mark.slow
def test_a_full_server_says_when_to_come_again(model, serve, wait_until):
    engine = AsyncEngine(model, EngineConfig(max_num_requests=1, max_num_waiting=2)).start()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3000, "mode": "ar", "stream": True}
    with serve(make_app(engine, ServerConfig(model_names=("tiny",)))) as served:
        place = f"{served.url}/v1/completions"
        # of the three texts one is written, and the others wait
        with httpx.stream("POST", place, json=body | {"n": 3}) as three:
            response = httpx.post(place, json=body)
            assert three.status_code == 200
            refused(response, 429)
            assert response.headers["retry-after"] == "1"
            with pytest.raises(openai.RateLimitError):
                openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0).completions.create(
                    model="tiny", prompt="a"
                )
            assert refused(httpx.post(place, json=body | {"n": 3}), 429)
            refused(httpx.post(place, json=body | {"n": 4}), 400, "n")
        wait_until(lambda: engine.stats().num_running == 0)
        assert httpx.post(place, json=body | {"max_tokens": 1, "stream": False, "n": 3}).status_code == 200
    engine.close()


@pytest.mark.slow
def test_a_stopped_engine_is_unavailable(model, serve):
    engine = AsyncEngine(model).start()
    with serve(make_app(engine, ServerConfig(model_names=("tiny",)))) as served:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 100_000 // 50, "mode": "ar"}
        assert httpx.get(f"{served.url}/health").status_code == 200
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            engine.close()
            last = [line for line in lines if line][-1]
        assert '"code":"engine_failed"' in last
        assert httpx.get(f"{served.url}/health").status_code == 503
        refused(httpx.post(f"{served.url}/v1/completions", json=body), 503)
