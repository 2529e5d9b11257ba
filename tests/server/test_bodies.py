"""Bodies and values as all kinds of clients write them, and what is said of those that can't be read."""

import gzip
import json
import re
import socket

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.server.config import ServerConfig
from twotower.server.lifecycle import uvicorn_settings

ASK = {"model": "tiny", "prompt": "ab", "max_tokens": 6, "temperature": 0, "mode": "ar"}
SENT = json.dumps(ASK).encode()
JSON = {"content-type": "application/json"}


def text(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@pytest.mark.parametrize(
    "kind", ["application/json; charset=UTF-8", "APPLICATION/JSON", "application/vnd.api+json", "application/json;"]
)
def test_headers_that_say_json(http, kind):
    expected = text(http.post("/v1/completions", json=ASK))
    assert text(http.post("/v1/completions", content=SENT, headers={"content-type": kind})) == expected


@pytest.mark.parametrize("body", [b"\xef\xbb\xbf" + SENT, SENT + b"\r\n\r\n", SENT.replace(b": 6", b": 6.0")])
def test_bodies_that_are_json_all_the_same(http, body):
    """With a byte order mark, blank lines at the end, or every number with a point."""
    answer = http.post("/v1/completions", content=body, headers=JSON)
    assert text(answer) == text(http.post("/v1/completions", json=ASK))


@pytest.mark.parametrize(
    ("body", "headers", "status", "told"),
    [
        (gzip.compress(SENT, mtime=0), {"content-encoding": "gzip"}, 415, "Content-Encoding gzip"),
        ('{"prompt": "é"}'.encode("latin-1"), {}, 400, "not in UTF-8, as JSON must be, at its byte 12"),
        (SENT.decode().encode("utf-16"), {}, 400, "not in UTF-8"),
        (rb'{"prompt": "\ud83c"}', {}, 400, "half of a character, a lone surrogate, at line 1 column 19"),
        (rb'{"prompt": "\udf89a"}', {}, 400, "half of a character"),
        (rb'{"prompt": "\ud83c\ud83c"}', {}, 400, "half of a character"),
        (rb'{"prompt": "\u12"}', {}, 400, "not JSON"),
        (b'{"": 1}', {}, 400, '"" is not supported'),
        (b'{"temperature": NaN}', {}, 400, "not JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', {}, 400, "temperature is Infinity, must be"),
        (b'{"prompt": "a", "max_tokens": 1e999}', {}, 400, "max_tokens is Infinity, must be an integer"),
        (b"{'prompt': 'a'}", {}, 400, "not JSON"),
    ],
)
def test_what_is_wrong_with_a_body(http, body, headers, status, told):
    response = http.post("/v1/completions", content=body, headers=JSON | headers)
    assert response.status_code == status
    assert told in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_called_json_is_refused_in_a_sentence(http, kind):
    """A browser sends such bodies to any server without asking it first."""
    response = http.post("/v1/completions", content=SENT, headers={} if kind is None else {"content-type": kind})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def chunks(body):
    return b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))


@pytest.mark.parametrize(
    ("version", "headers", "body"),
    [
        (b"1.0", b"Content-Length: %d" % len(SENT), SENT),
        (b"1.1", b"Transfer-Encoding: chunked", chunks(SENT) + b"0\r\n\r\n"),
        (
            b"1.1",
            b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\nTransfer-Encoding: chunked",
            chunks(SENT) + b"0\r\n\r\n",
        ),
        (b"1.1", b"Expect: 100-continue\r\nContent-Length: %d" % len(SENT), SENT),
    ],
)
def test_http_as_all_kinds_of_clients_speak_it(url, http, version, headers, body):
    """The third is Java's, which offers HTTP/2 in every request."""
    expected = text(http.post("/v1/completions", json=ASK))
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/%s\r\nHost: x\r\nContent-Type: application/json\r\n" % version
    head += b"Connection: close%s\r\n" % (b", Upgrade, HTTP2-Settings" if b"h2c" in headers else b"")
    with socket.create_connection((host, int(port)), timeout=30) as sent:
        sent.sendall(head + headers + b"\r\n\r\n" + body)
        answer = b"".join(iter(lambda: sent.recv(1 << 16), b""))
    assert b" 200 OK\r\n" in answer
    assert json.loads(answer[answer.index(b"{") :])["choices"][0]["text"] == expected


def test_the_parser_that_loses_bodies_is_not_taken_where_it_is_installed(app):
    settings = uvicorn_settings(app, ServerConfig())
    assert issubclass(settings.http.func, H11Protocol)


