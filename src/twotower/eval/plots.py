"""Draws the results of a sweep to PNG files with matplotlib (the extra `eval`); no window is opened."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twotower.eval.sweep import Point
from twotower.eval.throughput import PHASES

_MOST_HEATMAPS = 12  # more would be too small to read


def draw(points: Sequence[Point], folder: Path) -> list[Path]:
    """Writes pareto.png, tokens_per_nfe.png, commits.png and phases.png if there is data for them; returns paths."""
    pictures = {
        "pareto": _pareto([p for p in points if p.speed is not None]),
        "tokens_per_nfe": _tokens_per_nfe([p for p in points if p.tokens_per_nfe is not None]),
        "commits": _commits([p for p in points if p.commits]),
        "phases": _phases([p for p in points if p.phases]),
    }
    written = []
    for name, figure in pictures.items():
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=150)
    return written


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both score and speed, fastest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (_rate(p), p.score), reverse=True):
        if not kept or point.score > kept[-1].score:
            kept.append(point)
    return kept


def _pareto(points: Sequence[Point]) -> Figure | None:
    """Score against tokens per second, with quartiles. Under each condition a line joins the points that are not
    beaten; these and ar are labelled."""
    if not points:
        return None
    figure, axes = _figure(9, 6)
    for condition in dict.fromkeys(p.condition for p in points):
        own = [p for p in points if p.condition == condition]
        low, high = ([abs(_rate(p) - end) for p, end in zip(own, _ends(own, i), strict=True)] for i in (0, 2))
        drawn = axes.errorbar([_rate(p) for p in own], [p.score for p in own], xerr=[low, high], fmt="o", alpha=0.4)
        best = front(own)
        colour = drawn[0].get_color()
        axes.plot([_rate(p) for p in best], [p.score for p in best], "o-", color=colour, label=condition)
        for point in [*best, *(p for p in own if p.params.mode == "ar" and p not in best)]:
            place = (_rate(point), point.score)
            axes.annotate(point.label, place, (2, 6), textcoords="offset points", fontsize=7, rotation=25)
    axes.margins(x=0.1, y=0.12)
    axes.set_xlabel("tokens per second without prefill (median and quartiles)")
    axes.set_ylabel(f"score on {points[0].task}")
    axes.legend(fontsize=8, loc="lower left")
    return figure


def _tokens_per_nfe(points: Sequence[Point]) -> Figure | None:
    if not points:
        return None
    # one point for all batch sizes, on which the number of NFEs does not depend
    own = list({(p.label, p.params.temperature, p.distance): p for p in points}.values())
    figure, axes = _bars([_name(p) for p in own])
    axes.barh(range(len(own)), [p.tokens_per_nfe or 0.0 for p in own])
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("tokens per NFE, answers that loop left out")
    return figure


def _commits(points: Sequence[Point]) -> Figure | None:
    """For each place in the block, the share of its tokens that each step committed."""
    own = list({(p.label, p.params.temperature, p.distance): p for p in points}.values())[:_MOST_HEATMAPS]
    if not own:
        return None
    columns = min(3, len(own))
    rows = math.ceil(len(own) / columns)
    figure = Figure(figsize=(4 * columns, 3.4 * rows), layout="constrained")
    for i, point in enumerate(own):
        axes = figure.add_subplot(rows, columns, i + 1)
        totals = [max(1, sum(place)) for place in zip(*point.commits, strict=True)]
        shares = [[n / total for n, total in zip(step, totals, strict=True)] for step in point.commits]
        axes.imshow(shares, origin="lower", aspect="auto", vmin=0, vmax=1)
        axes.set_title(_name(point), fontsize=8)
        axes.set_xlabel("place in the block")
        axes.set_ylabel("step of the commit")
    return figure


def _phases(points: Sequence[Point]) -> Figure | None:
    if not points:
        return None
    figure, axes = _bars([f"{p.label}, {p.condition}" for p in points])
    left = [0.0] * len(points)
    for phase in PHASES:
        seconds = [p.phases[phase] for p in points]
        axes.barh(range(len(points)), seconds, left=left, label=phase)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.set_xlabel("seconds for the timed prompts")
    axes.legend(fontsize=8)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _bars(names: list[str]) -> tuple[Figure, Axes]:
    figure, axes = _figure(9, 1.2 + 0.3 * len(names))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    return figure, axes


def _name(point: Point) -> str:
    where = "" if point.distance is None else f", distance {point.distance}"
    return f"{point.label}, temperature {point.params.temperature}{where}"


def _rate(point: Point) -> float:
    assert point.speed is not None
    return point.speed.tokens_per_second.median


def _ends(points: Sequence[Point], which: int) -> list[float]:
    return [p.speed.tokens_per_second[which] for p in points if p.speed is not None]
