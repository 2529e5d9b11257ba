"""`twotower calibrate`: commit rules that keep a promised share of `ar`'s score."""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from twotower.checkpoints.hf import released_stream
from twotower.checkpoints.hf.calibration_file import CALIBRATION_FILE, fingerprint, write_calibration
from twotower.cli.measuring import fitted, telling, warn_about_programs
from twotower.cli.options import DeviceOption, DtypeOption, open_model, own_folder
from twotower.cli.prompts import read_prompts
from twotower.cli.settings import with_settings
from twotower.eval.answering import Question, questions
from twotower.eval.calibration.calibrate import CalibrationConfig, calibrate
from twotower.eval.report import share
from twotower.eval.retention import Interval
from twotower.eval.tasks import HUMANEVAL, Example, is_task, read_task, shipped_tasks
from twotower.model.calibration import Calibration
from twotower.model.two_tower import TwoTower

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_NEW_TOKENS = 128


@app.command("calibrate")
@with_settings
def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face id, which gets the file.")],
    prompts: Annotated[
        str,
        typer.Argument(
            help="With commas: files of prompts, .txt with one in each line or .jsonl with a prompt or messages in "
            "each record; .jsonl files of tasks, whose records have an answer or a scorer; names of tasks: "
            f"{', '.join(shipped_tasks())}, {HUMANEVAL}."
        ),
    ],
    *,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens of an answer to a prompt of a file, 1 or more; tasks have their own.",
            show_default=f"the checkpoint's, or {_NEW_TOKENS}",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each file or task, 1 or more.", show_default="all")
    ] = None,
    config: CalibrationConfig,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Find out how boldly MODEL may commit tokens for what share of ar's score, on PROMPTS, and write it beside the
    weights, so that requests can say target_retention (--target-retention) instead of a threshold.

    Give prompts of the kind that will be asked, and others than those that results are reported on. Texts are judged by
    their task, or where a prompt has no answer by their probability per token under the context tower. Half of the
    prompts choose the rules, a quarter fits them, and a quarter, which has no part in that, says what they keep. A
    calibration that is there stays where no rule is found.
    """
    folder = own_folder(model, CALIBRATION_FILE)
    file = folder / CALIBRATION_FILE
    opened = open_model(model, device=device, dtype=dtype)
    length = max_new_tokens or opened.sampling.max_new_tokens or _NEW_TOKENS
    asked = [q for source in prompts.split(",") for q in _questions(source, opened, folder, length)[:limit]]
    if repeated := len(asked) - len(set(asked)):
        warnings.warn(
            f"{repeated} of the {len(asked)} prompts are repetitions of others, and each counts as one more draw; "
            "unless prompts will be asked as often, give each once, or more is promised than was shown",
            stacklevel=2,
        )
    # without the folders, which a checkpoint that is passed on has no use for
    named = ", ".join(Path(source).name for source in prompts.split(","))
    own = fingerprint(released_stream(folder))
    with telling() as tell:
        found = calibrate(opened, asked, config, prompts=named, fingerprint=own, advance=tell)
    Console().print(_table(found))
    print(_summary(found))
    if not found.rules and opened.calibration is not None and opened.calibration.rules:
        # An hour's work that holds, and nothing to put in its place
        print(f"{file} stays as it was, with {len(opened.calibration.rules)} rules; delete it to have none")
        return
    print(f"wrote {write_calibration(folder, found)}")


def _questions(source: str, model: TwoTower, folder: Path, length: int) -> list[Question]:
    """The questions of a task; or those of a file of prompts, whose answers have at most `length` tokens and are judged
    by their likelihood."""
    if is_task(source):
        task = fitted(model, read_task(source), None)
        warn_about_programs([task])
        return questions(model, task)
    path = Path(source)
    if not path.is_file():
        names = ", ".join((*shipped_tasks(), HUMANEVAL))
        raise FileNotFoundError(f"there is no file {source}; give one, or the name of a task: {names}")
    example = Example(prompt="", scorer="likelihood", max_new_tokens=length)
    return [Question(tuple(ids), example) for ids in read_prompts(path, model, folder)]


def _table(found: Calibration) -> Table:
    table = Table(title="Rules, from safe to bold", pad_edge=False)
    for heading in ("risk of a\ntoken", "tokens\nper NFE", "shown\nto keep", "kept of ar's score,\nheld out (95 %)"):
        table.add_column(heading, justify="right")
    for rule in found.rules:
        held_out = share(Interval(*rule.held_out))
        table.add_row(f"{rule.risk:.2%}", f"{rule.tokens_per_nfe:.2f}", f"{rule.shown:.1%}", held_out)
    return table


def _summary(found: Calibration) -> str:
    if not found.rules:
        return "no rule was shown to keep even half of ar's score: target_retention will be refused"
    return (
        f"target_retention may be up to {found.most_told}: what is asked for is kept with a chance of "
        f"{found.confidence:g}, on prompts like these {found.num_prompts}"
    )
