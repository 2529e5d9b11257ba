"""`twotower tokenize`: text to a training corpus."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from twotower.cli.options import check_out
from twotower.cli.settings import with_settings
from twotower.training.corpus.text import TextConfig
from twotower.training.corpus.writing import ROWS, write_corpus

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("tokenize")
@with_settings
def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face id: its tokenizer and config.")],
    source: Annotated[
        str,
        typer.Argument(
            help="A .txt, .md, .jsonl, .json (or one of these with .gz or .zst) or .parquet file, a folder of them, or "
            "a Hugging Face dataset's id. Records have a text, or messages for the chat template."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Directory for the shards; it must be new or empty.")],
    *,
    config: TextConfig,
    rows: Annotated[
        int, typer.Option(min=1, help="Most rows of a shard, 1 or more; none has more than 4,194,304 tokens.")
    ] = ROWS,
) -> None:
    """Write a corpus for `twotower train` from text: documents packed into rows, in the order they are read.

    Without --prompt-field every row is full, and a document that does not fit in a row is continued in the next. Of
    messages each of the assistant's is learnt, with all before it as its prompt. Texts may be of any length.
    """
    tokenize(model, source, out, config, rows)
    print(f"train on it with: twotower train {model} {out} RUN")


def tokenize(model: str, source: str, out: Path, config: TextConfig, rows: int = ROWS) -> None:
    """Writes the corpus, shows its rows on stderr if that is a terminal, and prints what it then holds."""
    check_out(out)
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("Tokenising: {task.fields[rows]:,} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, rows=0)
        held = write_corpus(model, source, out, config, rows, lambda written: progress.update(task, rows=written))
    print(
        f"{out} holds {held.rows:,} rows of {held.tokens // held.rows} tokens, {held.scored:,} of them scored and "
        f"{held.padding / held.tokens:.1%} padding"
    )
    if held.cut:
        print(f"{held.cut:,} documents longer than a row lost {held.lost:,} tokens; longer rows would keep them")
