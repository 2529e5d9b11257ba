"""An OpenTelemetry span for each POST request, if OpenTelemetry is installed."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

# Field of a request's log line -> the span's attribute, with the name that OpenTelemetry's conventions give it if any.
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
    """A tracer of the provider that this process has set up; None if opentelemetry-api is not installed."""
    try:
        from opentelemetry import trace
    except ModuleNotFoundError:
        return None
    return trace.get_tracer("twotower")


def note_parent(scope: Scope) -> None:
    """Stores the current trace context in the request's scope, for `record_span`.

    Instrumented FastAPI applications open a span around the handler; it has ended when a stream's span is recorded.
    """
    try:
        from opentelemetry import context
    except ModuleNotFoundError:
        return
    scope["state"]["trace"] = context.get_current()


def record_span(tracer: "Tracer", scope: Scope, fields: Mapping[str, Any], seconds: float) -> None:
    """Records the span of a request that has just ended and took `seconds`.

    Its parent is the span that `note_parent` stored, or else the client's span if the request's headers name one.
    """
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
