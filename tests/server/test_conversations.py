"""Chats as clients hold them: answers sent back, empty values, bookkeeping, and keys that only a template reads."""

import json

import httpx
import pytest

import twotower
from twotower.checkpoints.chat_template import ChatTemplate, Turn
from twotower.checkpoints.hf import resolve
from twotower.engine.aio import AsyncEngine
from twotower.engine.config import EngineConfig
from twotower.server.app import make_app
from twotower.server.chat import render
from twotower.server.config import ServerConfig
from twotower.server.messages import Message, turns
from twotower.server.protocol import ChatRequest
from twotower.server.service import Service

USER = {"role": "user", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}


def turn(message: dict) -> Turn:
    return turns([Message.model_validate(message)], knows_developer=False)[0]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": "a", "name": "bob"}, Turn("user", "a", {"name": "bob"})),
        ({"role": "developer", "content": "a"}, Turn("system", "a")),
        ({"role": "assistant", "content": None}, Turn("assistant", "")),
        ({"role": "assistant"}, Turn("assistant", "")),
        ({"role": "assistant", "content": None, "refusal": "no"}, Turn("assistant", "no")),
        ({"role": "assistant", "content": "a", "refusal": None, "tool_calls": None}, Turn("assistant", "a")),
        ({"role": "assistant", "content": "a", "tool_calls": [], "annotations": []}, Turn("assistant", "a")),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
            Turn("assistant", "a", {"reasoning_content": "b"}),
        ),
        ({"role": "tool", "content": "3", "tool_call_id": "c1"}, Turn("tool", "3", {"tool_call_id": "c1"})),
        ({"role": "function", "content": "3", "name": "add"}, Turn("tool", "3", {"name": "add"})),
        (
            {"role": "assistant", "tool_calls": [CALL]},
            Turn("assistant", "", {"tool_calls": [CALL | {"function": {"name": "add", "arguments": {"x": 1}}}]}),
        ),
        (
            {"role": "assistant", "function_call": {"name": "add", "arguments": "no JSON"}},
            Turn(
                "assistant",
                "",
                {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "no JSON"}}]},
            ),
        ),
    ],
)
def test_a_message_is_what_a_template_sees(message, expected):
    assert turn(message) == expected


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([], ""),
        (
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}],
            "a\nb",
        ),
        ([{"type": "input_text", "text": "a"}, "b"], "a\nb"),
        ([{"type": "output_text", "text": "a", "annotations": []}], "a"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}], "a"),
    ],
)
def test_parts_of_a_content_are_lines_of_one_text(content, text):
    assert turn({"role": "user", "content": content}).content == text


def test_reasoning_in_parts_reaches_the_template():
    content = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "a"}]
    assert turn({"role": "assistant", "content": content}) == Turn("assistant", "a", {"reasoning_content": "hm"})


def test_a_template_that_knows_developers_keeps_them(engine):
    def rendered(source):
        service = Service(engine, ServerConfig(), ChatTemplate(source, {}))
        body = ChatRequest.model_validate({"messages": [{"role": "developer", "content": "a"}]})
        return render(service, body.messages, body)

    assert rendered("{{ messages[0].role }}") == "system"
    assert rendered("{{ messages[0].role }}{# developer #}") == "developer"


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({}, "U:aA:b#!None"),
        ({"add_generation_prompt": False}, "U:aA:b#None"),
        ({"continue_final_message": True}, "U:aA:b"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "U:aA:b#!False"),
        ({"chat_template_kwargs": {"messages": [], "add_generation_prompt": False}}, "U:aA:b#!None"),
        ({"reasoning_effort": "low"}, "U:aA:b#!Nonelow"),
        ({"documents": [{"text": "d"}]}, "U:aA:b#!None1"),
    ],
)
def test_what_a_chat_says_of_its_template(engine, settings, prompt):
    source = (
        "{% for m in messages %}{{ m.role[0] | upper }}:{{ m.content }}{% endfor %}#{% if add_generation_prompt %}!"
        "{% endif %}{{ enable_thinking | default(none) }}{{ reasoning_effort | default('') }}"
        "{{ documents | length if documents }}"
    )
    service = Service(engine, ServerConfig(), ChatTemplate(source, {}))
    messages = [USER, {"role": "assistant", "content": "b"}]
    body = ChatRequest.model_validate({"messages": messages, **settings})
    assert render(service, body.messages, body) == prompt


def test_a_last_message_marked_as_a_prefix_is_continued(engine):
    service = Service(engine, ServerConfig(), ChatTemplate("{{ messages[-1].content }}<end>", {}))
    last = {"role": "assistant", "content": "b", "prefix": True}
    body = ChatRequest.model_validate({"messages": [USER, last]})
    assert render(service, body.messages, body) == "b"


def test_the_servers_own_answer_goes_back_in_every_form(client):
    first = client.chat.completions.create(model="tiny", messages=[USER], max_tokens=3)
    message = first.choices[0].message
    ending = {"stop": "z", "temperature": 0, "extra_body": {"mode": "ar"}}  # the helper wants texts that have ended
    with client.chat.completions.stream(model="tiny", messages=[USER], **ending) as stream:
        streamed = stream.get_final_completion().choices[0].message
    forms = [message, message.model_dump(), message.to_dict(), streamed, streamed.model_dump(exclude_unset=True)]
    for form in forms:
        again = client.chat.completions.create(model="tiny", messages=[USER, form, USER], max_tokens=3)
        assert again.usage.completion_tokens == 3


