"""`twotower bench serve` against an endpoint whose every answer is known beforehand."""

import asyncio
import json
import socket
import threading
import time
from collections import Counter

import pytest

from twotower.cli.load_test.plan import Mixes, Share, Shot, parse_mix, plan
from twotower.cli.load_test.report import Goal, LoadReading, report, row

fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

WAIT = 0.02


class Endpoint:
    """Writes three chunks of two tokens, or what a prompt that begins with a known word makes it do."""

    def __init__(self):
        self.bodies = []
        self.headers = []
        self.running = self.most_running = 0
        self.app = fastapi.FastAPI()
        self.app.get("/v1/models")(lambda: {"data": [{"id": "first"}, {"id": "second"}]})
        self.app.post("/v1/completions")(self.answer)
        self.app.post("/v1/chat/completions")(self.answer)

    async def answer(self, request: fastapi.Request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        if prompt == "busy":
            return fastapi.Response(status_code=429)
        return fastapi.responses.StreamingResponse(
            self.stream(prompt, "prompt" in body), media_type="text/event-stream"
        )

    async def stream(self, prompt, is_completion):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        for _ in range(3):
            await asyncio.sleep(WAIT)
            yield event({"choices": [{"text": "ab"} if is_completion else {"delta": {"content": "ab"}}]})
        self.running -= 1
        if prompt == "broken":
            yield event({"error": {"message": "no"}})
        if prompt == "garbled":
            yield "data: {\n\n"
        if prompt in ("broken", "garbled", "cut"):
            return
        yield event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 6}})
        yield "data: [DONE]\n\n"


def event(data):
    return f"data: {json.dumps(data)}\n\n"


