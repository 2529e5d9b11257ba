"""What clients see when something fails while their texts are written."""

import asyncio
import concurrent.futures
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from twotower.engine.aio import AsyncEngine
from twotower.engine.config import EngineConfig
from twotower.server import answers, completions, watch
from twotower.server.app import make_app
from twotower.server.config import ServerConfig
from twotower.server.service import Service

USER = [{"role": "user", "content": "a"}]
PATHS = {
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 300},
    "/v1/chat/completions": {"model": "tiny", "messages": USER, "max_tokens": 300},
    "/v1/responses": {"model": "tiny", "input": "a", "max_output_tokens": 300},
    "/v1/messages": {"model": "tiny", "messages": USER, "max_tokens": 300},
    "/twotower/watch": {"prompt": "a", "max_tokens": 300},
}
ENDPOINTS = pytest.mark.parametrize("path", PATHS)


@pytest.fixture
def own(model) -> Iterator[AsyncEngine]:
    """One of its own for each test, because it is drained and broken."""
    made = AsyncEngine(model, EngineConfig(max_num_requests=2, max_num_waiting=12)).start()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _all_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def url(own, app, serve) -> Iterator[str]:
    made = make_app(own, ServerConfig(model_names=("tiny",), max_context=2000), app.service.template)
    with serve(made) as served:
        yield served.url


def ask(url: str, path: str, **more: Any) -> httpx.Response:
    return httpx.post(url + path, json={"mode": "ar", **PATHS[path], **more}, timeout=60)


def streamed(url: str, path: str, **more: Any) -> httpx.Response:
    return ask(url, path, **more) if path == "/twotower/watch" else ask(url, path, stream=True, **more)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def message(path: str, answer: Any) -> str:
    """The message of an error, in the protocol's shape."""
    if path == "/v1/messages":
        assert answer["type"] == "error"
        assert answer["error"]["type"] == "api_error"
    else:
        assert answer["error"]["type"] == "server_error"
    return str(answer["error"]["message"])


def strike(number: int, real: Callable, error: BaseException) -> Callable:
    """A function that raises at call `number`."""
    calls = 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return real(*args, **kwargs)

    return struck


def lines(caplog: pytest.LogCaptureFixture, path: str) -> list[dict[str, Any]]:
    """The lines of log of the requests to a path; the last is written when its client has its answer already."""
    found = [record.fields for record in caplog.records if record.getMessage() == "request"]
    return [fields for fields in found if fields["path"] == path]


