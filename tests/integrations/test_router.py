"""The router in front of replicas that are full, that die or that answer: sockets that say what a test tells them."""

import asyncio
import contextlib
import json

import httpx
import openai
import pytest

pytest.importorskip("aiohttp", reason="needs pip install 'twotower[ray]'")

from twotower.integrations.ray.choice import Fleet, Member
from twotower.integrations.ray.router import Relay, make_router
from twotower.server.config import ServerConfig

JSON = b"content-type: application/json\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b"data: {}\n\n"
NOTHING = b""
HANGS = b"and hangs"
GOOD = b"HTTP/1.1 200 OK\r\n" + JSON + b"content-length: 2\r\n\r\n{}"
FULL = b"HTTP/1.1 429 Too Many\r\nretry-after: 1\r\n" + JSON + b"content-length: 4\r\n\r\nfull"
HALF = b"HTTP/1.1 200 OK\r\n" + JSON + b"content-length: 200\r\n\r\n{"
CUT_STREAM = EVENTS + b"a\r\n" + EVENT + b"\r\n" + b"5\r\ndata:\r\n"
NO_EVENT = EVENTS + b"5\r\ndata:\r\n"


@contextlib.asynccontextmanager
async def routing(*answers, room=10, **settings):
    """A client of a router in front of replicas, each of which gives one answer and then closes the connection; what
    the replicas have read is in `client.seen`, by name."""
    seen = {}
    async with contextlib.AsyncExitStack() as held:
        members = []
        for number, answer in enumerate(answers):

            async def handle(reader, writer, answer=answer, name=f"r{number}"):
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
                body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
                seen.setdefault(name, []).append((head.decode(), body))
                writer.write(answer.removesuffix(HANGS))
                await writer.drain()
                if answer.endswith(HANGS):
                    await reader.read()  # until the router leaves
                writer.close()

            server = await asyncio.start_server(handle, "127.0.0.1", 0)
            held.push_async_callback(server.wait_closed)
            held.callback(server.close)
            port = server.sockets[0].getsockname()[1]
            members.append(Member(f"r{number}", f"http://127.0.0.1:{port}", room))

        async def look():
            return members

        relay = Relay(Fleet(), "secret")
        app = make_router(relay, ServerConfig(**settings), look)
        await held.enter_async_context(app.router.lifespan_context(app))
        await asyncio.sleep(0)  # the first look
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = await held.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://router"))
        client.seen, client.relay = seen, relay
        yield client


def ask(*answers, path="/v1/completions", headers=None, **settings):
    """The router's answer to one request, and what its replicas have read."""

    async def run():
        async with routing(*answers, **settings) as client:
            answer = await client.post(path, content=b'{"prompt": "a"}', headers=headers)
            return answer, client.seen

    return asyncio.run(run())


def test_a_request_reaches_a_replica_with_its_body_and_the_router_s_id_and_secret():
    answer, seen = ask(
        GOOD, path="/v1/completions?a=%20b", headers={"X-Request-Id": "mine", "Authorization": "Bearer k"}
    )
    assert (answer.status_code, answer.content) == (200, b"{}")
    [(head, body)] = seen["r0"]
    lines = head.lower().split("\r\n")
    assert body == b'{"prompt": "a"}'
    assert lines[0] == "post /v1/completions?a=%20b http/1.1"
    assert "x-twotower-secret: secret" in lines
    assert f"x-request-id: {answer.headers['x-request-id']}" in lines
    assert "authorization: bearer k" in lines
    assert "mine" not in head


@pytest.mark.parametrize("bad", [NOTHING, HALF, NO_EVENT, FULL], ids=["nothing", "half", "no event", "full"])
def test_what_one_replica_does_not_answer_another_does(bad):
    # whichever of the two has the key
    for answers in ((bad, GOOD), (GOOD, bad)):
        answer, seen = ask(*answers)
        assert (answer.status_code, answer.content) == (200, b"{}")
        assert "r0" in seen or "r1" in seen


def test_a_request_that_two_replicas_died_of_gets_no_third():
    answer, seen = ask(NOTHING, NOTHING, NOTHING)
    assert answer.status_code == 503
    assert answer.json()["error"] == {
        "message": "2 replicas ended while they had this request; try again",
        "type": "server_error",
        "param": None,
        "code": "replica_failed",
    }
    assert len(seen) == 2


