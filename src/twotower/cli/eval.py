"""`twotower eval`: quality retention and throughput gain of the decoding modes."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from twotower.cli.options import DeviceOption, DtypeOption, ModelArgument, open_model
from twotower.decoding.modes import MODES, Mode
from twotower.decoding.params import SamplingParams
from twotower.eval.evaluate import FEWEST_REPEATS, SpeedConfig, evaluate
from twotower.eval.provenance import provenance
from twotower.eval.report import group_table, quality_table, speed_table, to_json
from twotower.eval.sandbox import LIMITS, walls
from twotower.eval.tasks import HUMANEVAL, Task, fitting, read_task, shipped_tasks
from twotower.model.two_tower import TwoTower

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
        str,
        typer.Option(
            help="A token above this probability is fixed at once, 0 to 1; with commas: diffusion runs with each."
        ),
    ] = f"{_DEFAULTS.confidence_threshold:g}",
    block_size: Annotated[int, typer.Option(help="Tokens filled together, 1 or more.")] = _DEFAULTS.block_size,
    steps_per_block: Annotated[
        int, typer.Option(help="Most denoising steps for one block, 1 or more.")
    ] = _DEFAULTS.steps_per_block,
    temperature: Annotated[float, typer.Option(help="0 to 100; 0 is greedy.")] = _DEFAULTS.temperature,
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
    thresholds = numbers("thresholds", threshold)
    settings = {
        f"{mode} γ {value}" if len(values) > 1 else mode: SamplingParams(
            mode=mode,
            block_size=block_size,
            steps_per_block=steps_per_block,
            confidence_threshold=value,
            temperature=temperature,
            seed=seed,
        )
        for mode in listed_modes(modes)
        for values in [thresholds if mode == "diffusion" else thresholds[:1]]
        for value in values
    }
    sizes = integers("batch sizes", batch_sizes)
    timing = SpeedConfig(prompts=speed_prompts, repeats=repeats, batch_sizes=sizes) if speed else None
    chosen = _listed_tasks(tasks, limit)
    if json_file is not None:
        _check_writable(json_file)
    warn_about_programs(chosen)
    opened = open_model(model, device=device, dtype=dtype)
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


def fitted(model: TwoTower, task: Task, longest: int | None) -> Task:
    """The task without questions that need more tokens than the checkpoint has positions, or than `longest`; says on
    stderr how many these are."""
    most = longest or model.config.carried.get("max_position_embeddings")
    if most is None or model.tokenizer is None:
        return task
    kept = fitting(task, model.tokenizer, most)
    missing = len(task.examples) - len(kept.examples)
    if missing:
        line = f"{task.name}: {missing} of {len(task.examples)} questions need more than {most} tokens and are left out"
        Console(stderr=True).print(line, soft_wrap=True, highlight=False)
    return kept


def listed_modes(text: str) -> list[Mode]:
    """The modes of a text with commas between them, ar first. Raises ValueError for anything else, auto included."""
    found = list(dict.fromkeys(["ar", *text.split(",")]))
    unknown = [mode for mode in found if mode not in MODES]
    if unknown:
        why = "; auto is an engine's choice among them, request by request" if "auto" in unknown else ""
        raise ValueError(f"modes are {text!r}, must be of {', '.join(MODES)}, with commas between them{why}")
    return cast(list[Mode], found)


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


def integers(name: str, text: str) -> tuple[int, ...]:
    """Integers with commas between them, each once. Raises ValueError for anything else."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"{name} are {text!r}, must be integers with commas between them, such as 1,4") from error


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Numbers with commas between them, each once. Raises ValueError for anything else."""
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"{name} are {text!r}, must be numbers with commas between them, such as 0,0.5") from error


def warn_about_programs(tasks: list[Task]) -> None:
    """Says on stderr, before the first of a model's programs runs, what the sandbox keeps from them."""
    if not any(example.scorer == "program" for task in tasks for example in task.examples):
        return
    words = {"no_network": "network", "no_other_processes": "other processes", "no_writing": "writing of files"}
    kept = [word for wall, word in words.items() if walls()[wall]]
    left = ["reading of files", *(word for wall, word in words.items() if not walls()[wall])]
    limits = f"{LIMITS['cpu_seconds']} s of CPU, {LIMITS['wall_seconds']} s in all, {LIMITS['memory_bytes'] >> 20} MB"
    line = (
        f"Programs that the model writes run here with at most {limits}; kept from them: {', '.join(kept) or 'nothing'}"
        f"; not kept from them: {', '.join(left)}"
    )
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Yields a function that tells on stderr what is being measured: in a terminal one line that changes, else a line
    each time."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: console.print(what, soft_wrap=True, highlight=False)
        return
    # A status that redraws by itself would take time from the runs that are measured.
    with console.status("", refresh_per_second=1) as status:
        yield status.update