def texts(url: str) -> dict[str, float]:
    """How many texts ended how."""
    told = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith("twotower_texts_total")]
    return {line.split('outcome="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in told}


@ENDPOINTS
@pytest.mark.parametrize("number", [1, 9])
def test_an_exception_of_the_engine_is_an_error_response_or_the_last_event(
    path, number, url, model, monkeypatch, caplog, wait_until
):
    with monkeypatch.context() as patched:
        patched.setattr(model, "score", strike(number, model.score, RuntimeError("a secret")))
        response = streamed(url, path)
    if number == 1:  # nothing has been sent
        assert response.status_code == 500
        found = response.json()
    else:
        assert response.status_code == 200
        *begun, found = events(response)
        assert len(begun) > 3
        assert "[DONE]" not in response.text
    assert message(path, found) == "the server failed on this request (RuntimeError); try again"
    assert "secret" not in response.text
    traces = [record for record in caplog.records if record.exc_info]
    assert [record.getMessage() for record in traces] == ["1 texts failed"]
    wait_until(lambda: lines(caplog, path))
    [line] = lines(caplog, path)
    assert line["error"] == "RequestFailed: the engine failed on this request: RuntimeError: a secret"
    assert texts(url)["failed"] == 1
    assert 'finished_reason="error",model_name="tiny"} 1.0' in httpx.get(f"{url}/metrics").text
    assert streamed(url, path).status_code == 200


@ENDPOINTS
def test_a_request_that_is_not_streamed_gets_500(path, url, model, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(model, "score", strike(9, model.score, RuntimeError("a secret")))
        response = ask(url, path)
    if path == "/twotower/watch":  # it always streams
        assert response.status_code == 200
    else:
        assert response.status_code == 500
        assert message(path, response.json()) == "the server failed on this request (RuntimeError); try again"


class Panic(BaseException):
    """As Rust code panics, that of tokenizers for instance."""


@ENDPOINTS
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("kind", [KeyError, Panic])
def test_an_exception_in_what_writes_an_answer_ends_it_with_words(path, number, kind, url, monkeypatch, caplog):
    place, name = {
        "/v1/completions": (completions.CompletionFormat, "chunk"),
        "/twotower/watch": (watch, "_tokens"),
    }.get(path, (answers.Reading, "push"))
    with monkeypatch.context() as patched:
        patched.setattr(place, name, strike(number, getattr(place, name), kind("a secret")))
        response = streamed(url, path)
    assert "[DONE]" not in response.text
    found = events(response)[-1] if response.status_code == 200 else response.json()
    assert message(path, found) == "the server failed on this request"
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.levelno == logging.ERROR
    assert texts(url)["failed"] == 1
    assert texts(url)["cancelled"] == 0


def test_a_defect_has_one_traceback_and_its_status_in_the_log(url, monkeypatch, caplog, wait_until):
    monkeypatch.setattr(completions, "CompletionFormat", None)
    response = ask(url, "/v1/completions")
    assert response.status_code == 500
    assert response.headers["x-request-id"]
    assert len([record for record in caplog.records if record.exc_info]) == 1
    wait_until(lambda: lines(caplog, "/v1/completions"))
    [line] = lines(caplog, "/v1/completions")
    assert line["status"] == 500
    assert line["error"].startswith("TypeError: ")


def test_the_official_client_raises_the_message_at_every_endpoint(url, model, monkeypatch):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    more = {"mode": "ar", "ignore_eos": True}

    def streams() -> Iterator[Any]:
        yield client.completions.create(model="tiny", prompt="a", max_tokens=400, stream=True, extra_body=more)
        yield client.chat.completions.create(model="tiny", messages=USER, max_tokens=400, stream=True, extra_body=more)
        yield client.responses.create(model="tiny", input="a", max_output_tokens=400, stream=True, extra_body=more)

    for i, stream in enumerate(streams()):
        next(stream)
        with monkeypatch.context() as patched:
            patched.setattr(model, "score", strike(1, model.score, MemoryError()))
            with pytest.raises(openai.APIError, match=r"the server failed on this request \(MemoryError\)"):
                list(stream)
        assert i == texts(url)["failed"] - 1


@ENDPOINTS
def test_a_server_that_drains_refuses_what_waits_and_finishes_what_runs(path, url, own, wait_until):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = [pool.submit(streamed, url, "/v1/completions", max_tokens=800) for _ in range(2)]
        wait_until(lambda: own.stats().num_running == 2)
        waiting = [pool.submit(asked, url, path) for asked in (ask, streamed)]
        wait_until(lambda: own.stats().num_waiting == 2)
        own.drain()
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "stopping"})
        for refused in (*(one.result() for one in waiting), ask(url, path), streamed(url, path)):
            assert refused.status_code == 503
            assert "is shutting down" in message(path, refused.json())
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["connection"] == "close"
        for done in running:
            assert done.result().text.endswith("data: [DONE]\n\n")
    assert texts(url)["failed"] == 2


@ENDPOINTS
def test_what_is_abandoned_ends_with_an_error(path, url, own, wait_until):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        begun = [pool.submit(asked, url, path) for asked in (ask, streamed)]
        # more rounds than the steps of a block: the stream has begun
        wait_until(lambda: own.stats().num_running == 2 and own.stats().num_rounds > 50)
        own.abandon()
        whole, stream = (one.result() for one in begun)
    assert "did not finish this request" in message(path, events(stream)[-1])
    assert "[DONE]" not in stream.text
    if path != "/twotower/watch":
        assert whole.status_code == 503
        assert "did not finish this request" in message(path, whole.json())


def test_the_texts_of_an_answer_of_which_one_fails_count_as_failed(url, model, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(model, "score", strike(9, model.score, RuntimeError("a secret")))
        assert ask(url, "/v1/completions", n=5).status_code == 500
    assert texts(url)["failed"] == 5


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_what_the_server_has_not_given_to_the_engine_when_it_stops_gets_503(path, own, app, serve, monkeypatch):
    begun = threading.Event()

    async def slow(*_: Any, **__: Any) -> None:
        begun.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(Service, "tokens", slow)
    made = make_app(own, ServerConfig(model_names=("tiny",), max_context=2000), app.service.template)
    with serve(made) as served, concurrent.futures.ThreadPoolExecutor() as pool:
        served.server.config.timeout_graceful_shutdown = 1
        answer = pool.submit(streamed, served.url, path)
        assert begun.wait(10)
        served.server.should_exit = True
        response = answer.result()
    assert response.status_code == 503
    assert "did not finish this request" in message(path, response.json())
