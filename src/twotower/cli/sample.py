"""`twotower sample`: a training corpus written by the context tower itself."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twotower.cli.options import DeviceOption, Dtype, open_model
from twotower.training.sampling import SampleConfig, sample_shard

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEFAULTS = SampleConfig()


@app.command("sample")
def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face id.")],
    out: Annotated[Path, typer.Argument(help="Directory for the shards; those already there are kept.")],
    shards: Annotated[int, typer.Option(min=1, help="Number of shards, 1 or more.")] = 16,
    rows: Annotated[int, typer.Option(help="Rows of a shard, written as one batch, 1 or more.")] = _DEFAULTS.rows,
    length: Annotated[int, typer.Option(help="Tokens of a row, 2 or more.")] = _DEFAULTS.length,
    temperatures: Annotated[
        str,
        typer.Option(help="With commas: each shard draws one for what follows the prefix; 0 is greedy, 0 to 100."),
    ] = ",".join(f"{t:g}" for t in _DEFAULTS.temperatures),
    shortest_prefix: Annotated[
        int, typer.Option(help="Fewest tokens sampled at temperature 1 before that, 1 or more.")
    ] = _DEFAULTS.shortest_prefix,
    longest_prefix: Annotated[int, typer.Option(help="Most of them, below --length.")] = _DEFAULTS.longest_prefix,
    seed: Annotated[int, typer.Option(help="Decides every shard, 0 or more.")] = _DEFAULTS.seed,
    device: DeviceOption = "cpu",
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights.", show_default="the checkpoint's")] = None,
) -> None:
    """Write a corpus for `twotower train`: continuations that MODEL's context tower makes of its own beginnings.

    Call it again after an interruption: whole shards are kept, and each depends on the options and its number alone.
    """
    config = SampleConfig(
        rows=rows,
        length=length,
        temperatures=_numbers(temperatures),
        shortest_prefix=shortest_prefix,
        longest_prefix=longest_prefix,
        seed=seed,
    )
    opened = open_model(model, device=device, dtype=dtype)
    console = Console(stderr=True)
    columns = (TextColumn("Sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for index in progress.track(range(shards)):
            file = sample_shard(opened, out, index, config)
            if not console.is_terminal:
                console.print(f"{file} ({index + 1} of {shards})", soft_wrap=True, highlight=False)
    print(f"{out} holds {shards} shards of {rows} rows; train on it with: twotower train {model} {out} RUN")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"temperatures are {text!r}, must be numbers with commas between them, such as 0,0,1"
        ) from error
