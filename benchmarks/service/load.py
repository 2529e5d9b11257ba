"""Clients of many kinds that go on asking a server for texts, and what became of each request."""

import asyncio
import collections
import dataclasses
import json
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

SILENT_SECONDS = 60.0  # a request without a byte for so long is lost


@dataclasses.dataclass(frozen=True)
class Question:
    """A request's body for /v1/completions, and the texts that are right."""

    body: dict[str, Any]
    answers: list[str]


@dataclasses.dataclass
class Tally:
    """How many requests of each kind ended how; `is_down` says that the server is being started again."""

    counts: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    is_down: bool = False

    def end(self, kind: str, outcome: str, what: str = "") -> None:
        self.counts[kind, outcome] += 1
        if outcome in ("wrong", "lost") and len(self.unexpected) < 20:
            self.unexpected.append(f"{kind}: {what}"[:300])

    def table(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for (kind, outcome), count in sorted(self.counts.items()):
            found.setdefault(kind, {})[outcome] = count
        return found

    def total(self, outcome: str | None = None) -> int:
        return sum(count for (_, found), count in self.counts.items() if outcome in (None, found))


class Told(Exception):
    """The server said that it could not: a status of 429 or 5xx with an error, or an error event in a stream."""

    def __init__(self, outcome: str) -> None:
        super().__init__(outcome)
        self.outcome = outcome


async def run(url: str, questions: Sequence[Question], kinds: dict[str, int], tally: Tally, seconds: float) -> None:
    """Has `kinds` clients of each kind ask for `seconds`, at least once, and waits until the last of them are done."""
    until = asyncio.get_running_loop().time() + seconds
    clients = [
        asyncio.create_task(_client(kind, url, questions, tally, until, random.Random(f"{kind} {i}")))
        for kind, count in kinds.items()
        for i in range(count)
    ]
    await asyncio.gather(*clients)


async def _client(
    kind: str, url: str, questions: Sequence[Question], tally: Tally, until: float, chance: random.Random
) -> None:
    small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)] if kind == "slow reader" else None
    transport = httpx.AsyncHTTPTransport(socket_options=small)
    async with httpx.AsyncClient(base_url=url, timeout=SILENT_SECONDS, transport=transport, trust_env=False) as http:
        while True:
            question = chance.choice(questions)
            began_down = tally.is_down
            try:
                tally.end(kind, *await KINDS[kind](http, question, chance))
            except Told as told:
                tally.end(kind, told.outcome)
                await asyncio.sleep(0.2)
            except (httpx.ConnectError, ConnectionRefusedError) as error:
                tally.end(kind, "refused: down" if began_down or tally.is_down else "lost", repr(error))
                await asyncio.sleep(0.5)
            except (httpx.HTTPError, json.JSONDecodeError, KeyError, OSError) as error:
                tally.end(kind, "lost", f"{error!r} (down: {tally.is_down})")
                await asyncio.sleep(0.5)
            if asyncio.get_running_loop().time() >= until:
                return


def _check(response: httpx.Response) -> None:
    """Raises Told for an error that a client can read, KeyError for one that it can't."""
    if response.status_code >= 400:
        error = response.json()["error"]
        if not (error["message"] and error["type"]):
            raise KeyError("message or type")
        name = {429: "refused: full", 503: "refused: stopping"}.get(response.status_code, "failed, told")
        raise Told(name if response.status_code in (429, 503, 500) else "wrong")


