"""The server's counts and times, in Prometheus' text format."""

import time
from collections.abc import Iterator, Sequence
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from twotower.decoding.modes import Mode
from twotower.decoding.output import StepOutput
from twotower.engine.aio import AsyncEngine
from twotower.server.errors import ENDINGS
from twotower.server.vllm_metrics import VllmNames

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_CALL = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)
_LENGTHS = tuple(mantissa * 10**power for power in range(6) for mantissa in (1, 2, 5))


class Metrics:
    """The counts of one server, in a registry of its own: a process may have several servers.

    Those of `default_mode` are there before the first request, as 0; those of another mode appear with its first one.
    """

    def __init__(self, engine: AsyncEngine, model_name: str, default_mode: Mode) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._vllm = VllmNames(self._registry, model_name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"twotower_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            made = Histogram(f"twotower_{name}", text, ("mode",), buckets=buckets, registry=self._registry)
            made.labels(default_mode)
            return made

        self.texts = counter("texts", "Texts asked for, by how they ended.", "mode", "outcome")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.", "mode")
        self.new_tokens = counter("new_tokens", "Tokens written.", "mode")
        self.responses = counter("http_responses", "HTTP responses.", "path", "status")
        self.queued = histogram("queue_time_seconds", "From arrival until the engine took the text up.")
        self.prefill = histogram("prefill_time_seconds", "From when the engine took the text up to its first token.")
        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.between = histogram("time_between_outputs_seconds", "From a text's tokens to its next ones.")
        self.per_token = histogram("time_per_token_seconds", "Mean time per token after the first, per text.")
        self.decode = histogram("decode_time_seconds", "From a text's first token to its last.")
        self.whole = histogram("text_time_seconds", "From arrival to the end of the text.")
        self.per_call = histogram("tokens_per_nfe", "New tokens per denoiser call, per text.", _PER_CALL)
        self.per_pass = histogram("tokens_per_pass", "New tokens per pass of either tower, per text.", _PER_CALL)
        self.prompt_length = histogram("tokens_per_prompt", "Tokens of the prompt, per text.", _LENGTHS)
        self.text_length = histogram("tokens_per_text", "New tokens, per text.", _LENGTHS)
        for outcome in ("stop", "length", "cancelled", "failed"):
            self.texts.labels(default_mode, outcome)
        for count in (self.prompt_tokens, self.new_tokens):
            count.labels(default_mode)

    def observed(self, mode: str) -> "Observed":
        """One text, to be entered while it is written."""
        return Observed(self, mode)

    def exposition(self) -> bytes:
        """All counts in the text format, under the names of this server and then under vLLM's."""
        return generate_latest(self._registry) + generate_latest(self._vllm)


class Observed:
    """One text while it is written: `take` counts each of its outputs.

    It is counted by its outcome when it is exited: "failed" on an exception, or where `fail` was called because another
    text of the same answer or what is made of them failed, and "cancelled" unless its result came before.
    """

    def __init__(self, metrics: Metrics, mode: str) -> None:
        self._metrics = metrics
        self._mode = mode
        self._began = time.perf_counter()
        self._first: float | None = None  # the times of the first and the latest tokens
        self._latest = 0.0
        self._seen = False
        self.outcome = "cancelled"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, ENDINGS):
            self.fail()
        self._metrics.texts.labels(self._mode, self.outcome).inc()

    def fail(self) -> None:
        """Makes the outcome "failed" if there is no result yet."""
        if self.outcome == "cancelled":
            self.outcome = "failed"

    def take(self, output: StepOutput, num_prompt: int) -> None:
        metrics, mode = self._metrics, self._mode
        now = time.perf_counter()
        if not self._seen:
            self._seen = True
            metrics.queued.labels(mode).observe(output.seconds_queued)
            metrics.prompt_tokens.labels(mode).inc(num_prompt)
        metrics.new_tokens.labels(mode).inc(len(output.tokens))
        if output.tokens:
            if self._first is None:
                self._first = now
                metrics.first.labels(mode).observe(now - self._began)
                metrics.prefill.labels(mode).observe(max(now - self._began - output.seconds_queued, 0.0))
            else:
                metrics.between.labels(mode).observe(now - self._latest)
            self._latest = now
        if output.result is None:
            return
        self.outcome = output.result.finish_reason
        stats = output.result.stats
        metrics.whole.labels(mode).observe(now - self._began)
        metrics.prompt_length.labels(mode).observe(num_prompt)
        metrics.text_length.labels(mode).observe(stats.num_tokens)
        if self._first is not None:
            metrics.decode.labels(mode).observe(self._latest - self._first)
            if stats.num_tokens > 1:
                metrics.per_token.labels(mode).observe((now - self._first) / (stats.num_tokens - 1))
        if stats.denoiser_calls:
            metrics.per_call.labels(mode).observe(stats.tokens_per_denoiser_call)
        if stats.tokens_per_pass > 0:
            metrics.per_pass.labels(mode).observe(stats.tokens_per_pass)


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
        yield GaugeMetricFamily("twotower_state_usage", "Fraction of the memory that running texts need.", stats.usage)
        yield CounterMetricFamily("twotower_cache_hit_tokens", "Prompt tokens found in cache.", stats.cache_hit_tokens)
        yield CounterMetricFamily(
            "twotower_cache_query_tokens", "Prompt tokens looked up in cache.", stats.cache_query_tokens
        )
        yield CounterMetricFamily("twotower_rounds", "Rounds of the engine.", stats.num_rounds)
        yield CounterMetricFamily("twotower_preemptions", "Texts requeued for lack of memory.", stats.num_preemptions)
        yield CounterMetricFamily("twotower_denoiser_calls", "Denoiser calls, per text.", stats.denoiser_calls)
        yield CounterMetricFamily("twotower_context_calls", "Context tower calls, per text.", stats.context_calls)
        rounds, drafted, accepted = (
            CounterMetricFamily(f"twotower_{name}", text, labels=["drafter"])
            for name, text in (
                ("draft_rounds", "Rounds of verified with a draft, per text."),
                ("drafted_tokens", "Tokens drafted."),
                ("accepted_tokens", "Drafted tokens that were accepted."),
            )
        )
        for count in stats.drafts:
            rounds.add_metric([count.drafter], count.rounds)
            drafted.add_metric([count.drafter], count.drafted)
            accepted.add_metric([count.drafter], count.accepted)
        yield from (rounds, drafted, accepted)
