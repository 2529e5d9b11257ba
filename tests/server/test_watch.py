"""/twotower/about and /twotower/watch: what the page reads."""

import json

import httpx
import pytest

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

MESSAGES = [{"role": "user", "content": "b"}]


def events(url, body):
    with httpx.stream("POST", f"{url}/twotower/watch", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        return [json.loads(line[6:]) for line in answer.iter_lines() if line]


@pytest.mark.parametrize("mode", ["ar", "diffusion", "verified"])
def test_watched_messages_are_answered_as_the_chat_endpoint_answers_them(url, client, model, mode):
    messages = [{"role": "system", "content": "b"}, {"role": "user", "content": "é"}]
    settings = {"mode": mode, "temperature": 0, "max_tokens": 20}
    seen = events(url, {"messages": messages, **settings})
    extra = {"mode": settings.pop("mode")}
    whole = client.chat.completions.create(model="tiny", messages=messages, extra_body=extra, **settings)
    assert "".join(event["text"] for event in seen) == whole.choices[0].message.content
    result = seen[-1]["result"]
    assert result["text"] == whole.choices[0].message.content
    assert result["prompt_tokens"] == whole.usage.prompt_tokens
    expected = generate(model, ["[system]b[user]éa"], SamplingParams(max_new_tokens=20, mode=mode))[0]
    assert result["text"] == expected.text


@pytest.mark.parametrize("body", [{}, {"prompt": None}, {"prompt": "a", "messages": MESSAGES}])
def test_a_prompt_and_messages_exclude_each_other(http, body):
    answer = http.post("/twotower/watch", json=body)
    assert answer.status_code == 400
    assert "either a prompt or messages" in answer.json()["error"]["message"]


def test_without_a_template_messages_are_refused_and_about_says_so(engine, serve, http):
    assert http.get("/twotower/about").json()["has_chat_template"] is True
    with serve(make_app(engine, ServerConfig(model_names=("tiny",)))) as served:
        assert httpx.get(f"{served.url}/twotower/about").json()["has_chat_template"] is False
        answer = httpx.post(f"{served.url}/twotower/watch", json={"messages": MESSAGES})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")


def test_about_says_what_drafts_and_which_target_may_be_asked(engine, serve, http):
    found = http.get("/twotower/about").json()
    assert (found["default_drafter"], found["most_target_retention"]) == ("denoiser", None)
    with serve(make_app(engine, ServerConfig(model_names=("tiny",), default_drafter="prompt"))) as served:
        assert httpx.get(f"{served.url}/twotower/about").json()["default_drafter"] == "prompt"


def test_about_has_the_settings_that_the_server_takes_with_their_defaults(url, http):
    settings = {entry.pop("name"): entry for entry in http.get("/twotower/about").json()["settings"]}
    assert settings["temperature"]["default"] == 1.0
    assert (settings["block_size"]["kind"], settings["block_size"]["default"]) == ("int", 8)
    assert settings["commit_rule"]["choices"][0] == settings["commit_rule"]["default"] == "confidence"
    assert (settings["top_p"]["least"], settings["top_p"]["most"]) == (0, 1)
    assert "mode" not in settings
    assert "stop" not in settings
    given = {name: entry["default"] for name, entry in settings.items() if entry["default"] is not None}
    assert events(url, {"prompt": "a", **given, "max_tokens": 2})[-1]["result"]["num_tokens"] == 2
