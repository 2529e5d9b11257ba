"""The metrics that mean the same in vLLM, under its names: boards and autoscalers made for it then read this server."""

import collections
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# vllm/v1/metrics/loggers.py; time_per_output_token_seconds is inter_token_latency_seconds before vLLM 0.11.
_NAMES = {
    "twotower_running": ("num_requests_running",),
    "twotower_waiting": ("num_requests_waiting",),
    "twotower_state_usage": ("kv_cache_usage_perc",),
    "twotower_cache_hit_tokens": ("prefix_cache_hits",),
    "twotower_cache_query_tokens": ("prefix_cache_queries",),
    "twotower_preemptions": ("num_preemptions",),
    "twotower_draft_rounds": ("spec_decode_num_drafts",),
    "twotower_drafted_tokens": ("spec_decode_num_draft_tokens",),
    "twotower_accepted_tokens": ("spec_decode_num_accepted_tokens",),
    "twotower_texts": ("request_success",),
    "twotower_prompt_tokens": ("prompt_tokens",),
    "twotower_new_tokens": ("generation_tokens",),
    "twotower_queue_time_seconds": ("request_queue_time_seconds",),
    "twotower_prefill_time_seconds": ("request_prefill_time_seconds",),
    "twotower_time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "twotower_time_between_outputs_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "twotower_time_per_token_seconds": ("request_time_per_output_token_seconds",),
    "twotower_decode_time_seconds": ("request_decode_time_seconds",),
    "twotower_text_time_seconds": ("e2e_request_latency_seconds",),
    "twotower_tokens_per_prompt": ("request_prompt_tokens",),
    "twotower_tokens_per_text": ("request_generation_tokens",),
}
_REASONS = {"cancelled": "abort", "failed": "error"}  # the rest have vLLM's names


class VllmNames(Collector):
    """The metrics of a registry that vLLM has too, with its label `model_name`, summed over modes and drafters."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            for name in _NAMES.get(metric.name, ()):
                yield self._renamed(metric, f"vllm:{name}")

    def _renamed(self, metric: Metric, name: str) -> Metric:
        made = Metric(name, metric.documentation, metric.type)
        sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = collections.defaultdict(float)
        for sample in metric.samples:
            suffix = sample.name.removeprefix(metric.name)
            if suffix != "_created":
                sums[suffix, tuple(_labels(sample.labels))] += sample.value
        for (suffix, labels), value in sums.items():
            made.add_sample(name + suffix, {"model_name": self._model_name, **dict(labels)}, value)
        return made


def _labels(labels: dict[str, str]) -> Iterator[tuple[str, str]]:
    """vLLM's labels in the place of ours, without the mode."""
    for key, value in labels.items():
        if key == "outcome":
            yield "finished_reason", _REASONS.get(value, value)
        elif key not in ("mode", "drafter"):
            yield key, value
