"""Keys, origins, request ids and log lines."""

import json
import logging

import httpx
import pytest

from twotower.errors import SettingError
from twotower.server.app import make_app
from twotower.server.config import ServerConfig
from twotower.server.logs import JsonLines

ASK = {"model": "tiny", "prompt": "a secret story", "max_tokens": 2, "user": "someone"}


@pytest.fixture(scope="module")
def guarded(engine, serve):
    config = ServerConfig(model_names=("tiny",), api_keys=("one", "two"), cors_origins=("https://a.example",))
    with serve(make_app(engine, config)) as served:
        yield served.url


@pytest.mark.slow
def test_a_key_opens_everything_else_but_a_few_things(guarded):
    for key in ("one", "two"):
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{guarded}/v1/models", headers=headers).status_code == 200
        assert httpx.post(f"{guarded}/v1/completions", json=ASK, headers=headers).status_code == 200
    for path in ("/v1/models", "/metrics", "/twotower/about", "/nowhere", "/openapi.json"):
        for value in (None, "Bearer", "Bearer three", "Basic one", "one", "Bearer ön".encode()):
            response = httpx.get(f"{guarded}{path}", headers={} if value is None else {"Authorization": value})
            assert response.status_code == 401, (path, value)
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health", "/page/page.css"):
        assert httpx.get(f"{guarded}{path}").status_code == 200
    # a path that only looks open
    assert httpx.get(f"{guarded}/page/../metrics").status_code in (401, 404)
    assert httpx.get(f"{guarded}/page/%2e%2e/app.py").status_code == 404


def test_only_chosen_origins_may_read_answers(guarded, url):
    def allowed(base, origin):
        response = httpx.get(f"{base}/health", headers={"Origin": origin})
        return response.headers.get("access-control-allow-origin")

    assert allowed(guarded, "https://a.example") == "https://a.example"
    assert allowed(guarded, "https://b.example") is None
    assert allowed(url, "https://a.example") is None


def test_a_proxy_may_keep_or_take_the_path_that_it_shows(engine, serve):
    config = ServerConfig(model_names=("tiny",), api_keys=("one",), root_path="/llm")
    with serve(make_app(engine, config)) as served:
        for prefix in ("", "/llm"):
            for path in ("/", "/health", "/page/chat.js"):
                assert httpx.get(f"{served.url}{prefix}{path}").status_code == 200, prefix + path
            assert httpx.get(f"{served.url}{prefix}/v1/models").status_code == 401
            assert httpx.get(f"{served.url}{prefix}/metrics/health").status_code == 401
            headers = {"Authorization": "Bearer one"}
            assert httpx.get(f"{served.url}{prefix}/v1/models", headers=headers).status_code == 200
            schema = httpx.get(f"{served.url}{prefix}/openapi.json", headers=headers).json()
            assert schema["servers"] == [{"url": "/llm"}]
        # the page's own links begin at the slash
        assert httpx.get(f"{served.url}/llm").headers["location"] == f"{served.url}/llm/"
        assert httpx.get(f"{served.url}/llm/llm/health").status_code == 401


def test_each_response_has_an_id_and_a_line_without_texts(http, caplog, wait_until):
    def lines():
        # the line of a test before this one may still be coming
        found = [json.loads(JsonLines().format(r)) for r in caplog.records if r.name.startswith("twotower.server")]
        return [line for line in found if line["path"] in ("/v1/completions", "/v1/nowhere")]

    caplog.set_level(logging.INFO, logger="twotower.server.middleware")
    response = http.post("/v1/completions", json=ASK)
    wait_until(lambda: len(lines()) == 1)  # a line is written after the response has been sent
    http.get("/v1/nowhere")
    wait_until(lambda: len(lines()) == 2)
    done, lost = lines()
    assert done["request_id"] == response.headers["x-request-id"] != lost["request_id"]
    assert (done["path"], done["status"], done["mode"]) == ("/v1/completions", 200, "diffusion")
    assert (done["prompt_tokens"], done["user"]) == (14, "someone")
    assert done["id"] == response.json()["id"]
    assert done["seconds"] > done["seconds_queued"] >= 0
    assert lost["status"] == 404
    assert "secret" not in json.dumps(done)


def test_metrics_count_texts_tokens_and_calls(http):
    def read():
        lines = [line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = read()
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 9, "mode": "verified", "ignore_eos": True, "n": 2}
    usage = http.post("/v1/completions", json=body).json()["usage"]
    after = read()

    def added(name):
        return after[name] - before.get(name, 0)

    assert added('twotower_texts_total{mode="verified",outcome="length"}') == 2
    assert added('twotower_prompt_tokens_total{mode="verified"}') == 6
    assert added('twotower_new_tokens_total{mode="verified"}') == 18
    assert added("twotower_denoiser_calls_total") == usage["denoiser_calls"]
    assert added('twotower_time_to_first_token_seconds_count{mode="verified"}') == 2
    assert added('twotower_queue_time_seconds_count{mode="verified"}') == 2
    assert added('twotower_tokens_per_nfe_sum{mode="verified"}') > 0
    assert added('twotower_http_responses_total{path="/v1/completions",status="200"}') == 1
    assert after["twotower_batch_occupancy"] == 0
    assert after["twotower_state_bytes"] <= after["twotower_state_bytes_limit"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_names", ("a", "")),
        ("host", ""),
        ("port", 65536),
        ("default_mode", "fast"),
        ("max_context", 1),
        ("max_choices", 0),
        ("max_body_bytes", 10),
        ("api_keys", ("",)),
        ("api_keys", ("ü",)),
        ("cors_origins", ("a.example",)),
        ("cors_origins", ("https://a.example/b",)),
        ("root_path", "/a/"),
        ("ssl_keyfile", "key.pem"),
        ("shutdown_seconds", -1),
        ("log_level", "loud"),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(SettingError) as caught:
        ServerConfig(**{name: value})
    assert caught.value.name == name


def test_an_api_key_is_not_shown_in_its_error():
    with pytest.raises(SettingError) as caught:
        ServerConfig(model_names=("tiny",), api_keys=("secret\n",))
    assert "secret" not in str(caught.value)
