"""Sends a plan to an OpenAI endpoint and records the clock readings of every request."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from twotower.cli.load_test.plan import Shot, Target
from twotower.cli.load_test.report import LoadReading


def client(api_key: str | None, timeout: float) -> httpx.AsyncClient:
    """A client without a limit on connections: requests must not wait for each other here."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(headers=_headers(api_key), timeout=timeout, limits=limits)


def find_model(url: str, api_key: str | None, timeout: float) -> str:
    """The first model of the endpoint's list. Raises ValueError if it has none."""
    try:
        answer = httpx.get(f"{url}/models", headers=_headers(api_key), timeout=timeout)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, json.JSONDecodeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{url}/models gives no model ({error!r}); start the server, correct --url, or pass --model"
        ) from error


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


async def run_open(
    client: httpx.AsyncClient, target: Target, shots: Sequence[Shot], done: Callable[[], None]
) -> list[LoadReading]:
    """Sends every request when it is due, however many are unfinished; `done` is called after each answer."""
    began = time.perf_counter()
    tasks = []
    for shot in shots:
        assert shot.due is not None
        await asyncio.sleep(max(0.0, began + shot.due - time.perf_counter()))
        tasks.append(asyncio.create_task(_send(client, target, shot, began, done)))
    return list(await asyncio.gather(*tasks))


async def run_closed(
    client: httpx.AsyncClient, target: Target, shots: Sequence[Shot], concurrency: int, done: Callable[[], None]
) -> list[LoadReading]:
    """Keeps `concurrency` requests unfinished until all are sent; `done` is called after each answer."""
    began = time.perf_counter()
    left = iter(shots)

    async def user() -> list[LoadReading]:
        return [await _send(client, target, shot, began, done) for shot in left]

    return [reading for own in await asyncio.gather(*(user() for _ in range(concurrency))) for reading in own]


async def _send(
    client: httpx.AsyncClient, target: Target, shot: Shot, began: float, done: Callable[[], None]
) -> LoadReading:
    now = time.perf_counter() - began
    reading = LoadReading(shot, now if shot.due is None else shot.due, now)
    path = "chat/completions" if target.endpoint == "chat" else "completions"
    try:
        async with client.stream("POST", f"{target.url}/{path}", json=_body(target, shot)) as answer:
            if answer.status_code == 200:
                await _read(answer, reading, began)
            else:
                reading.error = str(answer.status_code)
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        reading.error = type(error).__name__
    reading.ended = time.perf_counter() - began
    done()
    return reading


async def _read(answer: httpx.Response, reading: LoadReading, began: float) -> None:
    """Reads the events of a stream until its [DONE]; the error is "cut" if the stream ends before."""
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            reading.error = "stream"
            return
        if any(choice.get("text") or (choice.get("delta") or {}).get("content") for choice in event["choices"]):
            reading.chunks.append(time.perf_counter() - began)
        if event.get("usage"):
            reading.prompt_tokens = event["usage"]["prompt_tokens"]
            reading.tokens = event["usage"]["completion_tokens"]
    reading.error = "cut"


def _body(target: Target, shot: Shot) -> dict[str, Any]:
    """The request's JSON. Other servers may not know `mode` and `ignore_eos`, so they are sent only if asked for."""
    messages = [{"role": "user", "content": shot.prompt}]
    given = {"messages": messages} if target.endpoint == "chat" else {"prompt": shot.prompt}
    body = {"model": target.model, "max_tokens": shot.new_tokens, "temperature": target.temperature, "stream": True}
    mode = {} if shot.mode is None else {"mode": shot.mode}
    extra: dict[str, Any] = {"ignore_eos": True} if target.ignore_eos else {}
    return body | given | {"stream_options": {"include_usage": True}} | mode | extra
