"""The log: short lines whatever clients send, and a server that goes on whatever is under its log."""

import asyncio
import json
import logging
import os
import subprocess
import sys

import pytest

from twotower.server.logs import JsonLines, cut, is_no_cancellation

MB = 1_000_000
ASK = {"model": "tiny", "prompt": "a", "max_tokens": 2}


def line_of(message, *arguments, **fields):
    record = logging.LogRecord("n", logging.ERROR, "f", 1, message, arguments, None)
    record.fields = fields
    return JsonLines().format(record)


def test_a_record_with_an_exception_is_one_line():
    try:
        raise RuntimeError("no\nway")
    except RuntimeError as error:
        record = logging.LogRecord("n", logging.ERROR, "f", 1, "bad %s", ("luck",), (type(error), error, None))
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "bad luck"
    assert "no" in json.loads(line)["exception"]


@pytest.mark.parametrize(("error", "kept"), [(asyncio.CancelledError(), False), (RuntimeError(), True), (None, True)])
def test_a_request_that_is_cut_when_the_server_stops_leaves_no_traceback(error, kept):
    what = None if error is None else (type(error), error, None)
    record = logging.LogRecord("uvicorn.error", logging.ERROR, "f", 1, "Exception in ASGI application", (), what)
    assert is_no_cancellation(record) is kept


@pytest.mark.parametrize("text", ["\u2028\u2029\x85\x0b\x1c", "\x9b31m\x1b[31m\x00", "\ud800", "\u202eabc", "日本 é"])
def test_no_character_ends_a_line_or_steers_a_terminal(text):
    line = line_of(f"told {text}", name=text)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["name"] == text
    assert json.loads(line)["message"] == f"told {text}"


def test_long_texts_are_cut_and_say_so_wherever_they_stand():
    line = line_of("m%s", "x" * MB, user="a" * MB, usage={"k" * MB: ["b" * MB, 3]}, error=ValueError("c" * MB))
    assert len(line) < 5000
    read = json.loads(line)
    assert read["user"].startswith("aaa")
    assert f"[{MB - 512} characters]" in read["user"]
    assert next(iter(read["usage"].values()))[1] == 3
    assert cut("d" * 512) == "d" * 512


def test_a_request_of_megabytes_makes_a_short_line(http, caplog, wait_until):
    caplog.set_level(logging.INFO, logger="twotower.server.middleware")
    assert http.post("/v1/completions", json=ASK | {"user": "u" * MB}).status_code == 200
    assert http.get(f"/v1/{'p' * 30_000}").status_code == 404
    wait_until(lambda: len(caplog.records) == 2)
    assert all(len(JsonLines().format(record)) < 2000 for record in caplog.records)


@pytest.mark.parametrize(
    ("path", "wrong", "told"),
    [
        ("/v1/completions", {"model": "m" * MB}, "this server has 'tiny'"),
        ("/v1/completions", {"k" * MB: 1}, "is not supported by this server; leave it out"),
        ("/v1/completions", {"max_tokens": "9" * MB}, "must be an integer"),
        ("/v1/completions", {"stop": ["s" * MB]}, "1 to 256 characters"),
        ("/v1/messages", {"model": "m" * MB, "messages": [{"role": "user", "content": "a"}]}, "this server has"),
        ("/v1/chat/completions", {"messages": [{"role": "r" * MB, "content": "a"}]}, ""),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "n" * MB}},
            },
            "",
        ),
    ],
)
def test_an_error_is_short_however_long_what_it_names(http, path, wrong, told):
    ask = {"model": "tiny", "max_tokens": 2} | ({"prompt": "a"} if path == "/v1/completions" else {}) | wrong
    response = http.post(path, json=ask)
    assert 400 <= response.status_code < 500
    assert len(response.content) < 4500
    assert told in response.json()["error"]["message"]


LOGS = """
import logging, sys, time
from twotower.server.logs import log_to_stderr
with log_to_stderr("info"):
    began = time.monotonic()
    for i in range(5_000):
        logging.getLogger("n").info("line %d", i)
        if i % 250 == 0:
            time.sleep(0.01)  # the loop of a server waits, too
    print(time.monotonic() - began)
    sys.stdout.flush()
    sys.stdin.readline()
    time.sleep(1)  # until what waits has been read
    logging.getLogger("n").info("the last one")
"""


def logging_into(stderr):
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", LOGS], stdin=pipe, stdout=pipe, stderr=stderr, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
@pytest.mark.parametrize("under", ["a full disk", "a pipe that nobody reads", "a pipe that was closed"])
def test_what_is_under_the_log_holds_up_nothing(under):
    reading, writing = os.pipe()
    if under == "a full disk":
        os.dup2(os.open("/dev/full", os.O_WRONLY), writing)
    if under == "a pipe that was closed":
        os.close(reading)
    with logging_into(writing) as running:
        os.close(writing)
        seconds = float(running.stdout.readline())
        running.stdin.write("\n")
        running.stdin.flush()
        assert running.wait(20) == 0
        assert seconds < 10  # 5,000 lines take 0.2 s, and so do the pauses


@pytest.mark.slow
def test_lines_that_are_lost_are_counted():
    with logging_into(subprocess.PIPE) as running:
        running.stdout.readline()
        running.stdin.write("\n")
        running.stdin.flush()
        lines = [json.loads(line) for line in running.stderr.read().splitlines()]
    written = [line for line in lines if line["logger"] == "n"]
    lost = sum(int(line["message"].split()[0]) for line in lines if line["logger"] == "twotower.server.logs")
    assert written[-1]["message"] == "the last one"
    assert lost > 1_000
    assert len(written) + lost == 5_001
