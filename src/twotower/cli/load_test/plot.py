"""Pictures of a load test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from twotower.cli.load_test.report import LoadReading


def draw(runs: Mapping[str, Sequence[LoadReading]], figures: Sequence[dict[str, Any]], axis: str, path: Path) -> None:
    """Draws one picture: the distribution of waiting times at each load, and throughput and goodput over the loads."""
    canvas = Figure(figsize=(12, 3.6), layout="constrained")
    first, each, speed = canvas.subplots(1, 3)
    for label, readings in runs.items():
        _curve(first, label, [r.first_token_seconds for r in readings if r.error is None])
        _curve(each, label, [r.seconds_per_token for r in readings if r.error is None])
    first.set(title="time to first token", xlabel="ms", ylabel="share of requests")
    each.set(title="time per token", xlabel="ms")
    each.legend(title=axis, loc="lower right")
    loads = [float(label) for label in runs]
    speed.plot(loads, [f["requests_per_second"] for f in figures], "o-", label="completed")
    speed.plot(loads, [f["goodput"]["requests_per_second"] for f in figures], "s--", label="good")
    speed.set(title="requests per second", xlabel=axis, xticks=loads, ylim=(0, None))
    speed.legend(loc="lower right")
    canvas.savefig(path, dpi=120)


def _curve(axes: Any, label: str, seconds: Sequence[float | None]) -> None:
    known = sorted(1e3 * s for s in seconds if s is not None)
    axes.step([0.0, *known], np.arange(len(known) + 1) / max(len(known), 1), where="post", label=label)