@asynccontextmanager
async def _events(http: httpx.AsyncClient, question: Question) -> AsyncIterator[AsyncIterator[dict[str, Any] | None]]:
    """The events of a stream, None for its end."""
    async with http.stream("POST", "/v1/completions", json=question.body | {"stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
            _check(response)

        async def events() -> AsyncIterator[dict[str, Any] | None]:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    event = None if line == "data: [DONE]" else json.loads(line[6:])
                    if event is not None and "error" in event:
                        raise Told("failed, told")
                    yield event

        yield events()


async def _joined(http: httpx.AsyncClient, question: Question, pause: Callable[[], float]) -> tuple[str, str]:
    texts, ended = [""] * len(question.answers), False
    async with _events(http, question) as events:
        async for event in events:
            ended = ended or event is None
            for choice in (event or {}).get("choices", ()):
                texts[choice["index"]] += choice["text"]
            await asyncio.sleep(pause())
    if not ended:
        return "lost", "a stream without an end and without an error"
    return ("right", "") if texts == question.answers else ("wrong", f"{texts} for {question.answers}")


async def whole(http: httpx.AsyncClient, question: Question, chance: random.Random) -> tuple[str, str]:
    """A request whose answer comes at once."""
    response = await http.post("/v1/completions", json=question.body)
    _check(response)
    texts = [choice["text"] for choice in response.json()["choices"]]
    return ("right", "") if texts == question.answers else ("wrong", f"{texts} for {question.answers}")


async def scored(http: httpx.AsyncClient, question: Question, chance: random.Random) -> tuple[str, str]:
    """One with log-probabilities of the prompt too."""
    body = question.body | {"logprobs": 1, "echo": True}
    response = await http.post("/v1/completions", json=body)
    _check(response)
    choices = response.json()["choices"]
    prompt = question.body["prompt"]
    right = [choice["text"] for choice in choices] == [prompt + answer for answer in question.answers]
    whole = all(len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) for choice in choices)
    return ("right", "") if right and whole else ("wrong", f"{choices}")


async def stream(http: httpx.AsyncClient, question: Question, chance: random.Random) -> tuple[str, str]:
    return await _joined(http, question, lambda: 0.0)


async def slow_reader(http: httpx.AsyncClient, question: Question, chance: random.Random) -> tuple[str, str]:
    """A stream from which the client reads an event every 50 to 400 ms."""
    return await _joined(http, question, lambda: chance.uniform(0.05, 0.4))


async def dropper(http: httpx.AsyncClient, question: Question, chance: random.Random) -> tuple[str, str]:
    """A client that goes away: before its answer, or in the middle of a stream."""
    if chance.random() < 0.5:
        asking = asyncio.create_task(http.post("/v1/completions", json=question.body))
        done, _ = await asyncio.wait({asking}, timeout=chance.uniform(0, 0.1))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        if done and not asking.cancelled() and asking.exception() is None:
            _check(asking.result())
        return "dropped", ""
    left = chance.randrange(1, 6)
    async with _events(http, question) as events:
        async for _ in events:
            left -= 1
            if not left:
                break
    return "dropped", ""


async def nonsense(http: httpx.AsyncClient, question: Question, chance: random.Random) -> tuple[str, str]:
    """A request that can't be right, and is told so."""
    bad: list[tuple[Any, int]] = [
        (b"{", 400),
        (b"\xff" * 100, 400),
        (json.dumps(question.body | {"mode": "psychic"}).encode(), 400),
        (json.dumps(question.body | {"max_tokens": "many"}).encode(), 400),
        (json.dumps(question.body | {"model": "x" * 10_000}).encode(), 404),
        (json.dumps(question.body | {"user": "u" * 100_000, "n": 10_000}).encode(), 400),
        (b'{"prompt": "' + b"a" * (3 << 20) + b'"}', 413),
    ]
    content, status = chance.choice(bad)
    response = await http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    if response.status_code in (429, 503):
        _check(response)
    await asyncio.sleep(chance.uniform(0.1, 0.5))
    told = response.json()["error"]["message"]
    return ("right", "") if response.status_code == status else ("wrong", f"{response.status_code} {told}")


async def silent(http: httpx.AsyncClient, question: Question, chance: random.Random) -> tuple[str, str]:
    """A connection on which half of a request is sent, and then nothing for a while."""
    reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    try:
        writer.write(
            chance.choice([b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"])
        )
        await asyncio.wait({asyncio.create_task(reader.read(1))}, timeout=chance.uniform(5, 60))
    finally:
        writer.close()
    return "dropped", ""


KINDS = {
    "whole": whole,
    "scored": scored,
    "stream": stream,
    "slow reader": slow_reader,
    "dropper": dropper,
    "nonsense": nonsense,
    "silent": silent,
}