@pytest.fixture
def endpoint():
    made = Endpoint()
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(made.app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    made.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    while not server.started:
        time.sleep(0.01)
    yield made
    server.should_exit = True
    thread.join()


def lines(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_a_closed_loop_keeps_so_many_requests_unfinished(run, endpoint):
    options = ("--requests", 8, "--warmup", 1, "--prompt-words", 5, "--new-tokens", 6)
    one, three = lines(run("bench", "serve", "--url", endpoint.url, "--concurrency", "1,3", *options))
    assert (one["concurrency"], three["concurrency"], one["model"]) == (1, 3, "first")
    assert one["requests"] == one["completed"] == 8
    assert len(endpoint.bodies) == 1 + 8 + 8
    assert endpoint.most_running == 3
    assert three["seconds"] < one["seconds"]
    assert one["prompt_tokens"] == 8 * 4
    assert one["tokens_per_second"] == pytest.approx(8 * 6 / one["seconds"])
    # a busy machine makes waits longer, never shorter; 5 tokens come after the first chunk, in two waits
    assert one["tpot_ms"]["p50"] >= 0.9 * 1e3 * 2 * WAIT / 5
    assert one["ttft_ms"]["p50"] >= 0.9 * 1e3 * WAIT
    assert one["latency_ms"]["p50"] >= one["ttft_ms"]["p50"] + 0.9 * 2e3 * WAIT
    body = endpoint.bodies[-1]
    assert body.keys() == {"model", "max_tokens", "temperature", "stream", "prompt", "stream_options"}
    assert (body["model"], body["max_tokens"], len(body["prompt"].split())) == ("first", 6, 5)


@pytest.mark.slow
def test_an_open_loop_does_not_wait_for_answers(run, endpoint):
    [line] = lines(run("bench", "serve", "--url", endpoint.url, "--rate", 200, "--requests", 12, "--warmup", 0))
    assert (line["rate"], line["completed"]) == (200, 12)
    assert endpoint.most_running > 3


@pytest.mark.slow
def test_errors_are_counted_by_kind_and_are_never_good(run, endpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    fine = "one\u2028line"
    prompts.write_text(f"busy\nbroken\n\ncut\ngarbled\n{fine}\n", encoding="utf-8")
    options = ("--prompts", prompts, "--requests", 40, "--concurrency", 20, "--warmup", 0)
    options += ("--ttft-goal", 6e5, "--tpot-goal", 6e5)  # a busy machine must not decide
    [line] = lines(run("bench", "serve", "--url", endpoint.url, *options))
    sent = Counter(body["prompt"] for body in endpoint.bodies)
    kinds = {"429": "busy", "stream": "broken", "cut": "cut", "JSONDecodeError": "garbled"}
    assert line["errors"] == {kind: sent[prompt] for kind, prompt in kinds.items()}
    assert line["completed"] == sent[fine]
    assert line["goodput"]["share"] == sent[fine] / 40


@pytest.mark.slow
def test_modes_chat_and_keys_reach_the_endpoint(run, endpoint):
    options = ("--modes", "ar:1,diffusion:3", "--chat", "--ignore-eos", "--api-key", "secret", "--model", "mine")
    [line] = lines(run("bench", "serve", "--url", endpoint.url, "--concurrency", 8, "--requests", 40, *options))
    sent = Counter(body["mode"] for body in endpoint.bodies[2:])
    assert sent["diffusion"] > sent["ar"] > 0
    assert {mode: figures["completed"] for mode, figures in line["modes"].items()} == sent
    assert all(body["ignore_eos"] and body["messages"][0]["role"] == "user" for body in endpoint.bodies)
    assert {body["model"] for body in endpoint.bodies} == {"mine"}
    assert {headers["authorization"] for headers in endpoint.headers} == {"Bearer secret"}


@pytest.mark.slow
def test_readings_and_a_picture_are_written(run, endpoint, tmp_path):
    out = tmp_path / "load"
    lines(run("bench", "serve", "--url", endpoint.url, "--rate", "50,100", "--requests", 4, "--out", out))
    rows = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert [r["load"] for r in rows] == ["50"] * 4 + ["100"] * 4
    assert all(len(r["chunks"]) == 3 and r["tokens"] == 6 and r["error"] is None for r in rows)
    assert (out / "load.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --concurrency"),
        (("--rate", 1, "--concurrency", 1), "either --concurrency"),
        (("--rate", "fast"), "rate is 'fast'"),
        (("--rate", "0"), "rate is '0'"),
        (("--concurrency", "1.5"), "concurrency is '1.5'"),
        (("--rate", 1, "--new-tokens", "0"), "new_tokens is '0'"),
        (("--rate", 1, "--prompt-words", "8:-1"), "prompt_words is '8:-1'"),
        (("--rate", 1, "--modes", "ar:x"), "modes is 'ar:x'"),
        (("--rate", 1, "--url", "http://127.0.0.1:9/v1"), "gives no model"),
    ],
)
def test_a_bad_option_exits_2_and_says_which(run, arguments, message):
    result = run("bench", "serve", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_plan_is_the_same_for_every_load_and_follows_its_mix():
    mixes = Mixes([Share("3", 1)], [Share("8", 3), Share("64", 1)], [], [])
    slow, fast = (plan(mixes, 400, rate=rate, seed=5) for rate in (1.0, 10.0))
    assert [s.prompt for s in slow] == [s.prompt for s in fast]
    assert slow[-1].due == pytest.approx(10 * fast[-1].due)
    assert slow[-1].due == pytest.approx(400, rel=0.2)
    assert 0.65 < sum(s.new_tokens == 8 for s in slow) / 400 < 0.85
    assert [s.prompt for s in plan(mixes, 400, rate=1.0, seed=6)] != [s.prompt for s in slow]
    assert all(s.due is None and s.mode is None for s in plan(mixes, 4, rate=None, seed=5))


def test_a_value_without_a_weight_counts_once():
    assert parse_mix("modes", "ar, diffusion:2.5", integers=False) == [Share("ar", 1), Share("diffusion", 2.5)]


def test_waiting_counts_from_when_a_request_was_due():
    shot = Shot("a", 4, None, 1.0)
    late = LoadReading(shot, due=1.0, sent=3.0, chunks=[3.5, 4.5], ended=5.0, prompt_tokens=1, tokens=3)
    failed = LoadReading(shot, due=1.0, sent=1.0, ended=2.0, error="429")
    at_once = LoadReading(shot, due=1.0, sent=1.0, chunks=[2.0], ended=2.0, tokens=16)
    assert row(late)["ttft"] == 2.5
    assert row(late)["tpot"] == 0.5
    assert row(at_once)["tpot"] is None
    figures = report([late, failed], Goal(first_token=2.5, per_token=0.5))
    assert figures["ttft_ms"]["p50"] == 2500
    assert figures["latency_ms"]["max"] == 4000
    assert figures["chunk_gap_ms"]["p95"] == 1000
    assert figures["goodput"]["share"] == 0.5
    assert not Goal(first_token=2.4, per_token=0.5).met(late)
    assert not Goal(first_token=2.5, per_token=0.4).met(late)
    assert Goal(first_token=1.0, per_token=0.0).met(at_once)
