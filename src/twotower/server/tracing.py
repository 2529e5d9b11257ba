"""A span for each request that asks for something, where OpenTelemetry is installed."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

# What a request's log line knows -> the name of the span's attribute; OpenTelemetry's own names where it has one.
_ATTRIBUTES = {
    "request_id": "twotower.request_id",
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "id": "gen_ai.response.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "mode": "twotower.mode",
    "texts": "twotower.texts",
    "denoiser_calls": "twotower.denoiser_calls",
    "context_calls": "twotower.context_calls",
    "seconds_queued": "twotower.seconds_queued",
}


def open_tracer() -> "Tracer | None":
    """The tracer of this process' provider, whoever sets that up; None where opentelemetry-api is not installed."""
    try:
        from opentelemetry import trace
    except ModuleNotFoundError:
        return None
    return trace.get_tracer("twotower")


def note_parent(scope: Scope) -> None:
    """Notes the span under which a request is handled: newer FastAPIs open one, which ends before a stream does."""
    try:
        from opentelemetry import context
    except ModuleNotFoundError:
        return
    scope["state"]["trace"] = context.get_current()


def record_span(tracer: "Tracer", scope: Scope, fields: Mapping[str, Any], seconds: float) -> None:
    """Records a request that has just ended, after so many seconds: under the span that was noted, or else under the
    caller's, if its headers name one."""
    from opentelemetry import trace
    from opentelemetry.propagate import extract

    end = time.time_ns()
    noted = scope["state"].get("trace")
    is_inner = trace.get_current_span(noted).get_span_context().is_valid
    span = tracer.start_span(
        f"twotower {fields['method']} {getattr(scope.get('route'), 'path', 'other')}",
        context=noted if is_inner else extract(Headers(scope=scope)),
        kind=trace.SpanKind.INTERNAL if is_inner else trace.SpanKind.SERVER,
        attributes={name: fields[key] for key, name in _ATTRIBUTES.items() if fields.get(key) is not None},
        start_time=end - int(seconds * 1e9),
    )
    if fields["status"] >= 500:
        span.set_status(trace.StatusCode.ERROR)
    span.end(end)