def test_where_all_are_full_the_client_gets_what_one_of_them_said():
    answer, seen = ask(FULL, FULL)
    assert (answer.status_code, answer.headers["retry-after"], answer.content) == (429, "1", b"full")
    assert len(seen) == 2


def test_where_the_router_knows_that_all_are_full_none_is_asked():
    answer, seen = ask(GOOD, room=0)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert answer.headers["retry-after"] == "1"
    assert not seen


def test_without_replicas_it_says_so():
    answer, _ = ask()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["message"] == "no replica is ready yet; try again"


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic"), ("/v1/responses", "responses")],
)
def test_a_stream_whose_replica_dies_ends_with_the_error_of_its_protocol(path, kind):
    answer, _ = ask(CUT_STREAM, path=path)
    first, last, end = answer.text.split("\n\n")
    assert (first, end) == ("data: {}", "")
    name, _, data = last.rpartition("data: ")
    error = json.loads(data)
    if kind == "openai":
        assert (name, error["error"]["code"]) == ("", "replica_failed")
    else:
        assert (name, error["type"]) == ("event: error\n", "error")
        assert error["error"]["message"] == "the replica that wrote this ended; send the request again"


def test_openai_s_client_raises_where_the_replica_of_a_response_dies():
    async def run():
        async with routing(CUT_STREAM) as http:
            client = openai.AsyncOpenAI(base_url="http://router/v1", api_key="k", http_client=http, max_retries=0)
            async for _ in await client.responses.create(model="m", input="a", stream=True):
                pass

    with pytest.raises(openai.APIError, match="the replica that wrote this ended"):
        asyncio.run(run())


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_abandoned_ends_with_an_error_that_says_so(begun):
    answer = EVENTS + b"a\r\n" + EVENT + b"\r\n" + HANGS if begun else HANGS

    async def run():
        async with routing(answer, answer) as client:
            asking = asyncio.create_task(client.post("/v1/completions", content=b'{"prompt": "a"}'))
            while not client.seen:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            client.relay.abandon()
            told = await asyncio.wait_for(asking, 5)
            assert len(client.relay.fleet.members) == 2  # neither is taken for dead
            return told

    ended = asyncio.run(run())
    assert ended.status_code == (200 if begun else 503)
    error = json.loads(ended.text.split("data: ")[-1])["error"]
    assert error["code"] == "shutting_down"


def test_a_client_that_leaves_ends_its_request_at_the_replica():
    async def run():
        async with routing(HANGS) as client:
            asking = asyncio.create_task(client.post("/v1/completions", content=b'{"prompt": "a"}'))
            while not client.relay.fleet.num_running:
                await asyncio.sleep(0.01)
            asking.cancel()
            while client.relay.fleet.num_running:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 5))


def test_keys_and_limits_are_checked_before_a_replica_is_asked():
    answer, seen = ask(GOOD, api_keys=("k",))
    assert (answer.status_code, seen) == (401, {})
    answer, seen = ask(GOOD, max_body_bytes=1024)
    assert answer.status_code == 200

    async def large():
        async with routing(GOOD, max_body_bytes=1024) as client:
            return await client.post("/v1/completions", content=b"x" * 2000), client.seen

    answer, seen = asyncio.run(large())
    assert (answer.status_code, seen) == (413, {})


def test_metrics_of_all_replicas_have_their_names_and_one_that_hangs_holds_up_none(monkeypatch):
    monkeypatch.setattr("twotower.integrations.ray.router._SECONDS_FOR_METRICS", 0.2)
    text = b"# HELP twotower_running Texts.\n# TYPE twotower_running gauge\ntwotower_running 3.0\n"
    plain = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n" % len(text) + text

    async def run():
        async with routing(plain, plain, NOTHING, HANGS) as client:
            return (await client.get("/metrics")).text

    lines = asyncio.run(run()).splitlines()
    assert [line for line in lines if line.startswith("twotower_running")] == [
        'twotower_running{replica="r0"} 3.0',
        'twotower_running{replica="r1"} 3.0',
    ]
    assert lines.count("# TYPE twotower_running gauge") == 1
    assert "twotower_router_replicas 4.0" in lines
