"""`twotower tokenize`: text to a training corpus."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from twotower.checkpoints.hf import load_tokenizer, resolve
from twotower.cli.options import check_out
from twotower.config import TwoTowerConfig
from twotower.training.corpus.packing import Packed, pack
from twotower.training.corpus.shards import CorpusRows, write_shard
from twotower.training.corpus.text import TextConfig, read_documents

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEFAULTS = TextConfig()
ROWS = 4096  # of a shard


@app.command("tokenize")
def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face id: its tokenizer and config.")],
    source: Annotated[
        str,
        typer.Argument(
            help="A .txt, .md, .jsonl, .json (or one of these with .gz) or .parquet file, a folder of them, or a "
            "Hugging Face dataset's id."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Directory for the shards; it must be new or empty.")],
    length: Annotated[int, typer.Option(help="Tokens of a row, 2 or more.")] = _DEFAULTS.length,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a shard, 1 or more.")] = ROWS,
    text_field: Annotated[str, typer.Option(help="Field of a record that holds its text.")] = _DEFAULTS.text_field,
    prompt_field: Annotated[
        str | None,
        typer.Option(
            help="Field that holds what comes before the text and is not learnt. Documents are then kept whole, and "
            "rows padded; one longer than a row loses its prompt's beginning, down to half a row, then its text's end.",
            show_default="none",
        ),
    ] = None,
    control_tokens: Annotated[
        bool,
        typer.Option(
            "--control-tokens/--no-control-tokens",
            help="Names of control tokens, such as </s>, are these tokens in texts too, not only in prompts; the "
            "mask's name is always text.",
        ),
    ] = _DEFAULTS.control_tokens,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = _DEFAULTS.split,
) -> None:
    """Write a corpus for `twotower train` from text: documents packed into rows, in the order they are read.

    Without --prompt-field rows are full, and a document that a row's end cuts goes on in the next one.
    """
    config = TextConfig(
        length=length,
        text_field=text_field,
        prompt_field=prompt_field,
        control_tokens=control_tokens,
        split=split,
    )
    write_corpus(model, source, out, config, rows)
    print(f"train on it with: twotower train {model} {out} RUN")


def write_corpus(model: str, source: str, out: Path, config: TextConfig, rows: int = ROWS) -> None:
    """Writes the shards of a corpus, with MODEL's tokenizer, and prints what they hold; `out` is new or empty."""
    check_out(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose a new directory")
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer.json to tokenize with; add one")
    packed = pack(read_documents(source, config), tokenizer, TwoTowerConfig.from_json(folder / "config.json"), config)
    place = out.resolve()  # `.` has no name and no parent
    place.parent.mkdir(parents=True, exist_ok=True)
    # A folder beside it until all is there: half a corpus would train without a word.
    with tempfile.TemporaryDirectory(prefix=f"{place.name}.partial-", dir=place.parent) as building:
        counts = _write(packed, rows, Path(building))
        if not counts.rows:
            raise ValueError(f"{source} has no text to make tokens of; give another, or another --text-field")
        place.mkdir(exist_ok=True)
        for file in sorted(Path(building).iterdir()):
            shutil.move(file, place)
    print(
        f"{out} holds {counts.rows:,} rows of {config.length} tokens, {counts.scored:,} of them scored and "
        f"{counts.padding / (counts.rows * config.length):.1%} padding"
    )
    if counts.cut:
        print(f"{counts.cut:,} documents longer than a row lost {counts.lost:,} tokens; longer rows keep them")


class _Counts(NamedTuple):
    """Rows, what of their tokens is scored and what padding, documents longer than a row, and the tokens they lost."""

    rows: int
    scored: int
    padding: int
    cut: int
    lost: int


def _write(packed: Iterator[Packed], size: int, folder: Path) -> _Counts:
    """Writes shards of `size` rows."""
    counts = _Counts(0, 0, 0, 0, 0)
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("Tokenising: {task.fields[rows]:,} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, rows=0)
        for index, shard in enumerate(iter(lambda: list(itertools.islice(packed, size)), [])):
            stacked = CorpusRows(*(np.stack(parts) for parts in zip(*(p.row for p in shard), strict=True)))
            write_shard(folder / f"{index:05d}.safetensors", stacked)
            counts = _Counts(
                counts.rows + len(shard),
                counts.scored + int(stacked.scored.sum()),
                counts.padding + sum(p.num_padding for p in shard),
                counts.cut + sum(p.num_lost > 0 for p in shard),
                counts.lost + sum(p.num_lost for p in shard),
            )
            progress.update(task, rows=counts.rows)
    return counts
