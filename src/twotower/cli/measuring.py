"""What `eval`, `sweep` and `bench` share: lists of values in options, and what is told while they measure."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from twotower.decoding.drafters import DRAFTERS
from twotower.decoding.modes import DRAFTING_MODES, MODES, Mode
from twotower.errors import SettingError
from twotower.eval.sandbox import LIMITS, walls
from twotower.eval.tasks import Task, fitting
from twotower.model.two_tower import TwoTower

DrafterOption = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Where drafts of verified come from: of {', '.join(DRAFTERS)}, or several with commas, the first that "
        "has one. May be given several times: verified runs with each.",
        show_default="the checkpoint's, or denoiser",
    ),
]


def fitted(model: TwoTower, task: Task, longest: int | None) -> Task:
    """The task without questions that need more tokens than the checkpoint has positions, or than `longest`; says on
    stderr how many these are."""
    most = longest or model.config.trained_positions
    if most is None or model.tokenizer is None:
        return task
    kept = fitting(task, model, most)
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


def check_read(modes: Sequence[Mode], reader: Mode, **given: object) -> None:
    """Raises SettingError for the first of `given`, options by their names, that has a value although `reader`, the
    mode that reads it, is not run."""
    for name, value in given.items():
        if value and reader not in modes:
            raise SettingError(
                name, value, f"left out where {reader} isn't run", f"add {reader} to --modes, or drop it"
            )


def drafter_ways(mode: Mode, drafters: list[str] | None) -> dict[str, dict[str, Any]]:
    """The runs of a mode, by a label, and their settings: one for each drafter in a mode that drafts, else one. The
    label is empty where there is one alone."""
    if mode not in DRAFTING_MODES or not drafters:
        return {"": {}}
    return {name if len(drafters) > 1 else "": {"drafter": name} for name in drafters}


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
