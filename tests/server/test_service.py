"""Clients that leave, that read slowly, and a server that stops while they are served."""

import asyncio
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.engine.aio import AsyncEngine
from twotower.engine.config import EngineConfig
from twotower.model.sampling_defaults import SamplingDefaults
from twotower.server.app import make_app
from twotower.server.config import ServerConfig
from twotower.server.protocol import CompletionRequest
from twotower.server.service import Service

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 1900, "mode": "ar", "temperature": 0}


def metric(http, name):
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize(
    ("trained", "asked", "most", "by"),
    [
        (None, None, 4096, "default"),
        (600, None, 600, "checkpoint"),
        (600, 200, 200, "max_context"),
        (None, 900, 900, "max_context"),
        (600, 601, 601, "max_context"),
    ],
)
def test_what_limits_a_text_is_told_and_a_limit_beyond_the_checkpoint_is_warned_of(
    tiny, byte_tokenizer, caplog, trained, asked, most, by
):
    carried = {} if trained is None else {"max_position_embeddings": trained}
    made = tiny("*-M", vocab_size=260, carried=carried)
    made.tokenizer = byte_tokenizer
    service = Service(AsyncEngine(made), ServerConfig(max_context=asked), None)
    card = service.model_card("twotower")
    assert (card["max_model_len"], card["limited_by"]) == (most, by)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [("--max-context" in text, f"trained for {trained}" in text) for text in warned] == (
        [(True, True)] if asked == 601 else []
    )


def test_closing_a_run_frees_it_within_two_rounds(engine):
    service = Service(engine, ServerConfig(model_names=("tiny",)), None)
    request = engine.prepare([97], SamplingParams(mode="ar", max_new_tokens=100_000, ignore_eos=True))

    async def leave() -> int:
        with service.admit(2) as admission:
            async with service.run([request, request], admission, {}) as outputs:
                for _ in range(6):
                    await anext(outputs)
                assert engine.num_unfinished == 2
            assert engine.num_unfinished == 0
            before = engine.stats().num_rounds
        while engine.stats().num_running + engine.stats().num_waiting:
            await asyncio.sleep(0.001)
        return engine.stats().num_rounds - before

    assert asyncio.run(leave()) <= 2
    assert engine.stats().num_running == 0


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (SamplingDefaults(), {}, (1.0, None, 8)),
        (SamplingDefaults(temperature=0.7, top_p=0.8), {}, (0.7, 0.8, 8)),
        (SamplingDefaults(temperature=0.0), {}, (0.0, None, 8)),
        (
            SamplingDefaults(temperature=0.7, top_p=0.8),
            {"temperature": 0.0, "top_p": 0.5, "block_size": 4},
            (0.0, 0.5, 4),
        ),
    ],
)
def test_a_request_that_says_nothing_is_sampled_as_the_checkpoint_says(engine, monkeypatch, own, given, expected):
    monkeypatch.setattr(engine.model, "sampling", own)
    service = Service(engine, ServerConfig(model_names=("tiny",)), None)
    [request] = asyncio.run(service.prepare("a", CompletionRequest(model="tiny", prompt="a", **given), 5))
    assert (request.temperature, request.params.top_p, request.block_size) == expected


@pytest.mark.parametrize(("default", "written"), [(None, 40), (16, 16)])
def test_the_checkpoints_longest_answer_holds_where_no_other_length_does(engine, monkeypatch, default, written):
    monkeypatch.setattr(engine.model, "sampling", SamplingDefaults(max_new_tokens=40))
    service = Service(engine, ServerConfig(model_names=("tiny",)), None)
    [request] = asyncio.run(service.prepare("a", CompletionRequest(model="tiny", prompt="a"), None, default))
    assert request.max_new_tokens == written


