"""The clients of the soak: what a server does wrong is counted as wrong or lost, and what it refuses as refused."""

import asyncio
import importlib.util
import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "service" / "load.py"
TEXT = "a b"


@pytest.fixture(scope="module")
def load():
    spec = importlib.util.spec_from_file_location("load", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def response(status, body, *, cut=False):
    length = len(body) + (10 if cut else 0)
    return f"HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}".encode()


def error(status):
    return response(status, json.dumps({"error": {"message": "no", "type": "server_error"}}))


def choices(text):
    return json.dumps({"choices": [{"index": 0, "text": text}]})


def events(*parts, end=True, cut=False):
    lines = [f"data: {part}\n\n" for part in parts] + ["data: [DONE]\n\n"] * end
    return response(200, "".join(lines), cut=cut)


async def outcome(load, kind, answer, *, is_down=False):
    """How a request ends that a server answers so."""

    async def serve(reader, writer):
        await reader.readuntil(b"}")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    if answer is None:
        server.close()
    tally = load.Tally(is_down=is_down)
    asked = [load.Question({"prompt": "p"}, [TEXT])]
    await load.run(f"http://127.0.0.1:{port}", asked, {kind: 1}, tally, 0)
    server.close()
    [(_, found)] = tally.counts
    return found


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (response(200, choices(TEXT)), "right"),
        (response(200, choices("a c")), "wrong"),
        (response(200, choices(TEXT), cut=True), "lost"),
        (b"", "lost"),
        (None, "lost"),
        (response(500, "Internal Server Error"), "lost"),
        (error(500), "failed, told"),
        (error(429), "refused: full"),
        (error(503), "refused: stopping"),
        (error(400), "wrong"),
    ],
    ids=["right", "other text", "cut", "nothing", "nobody", "no JSON", "500", "429", "503", "400"],
)
def test_a_whole_answer_counts_as_what_it_is(load, answer, expected):
    assert asyncio.run(outcome(load, "whole", answer)) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (events(choices("a"), choices(" b")), "right"),
        (events(choices("a")), "wrong"),
        (events(choices("a"), choices(" b"), end=False), "lost"),
        (events(choices("a"), choices(" b"), end=False, cut=True), "lost"),
        (events(choices("a"), json.dumps({"error": {"message": "no"}}), end=False), "failed, told"),
        (error(503), "refused: stopping"),
    ],
    ids=["right", "short", "no end", "cut", "error event", "503"],
)
def test_a_stream_counts_as_what_it_is(load, answer, expected):
    assert asyncio.run(outcome(load, "stream", answer)) == expected


def test_a_server_that_is_being_started_again_refuses(load):
    assert asyncio.run(outcome(load, "whole", None, is_down=True)) == "refused: down"
