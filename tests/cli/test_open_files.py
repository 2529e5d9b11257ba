"""`twotower serve` where few files may be open: established clients go on, and the limit costs no time and no log."""

import contextlib
import http.client
import json
import resource
import select
import socket
import time
from pathlib import Path

import httpx
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the processor's time is read as Linux shows it"),
]
ASK = {"model": "tiny", "prompt": "a", "max_tokens": 4}


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def processor_seconds(running):
    user, system = Path(f"/proc/{running.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / 100


def test_silent_connections_beyond_the_limit_hold_up_nobody(process):
    with process("--port", "0", preexec_fn=few_files) as started, contextlib.ExitStack() as opened:
        host, port = started.url.removeprefix("http://").split(":")
        established = opened.enter_context(httpx.Client(base_url=started.url, timeout=10))
        assert established.post("/v1/completions", json=ASK).status_code == 200
        for _ in range(80):
            opened.enter_context(socket.create_connection((host, int(port)), timeout=5))
        time.sleep(1)
        size, seconds = started.log.stat().st_size, processor_seconds(started.running)
        time.sleep(3)
        assert processor_seconds(started.running) - seconds < 0.5
        assert started.log.stat().st_size - size < 1000
        for client in (established, opened.enter_context(httpx.Client(base_url=started.url, timeout=10))):
            assert client.get("/health").status_code == 200
            assert client.post("/v1/completions", json=ASK).status_code == 200
        assert started.log.read_text().count("the limit of open files is near") == 1


def test_where_all_wait_for_answers_the_next_are_refused(process):
    options = ("--port", "0", "--max-waiting", "100", "--max-context", "100000")
    with process(*options, preexec_fn=few_files) as started, contextlib.ExitStack() as opened:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 90_000, "mode": "ar", "ignore_eos": True, "stream": True}
        first = opened.enter_context(httpx.stream("POST", f"{started.url}/v1/completions", json=body, timeout=30))
        lines = first.iter_lines()
        next(lines)
        host, port = started.url.removeprefix("http://").split(":")
        asking = [http.client.HTTPConnection(host, int(port), timeout=10) for _ in range(60)]
        for one in asking:
            one.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            opened.callback(one.close)
        time.sleep(2)
        answers = [one.getresponse() for one in asking if select.select([one.sock], [], [], 0)[0]]
        refused = [answer for answer in answers if answer.status == 503]
        assert refused
        assert len(answers) <= len(refused) + 1  # there is room for one beside the first
        for answer in refused:
            assert answer.headers["retry-after"] == "1"
            assert b"no room for another connection" in answer.read()
        next(lines)  # what runs goes on
