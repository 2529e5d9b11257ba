"""/tokenize and /detokenize, /version and /ping, HEAD and OPTIONS."""

import httpx
import pytest

import twotower
from twotower.server.app import make_app
from twotower.server.config import ServerConfig


def test_a_prompt_has_the_tokenizers_ids(http, byte_tokenizer):
    for text in ("ab 🎉", ""):
        body = http.post("/tokenize", json={"model": "tiny", "prompt": text}).json()
        ids = byte_tokenizer.encode(text).ids
        assert body == {"count": len(ids), "max_model_len": 2000, "tokens": ids, "token_strs": None}


def test_the_strings_of_tokens_are_those_of_the_vocabulary(http, byte_tokenizer):
    body = http.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert body["token_strs"] == [byte_tokenizer.id_to_token(i) for i in body["tokens"]]


def test_messages_have_the_ids_of_the_prompt_that_a_chat_has(http):
    messages = [{"role": "user", "content": "ab"}]
    body = http.post("/tokenize", json={"messages": messages}).json()
    ask = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
    chat = http.post("/v1/chat/completions", json=ask).json()
    assert body["tokens"] == chat["choices"][0]["prompt_token_ids"]
    assert http.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "[user]aba"}


def test_the_name_of_the_mask_is_text(http):
    named = "a<mask>"
    ids = http.post("/tokenize", json={"prompt": named}).json()["tokens"]
    assert ids == [4 + byte for byte in named.encode()]
    ask = {"prompt": named, "max_tokens": 1, "return_token_ids": True}
    assert http.post("/v1/completions", json=ask).json()["choices"][0]["prompt_token_ids"] == ids


def test_no_tokens_are_no_text(http):
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "give either a prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "either a prompt or messages"),
        ("/detokenize", {}, "tokens is missing"),
        ("/detokenize", {"tokens": [5, 260]}, "tokens[1] is 260, must be a token id in [0, 259]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0] is -1"),
    ],
)
def test_what_cannot_be_read_is_said(http, path, body, message):
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_another_model_has_no_tokens_here(http):
    assert http.post("/tokenize", json={"model": "gpt", "prompt": "a"}).status_code == 404


def test_the_version_and_the_health_are_told(http):
    assert http.get("/version").json() == {"version": twotower.__version__}
    assert http.get("/ping").json() == http.get("/health").json() == {"status": "ready"}


def test_a_model_says_its_limits_and_modes(http):
    card = http.get("/v1/models/tiny").json()
    assert (card["max_model_len"], card["max_choices"], card["default_mode"]) == (2000, 16, "diffusion")
    assert {"ar", "diffusion", "verified", "auto"} <= set(card["modes"])


def test_a_model_answers_to_all_its_names(engine, serve):
    with serve(make_app(engine, ServerConfig(model_names=("large", "small")))) as served:
        assert [card["id"] for card in httpx.get(f"{served.url}/v1/models").json()["data"]] == ["large", "small"]
        assert httpx.get(f"{served.url}/v1/models/small").json()["root"] == "large"
        for name in ("large", "small", None):
            ask = {"model": name, "prompt": "a", "max_tokens": 1}
            assert httpx.post(f"{served.url}/v1/completions", json=ask).json()["model"] == "large"
        lost = httpx.post(f"{served.url}/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert lost.status_code == 404
        assert "this server has 'large' and 'small'" in lost.json()["error"]["message"]
        enum = httpx.get(f"{served.url}/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
        assert enum["properties"]["model"]["enum"] == ["large", "small"]


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/version", "/v1/models", "/metrics", "/page/chat.js"])
def test_head_is_get_without_the_body(http, path):
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/completions", "OPTIONS, POST"),
        ("/page/chat.js", "GET, HEAD, OPTIONS"),
    ],
)
def test_options_says_the_methods(http, path, methods):
    response = http.options(path)
    assert (response.status_code, response.headers["allow"]) == (204, methods)


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/chat/completions", 404, "there is nothing at /chat/completions; base URLs end in /v1"),
        ("OPTIONS", "/nowhere", 404, "there is nothing at /nowhere"),
        ("HEAD", "/nowhere", 404, ""),
        ("DELETE", "/v1/models", 405, "DELETE is not answered at /v1/models; OPTIONS says which methods are"),
        ("GET", "/tokenize", 405, "GET is not answered at /tokenize"),
        ("POST", "/page/chat.js", 405, "POST is not answered at /page/chat.js"),
    ],
)
def test_other_methods_and_paths_are_errors(http, method, path, status, message):
    response = http.request(method, path)
    assert response.status_code == status
    if method != "HEAD":
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.json()["error"]["message"].startswith(message)


def test_the_schema_tells_the_key_where_there_is_one(engine, serve, http):
    with serve(make_app(engine, ServerConfig(model_names=("tiny",), api_keys=("one",)))) as served:
        headers = {"Authorization": "Bearer one"}
        schema = httpx.get(f"{served.url}/openapi.json", headers=headers).json()
        assert httpx.get(f"{served.url}/ping").status_code == 200
    assert schema["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert schema["security"] == [{"key": []}]
    assert schema["paths"]["/health"]["get"]["security"] == []
    assert "security" not in http.get("/openapi.json").json()
