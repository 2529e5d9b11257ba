"""One span for each request that asks for something."""

import sys

import httpx
import pytest

from twotower.server import app as server_app
from twotower.server.app import make_app
from twotower.server.config import ServerConfig
from twotower.server.tracing import note_parent, open_tracer, record_span

ASK = {"model": "tiny", "prompt": "a secret story", "max_tokens": 9, "mode": "verified", "ignore_eos": True, "n": 2}
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def traced(engine, serve, monkeypatch):
    """A server's address, and what gives its spans so far."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="it keeps the spans; pip install 'twotower[dev]'")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(server_app, "open_tracer", lambda: provider.get_tracer("twotower"))
    with serve(make_app(engine, ServerConfig(model_names=("tiny",)))) as served:
        yield served.url, exporter.get_finished_spans


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_span_says_what_a_request_was(traced, wait_until, stream):
    url, spans = traced
    stream_options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = httpx.post(f"{url}/v1/completions", json=ASK | stream_options, headers={"traceparent": CALLER}, timeout=60)
    for path in ("/health", "/metrics", "/v1/models"):
        assert httpx.get(f"{url}{path}").status_code == 200
    wait_until(lambda: len(spans()) == 1)
    [span] = spans()
    assert span.name == "twotower POST /v1/completions"
    assert f"{span.context.trace_id:032x}-{span.parent.span_id:016x}" in CALLER
    found = dict(span.attributes)
    assert found.pop("twotower.seconds_queued") >= 0
    assert found.pop("gen_ai.response.id").startswith("cmpl-")
    assert found.pop("twotower.denoiser_calls") > 0
    assert found.pop("twotower.context_calls") > 0
    assert found == {
        "twotower.request_id": answer.headers["x-request-id"],
        "http.request.method": "POST",
        "url.path": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.usage.input_tokens": 14,
        "gen_ai.usage.output_tokens": 18,
        "twotower.mode": "verified",
        "twotower.texts": 2,
    }
    assert 0 < span.end_time - span.start_time < 60e9


def test_what_is_refused_has_one_too(traced, wait_until):
    url, spans = traced
    assert httpx.post(f"{url}/v1/completions", json=ASK | {"model": "other"}).status_code == 404
    assert httpx.post(f"{url}/nowhere/at/all").status_code == 404
    wait_until(lambda: len(spans()) == 2)
    first, second = spans()
    assert (first.name, first.attributes["http.response.status_code"]) == ("twotower POST /v1/completions", 404)
    assert second.name == "twotower POST other"
    assert "twotower.mode" not in first.attributes
    assert first.parent is None


def test_it_lies_under_the_span_of_the_handler():
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    trace = pytest.importorskip("opentelemetry.trace")
    context = pytest.importorskip("opentelemetry.context")
    ended = []

    class Processor(sdk.SpanProcessor):
        def on_end(self, span):
            ended.append(span)

    provider = sdk.TracerProvider()
    provider.add_span_processor(Processor())
    tracer, scope = (
        provider.get_tracer("t"),
        {"type": "http", "headers": [(b"traceparent", CALLER.encode())], "state": {}},
    )
    with tracer.start_as_current_span("handler"):
        note_parent(scope)
    assert trace.get_current_span(context.get_current()) is trace.INVALID_SPAN
    record_span(tracer, scope, {"method": "POST", "status": 503}, 1.0)
    handler, ours = ended
    assert ours.parent.span_id == handler.context.span_id
    assert ours.status.status_code is trace.StatusCode.ERROR
    assert ours.end_time - ours.start_time == 1e9


def test_without_opentelemetry_there_is_no_tracer(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert open_tracer() is None
    scope = {"state": {}}
    note_parent(scope)
    assert scope == {"state": {}}