@pytest.mark.parametrize(
    ("ours", "same"),
    [
        ({"prompt": [101.0, 102]}, {"prompt": [101, 102]}),
        ({"prompt": [[101.0]]}, {"prompt": [[101]]}),
        ({"stop_token_ids": [104.0], "n": 1.0, "top_k": 5.0}, {"stop_token_ids": [104]}),
        ({"temperature": 1e-9, "seed": 3}, {"temperature": 0}),
        ({"temperature": 5e-324}, {"temperature": 0}),
        ({"temperature": 3, "seed": -5}, {"temperature": 3, "seed": 2**63 - 5}),
        ({"temperature": 3, "seed": -(2**63)}, {"temperature": 3, "seed": 0}),
        ({"temperature": 3, "seed": 7.0}, {"temperature": 3, "seed": 7}),
        ({"stop": ["\0"] * 127 + [" "]}, {"stop": " "}),
        ({"stop": ["b", "b"]}, {"stop": "b"}),
    ],
    ids=str,
)
def test_two_spellings_of_one_request(http, ours, same):
    first, second = (http.post("/v1/completions", json=ASK | given) for given in (ours, same))
    assert text(first) == text(second)


def test_texts_of_one_prompt_have_seeds_beyond_the_largest(http):
    """OpenAI's seeds are 64 bits with a sign; the one after the largest is the first."""
    ask = ASK | {"temperature": 3, "max_tokens": 12}
    several = http.post("/v1/completions", json=ask | {"seed": 2**63 - 1, "n": 3}).json()["choices"]
    alone = [text(http.post("/v1/completions", json=ask | {"seed": seed})) for seed in (2**63 - 1, 0, 1)]
    assert [choice["text"] for choice in several] == alone
    refused = http.post("/v1/completions", json=ask | {"seed": 2**63}).json()["error"]
    assert (refused["param"], "in [-9223372036854775808, " in refused["message"]) == ("seed", True)


def test_a_repetition_penalty_may_be_large(http, model):
    """vLLM's has no upper bound."""
    [expected] = generate(model, ["ab"], SamplingParams(mode="ar", max_new_tokens=6, repetition_penalty=40.0))
    assert text(http.post("/v1/completions", json=ASK | {"repetition_penalty": 40})) == expected.text


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ({"bad_words": [""]}, 'bad_words is [""], must be a list of texts that are not empty'),
        ({"prompt": "x" * 2001}, "maximum context length is 2000 tokens, but the prompt has 2001; shorten it"),
        ({"max_tokens": 1999}, "2000 tokens, but the prompt has 2 and the request asks for 1999 new ones; shorten"),
        ({"stop": ["x"] * 129}, "a list of at most 128 such texts"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5] is 101.0, must be a number in [-100, 100]"),
    ],
)
def test_errors_are_in_words_of_http(http, field, told):
    message = http.post("/v1/completions", json=ASK | field).json()["error"]["message"]
    assert told in message
    assert not re.search(r"write \w+=|\('|\*\*", message)


def test_an_echo_is_what_was_read_of_the_prompt(http):
    body = ASK | {"prompt": "xyzab", "echo": True, "logprobs": 0, "truncate_prompt_tokens": 2}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"].startswith("ab")
    assert choice["logprobs"]["tokens"][:2] == ["a", "b"]
    assert choice["logprobs"]["text_offset"][:3] == [0, 1, 2]


@pytest.mark.parametrize("prompt", ["a</s>b", "</s>", [101, 2, 102]])
def test_offsets_count_control_tokens_where_the_text_has_them(http, prompt):
    """A prompt that is a text has what was typed, whether control tokens are shown or not."""
    body = ASK | {"prompt": prompt, "echo": True, "logprobs": 0, "allowed_token_ids": [2, 104], "temperature": 3}
    for shown in (True, False):
        ask = body | {"skip_special_tokens": not shown, "seed": 5, "ignore_eos": True, "max_tokens": 9}
        choice = http.post("/v1/completions", json=ask).json()["choices"][0]
        whole, given = choice["text"], choice["logprobs"]
        assert "</s>" in given["tokens"][-9:], "the seed's text has one"
        in_prompt = isinstance(prompt, str) or shown
        assert whole.count("</s>") == in_prompt + shown * given["tokens"][-9:].count("</s>")
        for token, offset in zip(given["tokens"], given["text_offset"], strict=True):
            assert whole.startswith(token, offset) or token == "</s>"
        assert given["text_offset"][-1] == len(whole) - len(given["tokens"][-1]) * (
            shown or "<" not in given["tokens"][-1]
        )


def test_bytes_of_a_chat_are_its_text_with_control_tokens_too(http):
    body = {"messages": [{"role": "user", "content": "a"}], "mode": "ar", "logprobs": True, "max_tokens": 9, "seed": 5}
    body |= {"allowed_token_ids": [2, 104], "temperature": 3, "ignore_eos": True}
    for skip in (True, False):
        choice = http.post("/v1/chat/completions", json=body | {"skip_special_tokens": skip}).json()["choices"][0]
        joined = b"".join(bytes(token["bytes"] or []) for token in choice["logprobs"]["content"])
        assert joined.decode() == choice["message"]["content"]
        assert (b"</s>" in joined) is not skip
