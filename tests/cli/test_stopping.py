"""`twotower serve` and signals: the first lets requests finish, the second ends it at once."""

import contextlib
import json
import os
import signal
import time

import httpx
import pytest

ASK = {"model": "tiny", "prompt": "a", "mode": "ar", "ignore_eos": True, "stream": True}
STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def events(response):
    return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_lets_a_stream_finish_and_the_status_is_0(process, number):
    with process("--port", "0") as started:
        body = ASK | {"max_tokens": 300}
        with httpx.stream("POST", f"{started.url}/v1/completions", json=body, timeout=30) as response:
            idle = httpx.Client(base_url=started.url)
            assert idle.get("/health").status_code == 200
            started.running.send_signal(number)
            chunks = events(response)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert started.running.wait(10) == 0
        assert "Traceback" not in started.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGHUP)])
def test_a_second_signal_ends_at_once(process, numbers):
    with process("--port", "0") as started:
        body = ASK | {"max_tokens": 3000}
        with httpx.stream("POST", f"{started.url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            started.running.send_signal(numbers[0])
            started.wait_for("stopping")
            time.sleep(0.3)
            assert started.running.poll() is None
            began = time.monotonic()
            started.running.send_signal(numbers[1])
            assert started.running.wait(5) == -numbers[1]
            assert time.monotonic() - began < 1.5
            with pytest.raises(httpx.HTTPError):
                list(lines)


@pytest.mark.slow
def test_requests_that_come_on_kept_connections_when_the_server_stops_are_told_so(process):
    with process("--port", "0") as started, contextlib.ExitStack() as opened:
        idle, busy = (opened.enter_context(httpx.Client(base_url=started.url, timeout=10)) for _ in range(2))
        assert idle.get("/health").status_code == 200
        body = ASK | {"max_tokens": 200}
        with busy.stream("POST", "/v1/completions", json=body) as response:
            assert "connection" not in response.headers  # it could not know
            started.running.send_signal(signal.SIGTERM)
            started.wait_for("stopping")
            late = [idle.post("/v1/completions", json=ASK)]
            assert events(response)[-1]["choices"][0]["finish_reason"] == "length"
        late.append(busy.post("/v1/completions", json=ASK))
        for answer in late:
            assert answer.status_code == 503
            assert "close" in answer.headers["connection"]
        assert started.running.wait(10) == 0


@pytest.mark.slow
def test_what_has_not_finished_in_time_is_told_so(process):
    with process("--port", "0", "--shutdown-seconds", "1", "--max-context", "100000") as started:
        body = ASK | {"max_tokens": 90_000}
        with httpx.stream("POST", f"{started.url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            started.running.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: {")]
        assert "shutting down" in json.loads(rest[-1][6:])["error"]["message"]
        assert started.running.wait(10) == 0


@pytest.mark.slow
def test_nohup_still_means_that_a_closed_terminal_changes_nothing(process):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with process("--port", "0", preexec_fn=ignore) as started:
        started.running.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert httpx.get(f"{started.url}/health").status_code == 200
        os.kill(started.running.pid, signal.SIGTERM)
        assert started.running.wait(10) == 0
