"""Connections that are closed because their clients are silent or take nothing, and those that are never closed."""

import asyncio
import contextlib
import resource
import socket
import threading
import time

import pytest
import uvicorn

from twotower.server.config import ServerConfig
from twotower.server.connections import Acceptor, raise_descriptor_limit
from twotower.server.lifecycle import uvicorn_settings

SIZE, NUM_CHUNKS = 1 << 16, 64
GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"
ended = []
running = []


async def app(scope, receive, send):
    """Reads the body, and answers at once, after three seconds, or with 4 MiB."""
    if scope["type"] != "http":
        return
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            ended.append("disconnected")
            return
        more = message["more_body"]
    if scope["path"] == "/late":
        await asyncio.sleep(3)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/large":
        for _ in range(NUM_CHUNKS):
            await send({"type": "http.response.body", "body": b"x" * SIZE, "more_body": True})
        ended.append("sent")
    await send({"type": "http.response.body", "body": b"end", "more_body": False})


@pytest.fixture(scope="module")
def address():
    """A server that waits for one second, and two for its answers to be taken."""
    server = uvicorn.Server(uvicorn_settings(app, ServerConfig(port=0, idle_seconds=1, unread_seconds=2)))
    listening = socket.create_server(("127.0.0.1", 0))  # as programs make them: without saying that it is TCP's
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    running.append(server)
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()
    server.should_exit = True
    thread.join(10)


@contextlib.contextmanager
def connected(address, *, room=None):
    with socket.socket() as client:
        if room is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        client.settimeout(10)
        client.connect(address)
        yield client


def rest(client):
    """All that comes until the server closes."""
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def closes(client):
    """What comes until the server closes, which must take between one second and two."""
    began = time.monotonic()
    received = rest(client)
    assert 0.8 < time.monotonic() - began < 2.5
    return received


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX: "])
def test_a_client_that_sends_no_request_or_half_of_its_head(address, sent):
    with connected(address) as client:
        client.sendall(sent)
        received = closes(client)
        assert received.startswith(b"HTTP/1.1 408 ") if sent else received == b""


@pytest.mark.parametrize(("sent", "more"), [(b"GET / HTTP/1.1\r\nX: ", b"x"), (GET % b"" + b"GET", b"x")])
def test_a_client_that_sends_a_byte_now_and_then(address, sent, more):
    with connected(address) as client:
        client.sendall(sent)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 5:
                client.sendall(more)
                time.sleep(0.2)
        assert time.monotonic() - began < 3


def test_a_client_that_sends_half_of_a_body_is_told(address):
    with connected(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        received = closes(client)
        assert received.startswith(b"HTTP/1.1 408 ")
        assert received.count(b"HTTP/1.1") == 1
        assert b"the request took too long to arrive; send it again" in received


def test_a_client_that_sends_a_large_body_slowly_but_steadily(address):
    parts = 15  # of 0.2 s each: three times as long as a connection may be silent
    with connected(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (parts * 2048))
        for _ in range(parts):
            time.sleep(0.2)
            client.sendall(b"x" * 2048)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_sends_a_byte_of_a_body_now_and_then(address):
    with connected(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 5:
                client.sendall(b"x")
                time.sleep(0.2)
        assert time.monotonic() - began < 3


def test_a_client_that_sends_nothing_after_its_answer(address):
    with connected(address) as client:
        client.sendall(GET % b"")
        assert closes(client).count(b"HTTP/1.1 ") == 1


def test_a_client_that_sends_requests_now_and_then_stays(address):
    with connected(address) as client:
        for _ in range(5):
            client.sendall(GET % b"")
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                received += client.recv(1000)
            time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("pipelined", [b"", GET % b"", b"GET / HT"])
def test_a_client_that_waits_for_its_answer_gets_it(address, pipelined):
    with connected(address) as client:
        client.sendall(GET % b"late" + pipelined)
        assert rest(client).count(b"HTTP/1.1 200 ") == 1 + (pipelined == GET % b"")


@pytest.mark.slow
def test_a_client_that_takes_its_answer_slowly_gets_all(address):
    with connected(address, room=1 << 16) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        size = 0
        began = time.monotonic()
        while received := client.recv(1 << 16):
            size += len(received)
            time.sleep(0.05)
        assert size > SIZE * NUM_CHUNKS
        assert time.monotonic() - began > 3


@pytest.mark.slow
@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
def test_a_client_that_takes_nothing_of_its_answer(address, header):
    ended.clear()
    with connected(address, room=1 << 12) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n%s\r\n" % header)
        time.sleep(5)
        assert ended == ["sent"]  # nothing holds the application any more
        size = 0
        with contextlib.suppress(ConnectionError):
            size = len(rest(client))
        assert size < SIZE * NUM_CHUNKS


def test_small_writes_are_not_held_back(address):
    """Else each answer of more than one write takes 40 ms longer."""
    with connected(address) as client:
        client.sendall(GET % b"late")
        time.sleep(0.5)
        [taken] = [one for one in running[0].server_state.connections if one.client == client.getsockname()]
        option = taken.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert option != 0


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        most = raise_descriptor_limit()
        assert most > 256
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, hard)
        assert raise_descriptor_limit() == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_the_system_has_taken_when_the_server_stops_is_answered():
    async def stop():
        server = uvicorn.Server(uvicorn_settings(app, ServerConfig(port=0)))
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        acceptor = Acceptor(server, 1000)
        acceptor.start([listening])
        # nothing takes them before the acceptor is closed
        waiting = [socket.create_connection(listening.getsockname(), timeout=5) for _ in range(3)]
        for one in waiting:
            one.sendall(GET % b"")
        await acceptor.close()
        return [await asyncio.to_thread(one.recv, 12) for one in waiting]

    assert asyncio.run(stop()) == [b"HTTP/1.1 200"] * 3
