"""`twotower sweep`: one task over a grid of settings, to CSV, JSON and pictures."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from twotower.cli.measuring import (
    DrafterOption,
    check_read,
    fitted,
    integers,
    listed_modes,
    numbers,
    telling,
    warn_about_programs,
)
from twotower.cli.options import DeviceOption, DtypeOption, ModelArgument, check_out, open_model
from twotower.eval.evaluate import FEWEST_REPEATS, SpeedConfig
from twotower.eval.provenance import provenance
from twotower.eval.report import UNCOUNTED, share
from twotower.eval.sweep import Point, SweepConfig, sweep
from twotower.eval.tasks import HUMANEVAL, read_task, shipped_tasks

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEFAULTS = SweepConfig()
_TIMING = SpeedConfig()
_UNTIMED = (
    "not timed: ar scores 0, most answers of the setting are degenerate or empty, or too few prompts have sound "
    "answers in every timed setting"
)


def _listed(values: Sequence[object]) -> str:
    return ",".join(str(value) for value in values)


@app.command("sweep")
def command(
    model: ModelArgument = None,
    *,
    out: Annotated[Path, typer.Option(help="Directory for sweep.csv, sweep.json and the pictures; new or empty.")],
    task: Annotated[
        str, typer.Option(help=f"One of {', '.join(shipped_tasks())}, {HUMANEVAL}, or a .jsonl file.")
    ] = "stories",
    modes: Annotated[str, typer.Option(help="Modes with commas; ar always runs.")] = _listed(_DEFAULTS.modes),
    thresholds: Annotated[
        str, typer.Option(help="With commas: tokens above this probability are fixed at once, 0 to 1.")
    ] = _listed(_DEFAULTS.thresholds),
    target_retentions: Annotated[
        str | None,
        typer.Option(
            help="With commas: shares of ar's score to keep by the checkpoint's calibration, 0 to 1.",
            show_default="none",
        ),
    ] = None,
    entropy_bounds: Annotated[
        str | None,
        typer.Option(help="With commas: bounds, in nats, of the commit rule entropy_bound.", show_default="none"),
    ] = None,
    block_sizes: Annotated[
        str | None,
        typer.Option(help="With commas: tokens filled together, 1 or more.", show_default="the checkpoint's"),
    ] = None,
    steps_per_block: Annotated[
        str, typer.Option(help="With commas: most denoising steps for one block, 1 or more.")
    ] = _listed(_DEFAULTS.steps_per_block),
    drafter: DrafterOption = None,
    temperatures: Annotated[str, typer.Option(help="With commas: 0 to 100; 0 is greedy.")] = _listed(
        _DEFAULTS.temperatures
    ),
    batch_sizes: Annotated[str, typer.Option(help="With commas: prompts that run together; whole batches only.")] = "1",
    distances: Annotated[
        str | None,
        typer.Option(
            help="With commas: tokens of filler in the middle of recall's prompts, or before any other's.",
            show_default="the prompts as they are",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples, 1 or more.", show_default="all")] = None,
    speed_prompts: Annotated[
        int, typer.Option(help="Most prompts that are timed, 1 or more; a sample of them by --seed.")
    ] = _TIMING.prompts,
    repeats: Annotated[
        int, typer.Option(help=f"Rounds in which the settings take turns, {FEWEST_REPEATS} or more.")
    ] = _TIMING.repeats,
    seed: Annotated[int, typer.Option(help="Decides what is sampled and timed, 0 or more.")] = _DEFAULTS.seed,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Measure score and speed of every combination of settings, ar beside them in the same rounds.

    A mode is run with the values that it reads: thresholds and steps are diffusion's. The files are written again after
    every temperature and distance.
    """
    _check_matplotlib()
    listed = listed_modes(modes)
    check_read(listed, "verified", drafter=drafter)
    check_read(listed, "diffusion", target_retentions=target_retentions, entropy_bounds=entropy_bounds)
    config = SweepConfig(
        modes=tuple(listed),
        thresholds=numbers("thresholds", thresholds),
        target_retentions=() if target_retentions is None else numbers("targets", target_retentions),
        entropy_bounds=() if entropy_bounds is None else numbers("bounds", entropy_bounds),
        block_sizes=() if block_sizes is None else integers("block sizes", block_sizes),
        steps_per_block=integers("steps", steps_per_block),
        drafters=tuple(dict.fromkeys(drafter or ())),
        temperatures=numbers("temperatures", temperatures),
        distances=() if distances is None else integers("distances", distances),
        seed=seed,
    )
    timing = SpeedConfig(prompts=speed_prompts, repeats=repeats, batch_sizes=integers("batch sizes", batch_sizes))
    chosen = read_task(task, limit)
    _make_directory(out)
    warn_about_programs([chosen])
    opened = open_model(model, device=device, dtype=dtype)
    # where distances are swept, going beyond the checkpoint's positions is what was asked for
    kept = chosen if config.distances else fitted(opened, chosen, None)
    if not kept.examples:
        raise ValueError(f"no question of {task} fits in the checkpoint's positions; choose another task")
    points: list[Point] = []
    with telling() as tell:
        for found in sweep(opened, kept, config, timing, tell):
            points += found
            write(points, {"model": model or "stories", **provenance(opened)}, out)
    for condition in dict.fromkeys(point.condition for point in points):
        Console().print(_table(condition, [point for point in points if point.condition == condition]))
    print(f"wrote {', '.join(sorted(file.name for file in out.iterdir()))} to {out}")


def write(points: Sequence[Point], origin: dict[str, Any], out: Path) -> None:
    """Writes sweep.csv, sweep.json and the pictures, over those that are there."""
    from twotower.eval.plots import draw

    rows = [point.row() for point in points]
    with (out / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    whole = origin | {"points": [row | {"commits": p.commits} for row, p in zip(rows, points, strict=True)]}
    (out / "sweep.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    draw(points, out)


def _make_directory(out: Path) -> None:
    """Raises what `check_out` does, FileExistsError for a directory that holds something, and PermissionError."""
    check_out(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose a new directory")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} may not be written; choose a directory elsewhere")


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("a sweep draws pictures with matplotlib, which is missing; install twotower[eval]") from error


def _table(condition: str, points: Sequence[Point]) -> Table:
    """Scores, and medians of speeds; below it what a star and a missing speed mean."""
    table = Table(title=f"Scores, and speed without prefill: {condition}", caption_justify="left", pad_edge=False)
    table.add_column("setting", no_wrap=True)
    for heading in ("score", "of ar's\n(95 %)", "tokens/s", "times ar", "tokens\nper NFE", "tokens\nper pass"):
        table.add_column(heading, justify="right")
    for p in points:
        mark = "" if p.params.mode == "ar" or p.gain_counts else "*"
        cells = (
            f"{p.score:.3f}",
            "" if p.params.mode == "ar" else share(p.retention),
            "not timed" if p.speed is None else f"{p.speed.tokens_per_second.median:.0f}",
            "" if p.speed is None else f"{p.speed.gain.median:.2f}{mark}",
            *("" if per is None else f"{per:.2f}" for per in (p.tokens_per_nfe, p.tokens_per_pass)),
        )
        table.add_row(p.label, *cells)
    uncounted = any(p.speed and p.params.mode != "ar" and not p.gain_counts for p in points)
    untimed = any(p.speed is None for p in points)
    table.caption = "\n".join([UNCOUNTED] * uncounted + [_UNTIMED] * untimed) or None
    return table