# What clients send on their own or to say that a setting is off.
NOTHING = [
    *({"frequency_penalty": 0.0}, {"presence_penalty": 0}, {"n": 1}, {"logit_bias": {}}, {"tools": []}),
    *({"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}),
    *({"response_format": {"type": "text"}}, {"response_format": {}}, {"stop": []}, {"stop": ""}, {"user": ""}),
    *({"store": True}, {"metadata": {"a": "b"}}, {"service_tier": "auto"}, {"reasoning_effort": "none"}),
    *({"stream_options": {"include_usage": True}}, {"stream_options": {}}, {"seed": -1}, {"top_p": 1}),
    *({"top_p": 0}, {"top_k": -1}, {"top_k": 0}, {"top_k": 5.0}, {"min_p": 0}, {"repetition_penalty": 1.0}),
    *({"repeat_penalty": 1}, {"length_penalty": 1.0}, {"typical_p": 1}, {"skip_special_tokens": True}),
    *({"stop_token_ids": []}, {"ignore_eos": False}, {"echo": False}, {"best_of": 1}),
    *({"spaces_between_special_tokens": True}, {"chat_template_kwargs": {}}, {"logprobs": False}),
    *({"top_logprobs": 0}, {"add_generation_prompt": True}, {"continue_final_message": False}),
    *({"modalities": ["text"]}, {"suffix": ""}, {"prompt_cache_key": "a"}, {"safety_identifier": "a"}),
    *({"verbosity": "medium"}, {"cache_prompt": True}, {"guided_json": None}, {"options": {}}),
    *({"keep_alive": "5m"}, {"provider": {}}, {"transforms": []}),
    *({"mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1}, {"dry_multiplier": 0, "dry_base": 1.75}),
    *({"xtc_probability": 0, "xtc_threshold": 0.1}, {"tfs": 1}, {"use_beam_search": False}),
    *({"function_call": "none"}, {"model": ""}, {"max_tokens": -1, "stop": "a"}, {"max_tokens": 3.0}),
    *({"prediction": {"type": "content", "content": "a"}},),
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("field", [*NOTHING, *({name: None} for field in NOTHING for name in field)], ids=json.dumps)
def test_what_asks_for_nothing_is_no_mistake(http, path, field):
    chat_only = {"reasoning_effort", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}
    if path == "/v1/completions" and chat_only & field.keys() and any(field.values()):
        return
    given = {"prompt": "a"} if path == "/v1/completions" else {"messages": [USER]}
    body = {"model": "tiny", "max_tokens": 2, "mode": "ar", **given, **field}
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text


def test_both_limits_of_new_tokens_hold(http):
    for limits in ({"max_tokens": 2, "max_completion_tokens": 4}, {"max_tokens": 4, "max_completion_tokens": 2}):
        body = {"messages": [USER], "ignore_eos": True, **limits}
        assert http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 2


def test_top_p_of_0_is_greedy(http):
    body = {"prompt": "ab", "max_tokens": 8, "mode": "ar"}
    greedy = http.post("/v1/completions", json=body | {"temperature": 0}).json()["choices"]
    assert http.post("/v1/completions", json=body | {"top_p": 0, "seed": 3}).json()["choices"] == greedy


def test_usage_in_every_chunk(http):
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 6, "mode": "ar", "stream": True, "ignore_eos": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    with http.stream("POST", "/v1/completions", json=body | {"stream_options": options}) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 6)
    assert chunks[-1]["choices"] == []


def test_without_a_limit_an_answer_ends_where_memory_does(model, serve, monkeypatch):
    # pages for some 300 tokens, where the checkpoint would allow 100,000
    engine = AsyncEngine(model, EngineConfig(max_num_requests=2, state_bytes=1 << 20, snapshot_bytes=0)).start()
    most = engine.longest_text(model.config.block_size)
    assert most is not None
    app = make_app(
        engine, ServerConfig(model_names=("tiny",), max_context=100_000), ChatTemplate("{{ messages[0].content }}", {})
    )
    with serve(app) as served:
        card = httpx.get(f"{served.url}/v1/models").json()["data"][0]
        body = {"messages": [USER], "mode": "ar", "ignore_eos": True}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()
    engine.close()
    assert (card["max_model_len"], card["limited_by"]) == (most, "memory")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == most


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("stories", "<s>Be kind. One day a b"),
        ("hybrid", "<s>Be kind.\nUser: One day\nAssistant: a\nUser: b\nAssistant:"),
    ],
)
def test_the_shipped_models_have_a_plain_template(name, prompt):
    template = ChatTemplate.load(resolve(name))
    assert template is not None
    said = [("system", "Be kind."), ("user", "One day"), ("assistant", "a"), ("user", "b")]
    assert template.render([Turn(role, content) for role, content in said]) == prompt
    tokenizer = twotower.load(name).tokenizer
    assert tokenizer.encode(prompt, add_special_tokens=False).ids == tokenizer.encode(prompt[3:]).ids
