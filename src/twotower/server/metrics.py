"""The server's counts and times, in Prometheus' text format."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from twotower.decoding.output import StepOutput
from twotower.engine.aio import AsyncEngine

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_CALL = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """The counts of one server, in a registry of its own: a process may have several servers."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        by_mode = ("mode",)
        self.texts = Counter(
            "twotower_texts", "Texts asked for, by how they ended.", ("mode", "outcome"), registry=self._registry
        )
        self.prompt_tokens = Counter("twotower_prompt_tokens", "Tokens of prompts.", by_mode, registry=self._registry)
        self.new_tokens = Counter("twotower_new_tokens", "Tokens written.", by_mode, registry=self._registry)
        self.queued = Histogram(
            "twotower_queue_time_seconds",
            "From arrival until the engine took the text up.",
            by_mode,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first = Histogram(
            "twotower_time_to_first_token_seconds",
            "From arrival to the first token.",
            by_mode,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.per_token = Histogram(
            "twotower_time_per_token_seconds",
            "Mean time per token after the first, per text.",
            by_mode,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.per_call = Histogram(
            "twotower_tokens_per_nfe",
            "New tokens per denoiser call, per text.",
            by_mode,
            buckets=_PER_CALL,
            registry=self._registry,
        )
        self.responses = Counter(
            "twotower_http_responses", "HTTP responses.", ("path", "status"), registry=self._registry
        )

    @contextmanager
    def observe(self, mode: str) -> Iterator["Observed"]:
        """Counts one text by its outcome when the context ends: "cancelled" unless its result came before."""
        observed = Observed(self, mode)
        try:
            yield observed
        finally:
            self.texts.labels(mode, observed.outcome).inc()

    def exposition(self) -> bytes:
        """All counts in the text format."""
        return generate_latest(self._registry)


class Observed:
    """One text while it is written: `take` counts each of its outputs."""

    def __init__(self, metrics: Metrics, mode: str) -> None:
        self._metrics = metrics
        self._mode = mode
        self._began = time.perf_counter()
        self._first: float | None = None
        self._seen = False
        self.outcome = "cancelled"

    def take(self, output: StepOutput, num_prompt: int) -> None:
        metrics, mode = self._metrics, self._mode
        now = time.perf_counter()
        if not self._seen:
            self._seen = True
            metrics.queued.labels(mode).observe(output.seconds_queued)
        metrics.new_tokens.labels(mode).inc(len(output.tokens))
        if self._first is None and output.tokens:
            self._first = now
            metrics.first.labels(mode).observe(now - self._began)
        if output.result is None:
            return
        self.outcome = output.result.finish_reason
        stats = output.result.stats
        metrics.prompt_tokens.labels(mode).inc(num_prompt)
        if self._first is not None and stats.num_tokens > 1:
            metrics.per_token.labels(mode).observe((now - self._first) / (stats.num_tokens - 1))
        if stats.denoiser_calls:
            metrics.per_call.labels(mode).observe(stats.tokens_per_denoiser_call)


class _EngineCollector(Collector):
    """The engine's own counts, read each time that the metrics are requested."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        occupancy = stats.num_running / self._engine.config.max_num_requests
        yield GaugeMetricFamily("twotower_running", "Texts being written.", stats.num_running)
        yield GaugeMetricFamily("twotower_waiting", "Texts waiting for a slot.", stats.num_waiting)
        yield GaugeMetricFamily("twotower_batch_occupancy", "Fraction of slots in use.", occupancy)
        yield GaugeMetricFamily("twotower_state_bytes", "Bytes of keys, values and states.", stats.bytes_used)
        yield GaugeMetricFamily("twotower_state_bytes_limit", "Limit of those bytes.", stats.bytes_budget)
        yield CounterMetricFamily("twotower_cache_hit_tokens", "Prompt tokens found in cache.", stats.cache_hit_tokens)
        yield CounterMetricFamily("twotower_rounds", "Rounds of the engine.", stats.num_rounds)
        yield CounterMetricFamily("twotower_preemptions", "Texts requeued for lack of memory.", stats.num_preemptions)
        yield CounterMetricFamily("twotower_denoiser_calls", "Denoiser calls, per text.", stats.denoiser_calls)
        yield CounterMetricFamily("twotower_context_calls", "Context tower calls, per text.", stats.context_calls)
