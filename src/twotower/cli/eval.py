"""`twotower eval`: quality retention and throughput gain of the decoding modes."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from twotower.cli.measuring import (
    DrafterOption,
    check_read,
    drafter_ways,
    fitted,
    integers,
    listed_modes,
    numbers,
    telling,
    warn_about_programs,
)
from twotower.cli.options import DeviceOption, DtypeOption, ModelArgument, open_model
from twotower.cli.settings import like
from twotower.decoding.params import DEFAULT_THRESHOLD, SamplingParams
from twotower.eval.evaluate import FEWEST_REPEATS, SpeedConfig, evaluate
from twotower.eval.provenance import provenance
from twotower.eval.report import group_table, quality_table, speed_table, to_json
from twotower.eval.sweep import commits_by
from twotower.eval.tasks import HUMANEVAL, Task, read_task, shipped_tasks

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEFAULTS = SamplingParams()
_TIMING = SpeedConfig()


@app.command("eval")
def command(
    model: ModelArgument = None,
    tasks: Annotated[
        str,
        typer.Option(
            help=f"With commas: {', '.join(shipped_tasks())}, {HUMANEVAL} (needs the extra eval), .jsonl files.",
            show_default="all that come with the package",
        ),
    ] = ",".join(shipped_tasks()),
    modes: Annotated[str, typer.Option(help="Modes with commas; ar always runs.")] = "diffusion,verified",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of each task, 1 or more.", show_default="all")
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Leave out questions that need more tokens, answer included, 1 or more.",
            show_default="the checkpoint's max_position_embeddings, if it has that",
        ),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="A token above this probability is fixed at once, 0 to 1; with commas: diffusion runs with each.",
            show_default=f"{DEFAULT_THRESHOLD:g}, without a target or a bound",
        ),
    ] = None,
    target_retention: Annotated[
        str | None,
        typer.Option(
            help="Share of ar's score to keep by the checkpoint's calibration, 0 to 1; with commas as --threshold.",
            show_default="none",
        ),
    ] = None,
    entropy_bound: Annotated[
        str | None,
        typer.Option(
            help="Bound of the commit rule entropy_bound, in nats; with commas as --threshold.", show_default="none"
        ),
    ] = None,
    drafter: DrafterOption = None,
    block_size: Annotated[int | None, like(SamplingParams, "block_size")] = None,
    steps_per_block: Annotated[int, like(SamplingParams, "steps_per_block")] = _DEFAULTS.steps_per_block,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides what is sampled and timed, 0 or more.")] = 0,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure tokens per second too.")] = True,
    speed_prompts: Annotated[
        int, typer.Option(help="Most prompts of each task that are timed, 1 or more; a sample of them by --seed.")
    ] = _TIMING.prompts,
    repeats: Annotated[
        int, typer.Option(help=f"Rounds in which the modes take turns, {FEWEST_REPEATS} or more.")
    ] = _TIMING.repeats,
    batch_sizes: Annotated[str, typer.Option(help="Prompts that run together, with commas; whole batches only.")] = "1",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write everything here.", show_default="nowhere")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Measure what each mode keeps of ar's quality, and how many times as fast as ar it writes.

    Both compare a mode with ar, with the same checkpoint, prompts (as tasks have them, in no chat template) and stop
    rules. An answer that repeats itself in a loop scores nothing and is left out of tokens per NFE. A mode is timed if
    at least half of its answers are sound, neither a loop nor empty; the prompts that are timed are those that all of
    these modes answer soundly.

    What a mode keeps is its score divided by ar's; "all" is the mean over tasks. It leaves out a task where ar scores
    0, or where the standard error of ar's score is more than 25 % of it. The mean speed is over the remaining tasks in
    which the mode keeps at least half of ar's score.
    """
    listed = listed_modes(modes)
    check_read(listed, "verified", drafter=drafter)
    check_read(listed, "diffusion", threshold=threshold, target_retention=target_retention, entropy_bound=entropy_bound)
    dials = _dials(threshold, target_retention, entropy_bound)
    settings = {
        f"{mode} {label}" if len(ways) > 1 else mode: SamplingParams(
            mode=mode,
            block_size=block_size,
            past_positions=True,  # --longest says how long
            steps_per_block=steps_per_block,
            temperature=temperature,
            seed=seed,
            **fields,
        )
        for mode in listed
        for ways in [dials if mode == "diffusion" else drafter_ways(mode, drafter)]
        for label, fields in ways.items()
    }
    sizes = integers("batch sizes", batch_sizes)
    timing = SpeedConfig(prompts=speed_prompts, repeats=repeats, batch_sizes=sizes) if speed else None
    chosen = _listed_tasks(tasks, limit)
    if json_file is not None:
        _check_writable(json_file)
    warn_about_programs(chosen)
    opened = open_model(model, device=device, dtype=dtype)
    settings = {label: params.settled(opened.config.block_size, opened.sampling) for label, params in settings.items()}
    kept = [fitted(opened, task, longest) for task in chosen]
    with telling() as tell:
        results = [evaluate(opened, task, settings, timing, tell) for task in kept if task.examples]
    if not results:
        raise ValueError("no question of these tasks fits; raise --longest")
    console = Console()
    console.print(quality_table(results))
    if any(example.group for task in kept for example in task.examples):
        console.print(group_table(results))
    if timing is not None:
        console.print(speed_table(results))
    if json_file is not None:
        left_out = {task.name: len(task.examples) - len(fit.examples) for task, fit in zip(chosen, kept, strict=True)}
        origin = {"model": model or "stories", **provenance(opened)}
        whole = origin | {"questions_left_out": left_out} | to_json(results)
        json_file.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _dials(threshold: str | None, target_retention: str | None, entropy_bound: str | None) -> dict[str, dict[str, Any]]:
    """The ways in which diffusion commits, by label: its settings."""
    given = {
        "confidence_threshold": ("γ", "thresholds", threshold),
        "target_retention": ("target", "targets", target_retention),
        "entropy_bound": ("H", "bounds", entropy_bound),
    }
    found = {
        f"{letter} {value}": commits_by(setting, value)
        for setting, (letter, name, text) in given.items()
        if text is not None
        for value in numbers(name, text)
    }
    return found or {f"γ {DEFAULT_THRESHOLD:g}": commits_by("confidence_threshold", DEFAULT_THRESHOLD)}


def _listed_tasks(text: str, limit: int | None) -> list[Task]:
    """The tasks of a text with commas between them. Raises ValueError for two of the same name, by which results are
    told apart."""
    found: dict[str, tuple[str, Task]] = {}
    for source in text.split(","):
        task = read_task(source, limit)
        if task.name in found:
            other = found[task.name][0]
            raise ValueError(f"tasks {other} and {source} are both named {task.name}; drop one or rename its file")
        found[task.name] = (source, task)
    return [task for _, task in found.values()]


def _check_writable(file: Path) -> None:
    """Raises FileNotFoundError, IsADirectoryError or PermissionError where the file can't be written later."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--json is {file}, but there is no directory {file.parent}; make it first")
    if file.is_dir():
        raise IsADirectoryError(f"--json is {file}, which is a directory; name a file in it")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PermissionError(f"--json is {file}, which may not be written; name a file elsewhere")