@pytest.mark.parametrize("body", [LONG, LONG | {"n": 3, "mode": "diffusion"}])
def test_a_client_that_leaves_its_stream_frees_the_engine(url, http, engine, wait_until, body):
    name = f'twotower_texts_total{{mode="{body["mode"]}",outcome="cancelled"}}'
    before = metric(http, name)
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True, "ignore_eos": True}) as stream:
        lines = stream.iter_lines()  # held: the connection is closed with its iterator
        next(lines)
        assert engine.stats().num_running > 0
    wait_until(lambda: engine.stats().num_running + engine.stats().num_waiting == 0, 5)
    assert metric(http, name) - before == body.get("n", 1)


def test_a_client_that_gives_up_waiting_frees_the_engine(url, http, engine, wait_until):
    left, cancelled = (
        'twotower_http_responses_total{path="/v1/completions",status="499"}',
        'twotower_texts_total{mode="ar",outcome="cancelled"}',
    )
    before, texts = metric(http, left), metric(http, cancelled)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=LONG | {"n": 4, "echo": True, "logprobs": 1}, timeout=0.2)
    wait_until(lambda: engine.stats().num_running == 0)
    wait_until(lambda: metric(http, left) == before + 1)
    assert metric(http, cancelled) == texts + 4


class StuckClient:
    """A request straight to the app whose sends wait until `reads` is set."""

    def __init__(self, body):
        content = json.dumps(body).encode()
        self.requests = [{"type": "http.request", "body": content, "more_body": False}]
        self.reads = asyncio.Event()
        self.received = b""
        headers = [(b"content-type", b"application/json")]
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": headers,
        }

    async def receive(self):
        return self.requests.pop() if self.requests else await asyncio.Event().wait()

    async def send(self, message):
        await self.reads.wait()
        self.received += message.get("body", b"")


def test_slow_readers_do_not_hold_up_others(app, engine, model):
    async def run():
        stuck = [StuckClient(LONG | {"stream": True, "max_tokens": 60}) for _ in range(6)]  # more than run at a time
        tasks = [asyncio.create_task(app(s.scope, s.receive, s.send)) for s in stuck]
        await asyncio.sleep(0.1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answer = await client.post("/v1/completions", json=LONG | {"max_tokens": 5})
        assert answer.json()["usage"]["completion_tokens"] == 5
        # all texts are finished although nobody has read them
        while engine.stats().num_running + engine.stats().num_waiting:
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in tasks)
        for client in stuck:
            client.reads.set()
        await asyncio.gather(*tasks)
        return [client.received.decode() for client in stuck]

    expected = generate(model, ["a"], SamplingParams(mode="ar", max_new_tokens=60))[0].text
    for received in asyncio.run(run()):
        events = re.findall(r"^data: (\{.*\})$", received, re.MULTILINE)
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected


@pytest.mark.slow
def test_a_huge_prompt_does_not_hold_up_others(url, http):
    huge = {"model": "tiny", "prompt": "a🎉" * 250_000}
    waits = []
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(httpx.post, f"{url}/v1/completions", json=huge, timeout=60)
        while not refused.done():
            began = time.perf_counter()
            assert http.get("/health").status_code == 200
            waits.append(time.perf_counter() - began)
    assert refused.result().status_code == 400
    # most of the time goes into making tokens of it
    assert max(waits) < 0.4 * sum(waits)


@pytest.mark.slow
def test_stopping_finishes_what_runs(model, serve):
    engine = AsyncEngine(model, EngineConfig(max_num_requests=2)).start()
    texts = []
    with serve(make_app(engine, ServerConfig(model_names=("tiny",)))) as served:

        def read():
            with httpx.stream(
                "POST", f"{served.url}/v1/completions", json=LONG | {"stream": True, "max_tokens": 300}
            ) as stream:
                started.set()
                texts.append([line for line in stream.iter_lines() if line])

        started = threading.Event()
        reader = threading.Thread(target=read)
        reader.start()
        started.wait(10)
        served.server.should_exit = True
        served.thread.join(30)
        reader.join(10)
    assert texts[0][-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in texts[0][-2]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")
    engine.close()
