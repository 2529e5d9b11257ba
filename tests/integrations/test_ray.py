"""`twotower serve --replicas 2` with a real Ray: two replicas are as one server, whatever becomes of one of them."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install 'twotower[ray]'"),
]
KEY = "a-key-of-the-test"
COMMAND = [sys.executable, "-c", "from twotower.cli.main import app; app()", "serve", "--port", "0"]
COMMAND += ["--replicas", "2", "--replica-cpus", "0.5"]
LONG = {"max_tokens": 240, "temperature": 0, "extra_body": {"mode": "ar", "ignore_eos": True}}


@contextlib.contextmanager
def serving(tmp_path, *options):
    """A running command with keys from the environment, its address and the file with its log; killed at the end."""
    log = tmp_path / "log"
    with log.open("w") as stderr:
        environment = os.environ | {"TWOTOWER_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        running = subprocess.Popen(
            [*COMMAND, *options], stderr=stderr, stdout=stderr, env=environment, start_new_session=True
        )
        try:
            found, began = None, time.monotonic()
            while found is None:
                assert running.poll() is None, log.read_text()
                assert time.monotonic() - began < 240, log.read_text()
                found = re.search(r'"serving", "url": "([^"]+)"', log.read_text())
                time.sleep(0.1)
            yield running, found[1], log
        finally:
            running.terminate()
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()


class Stream(threading.Thread):
    """A stream that is read in a thread: what came, and how it ended."""

    def __init__(self, url, prompt, **settings):
        super().__init__(daemon=True)
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
        self.settings = {"model": "stories", "prompt": prompt, "stream": True} | LONG | settings
        self.text, self.end, self.begun = "", "", threading.Event()
        self.start()

    def run(self):
        try:
            for chunk in self.client.completions.create(**self.settings):
                self.text += chunk.choices[0].text
                self.end = chunk.choices[0].finish_reason
                self.begun.set()
        except openai.APIError as error:
            self.end = error
        self.begun.set()


def post(url, headers=None, **body):
    given = {"prompt": "One day", "max_tokens": 4, "temperature": 0} | body
    return httpx.post(
        f"{url}/v1/completions", json=given, headers={"Authorization": f"Bearer {KEY}"} | (headers or {}), timeout=60
    )


def metric(url, name):
    """The sum of a metric by replica."""
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                found[sample.labels["replica"]] = found.get(sample.labels["replica"], 0) + sample.value
    return found


def until(condition, seconds=30):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)


def test_two_replicas_are_as_one_server_and_one_that_is_killed_is_not_missed(tmp_path):
    # texts longer than those that the model was trained for, since these are over before anything can happen to them
    limits = ("--max-requests", "4", "--max-waiting", "2", "--mode", "ar", "--max-context", "2048")
    with serving(tmp_path, *limits) as (running, url, log):
        keys(url)
        one_id(url, log)
        affinity(url)
        spread(url)
        full(url)
        killed(url, log)
        drained(url, running)


def keys(url):
    """The key of the environment is asked for, also where a replica itself is asked."""
    assert httpx.get(f"{url}/health").json() == {"status": "ready"}
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert httpx.get(f"{url}{path}").status_code == 401
    assert post(url, {"Authorization": "Bearer other"}).json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{url}/v1/models", headers={"x-api-key": KEY}).json()["data"][0]["default_mode"] == "ar"


def one_id(url, log):
    """A client's id of a request is the only one, and the log has it where the request came in and where it ran."""
    answer = post(url)
    [told] = answer.headers.get_list("x-request-id")
    until(lambda: log.read_text().count(told) == 2)
    router, replica = sorted((line for line in log.read_text().splitlines() if told in line), key=len)
    assert json.loads(router)["replica"]
    assert "ServeReplica" in replica
    assert '"completion_tokens": 4' in replica


def affinity(url):
    """What belongs together goes to one replica, and finds what it has in its cache."""
    before, hits = metric(url, "twotower_texts_total"), metric(url, "twotower_cache_hit_tokens_total")
    assert len(before) == 2
    for turn in range(4):
        post(
            url,
            {"X-Session-Id": "a"},
            prompt="Once upon a time there was a little girl named Lily." + " She ran." * turn,
        )
    after, hits_after = metric(url, "twotower_texts_total"), metric(url, "twotower_cache_hit_tokens_total")
    assert sorted(after[name] - before[name] for name in after) == [0, 4]
    assert sum(hits_after.values()) - sum(hits.values()) >= 3 * 8


def spread(url):
    """What has nothing in common goes to both."""
    before = metric(url, "twotower_texts_total")
    streams = [Stream(url, f"{number} bears", max_tokens=60) for number in range(10)]
    for stream in streams:
        stream.join()
    assert {stream.end for stream in streams} == {"length"}
    after = metric(url, "twotower_texts_total")
    # that ten keys have one home, where none waits for another, happens once in 512 times
    assert all(after[name] > before[name] for name in after)


def full(url):
    """Where all replicas are full a request is told so at once, and the others are answered."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answers = []
    with selectors.DefaultSelector() as ready:
        for number in range(36):
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
            body = {"prompt": f"{number} cats", "max_tokens": 200, "ignore_eos": True}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            ready.register(connection.sock, selectors.EVENT_READ, connection)
        while ready.get_map():
            for key, _ in ready.select(60):
                ready.unregister(key.fileobj)
                answers.append(key.data.getresponse())
    refused = [answer for answer in answers if answer.status == 429]
    assert 1 <= len(refused) <= 36 - 12
    assert {answer.status for answer in answers} == {200, 429}
    assert {json.load(answer)["error"]["code"] for answer in refused} == {"rate_limit_exceeded"}
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    # the last of those that are answered waited for others to be
    assert {answer.status for answer in answers[-4:]} == {200}


def killed(url, log):
    """Streams of a killed replica end with an error, requests that have no answer yet get it from the other one, and a
    new replica comes."""
    first = metric(url, "twotower_running")
    streams = [Stream(url, f"{number} dogs", max_tokens=1200) for number in range(8)]
    until(lambda: min(metric(url, "twotower_running").values()) >= 1)
    pid = re.findall(r"Replica pid=(\d+)", log.read_text())[-1]
    waiting = []
    asking = [
        threading.Thread(target=lambda i=i: waiting.append(post(url, prompt=f"{i} birds", max_tokens=200)), daemon=True)
        for i in range(2)
    ]
    for one in asking:
        one.start()
    os.kill(int(pid), signal.SIGKILL)
    for stream in (*streams, *asking):
        stream.join(60)
    assert {answer.status_code for answer in waiting} == {200}
    ends = [stream.end for stream in streams]
    cut = [end for end in ends if end != "length"]
    assert 1 <= len(cut) < len(streams)
    assert {(end.code, end.type) for end in cut} == {("replica_failed", "server_error")}
    assert post(url).status_code == 200
    until(lambda: len(metric(url, "twotower_running")) == 2)
    assert metric(url, "twotower_running").keys() != first.keys()


def drained(url, running):
    """SIGTERM lets what runs finish."""
    streams = [Stream(url, f"{i} birds") for i in range(8)]
    for stream in streams:
        stream.begun.wait(30)
    running.terminate()
    for stream in streams:
        stream.join(60)
    assert [stream.end for stream in streams] == ["length"] * 8
    running.wait(90)
