"""The metrics of several servers as one text in Prometheus' format."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


def with_replicas(texts: Mapping[str, str], own: CollectorRegistry) -> bytes:
    """The metrics of all texts, by replica, with a label that names it, and behind them those of `own`."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            made = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                made.add_sample(sample.name, {"replica": replica, **sample.labels}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Given(families.values()))
    return generate_latest(registry) + generate_latest(own)


class _Given(Collector):
    """Metrics that are there already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics
