"""`twotower sample`: a training corpus written by the context tower itself."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twotower.checkpoints.hf import resolve
from twotower.cli.options import DeviceOption, Dtype, check_out, open_model
from twotower.cli.prompts import read_prompts
from twotower.cli.recipe import RecipeOption
from twotower.cli.settings import with_settings
from twotower.errors import SettingError
from twotower.training.corpus.sampling import SampleConfig, check_prompt, keep_settings, sample_shard
from twotower.training.corpus.shards import Corpus
from twotower.training.run.lock import locked

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_SHARDS = 16


@app.command("sample")
@with_settings
def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face id.")],
    out: Annotated[Path, typer.Argument(help="Directory for the shards; those already there are kept.")],
    *,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Continue each line of this .txt file, or each record of this .jsonl file: its prompt, or its "
            "messages by the checkpoint's chat template, but for a last one of the assistant's. Prompts aren't scored.",
            show_default="rows begin with BOS alone",
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Number of shards, 1 or more.", show_default=f"{_SHARDS}, or all of --prompts"),
    ] = None,
    config: SampleConfig,
    device: DeviceOption = "cpu",
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights.", show_default="the checkpoint's")] = None,
    recipe: RecipeOption = None,
) -> None:
    """Write a corpus for `twotower train`: continuations that MODEL's context tower makes of its own beginnings, or of
    prompts. A row ends where its text does.

    Call it again after an interruption: whole shards are kept, and each depends on the options and its number alone.
    OUT/settings.json keeps these options, and a call with others is refused.
    """
    if prompts is not None:
        for name in ("shortest_prefix", "longest_prefix"):
            if getattr(config, name) is not None:
                raise SettingError(name, getattr(config, name), "left out with --prompts, which are the rows' prefixes")
        config = dataclasses.replace(config, shortest_prefix=1, longest_prefix=1)
    check_out(out)
    opened = open_model(model, device=device, dtype=dtype)
    length = config.row_length(opened.config)
    folder = resolve(model).resolve()
    own = None if prompts is None else read_prompts(prompts, opened, folder)
    for number, prompt in enumerate(own or [], 1):
        check_prompt(prompt, f"prompt {number} of {prompts}", opened.config.vocab_size, length)
    count = _num_shards(shards, own, config.rows)
    settings = {
        "model": str(folder),
        "dtype": str(opened.context_tower.embeddings.dtype).removeprefix("torch."),
        "prompts": None if prompts is None else f"{prompts.name}, sha256 {_digest(prompts)}",
        **dataclasses.asdict(config),
        **dict(zip(("shortest_prefix", "longest_prefix"), config.prefixes(length), strict=True)),
        "length": length,
    }
    del settings["past_positions"]  # changes no shard
    with locked(out):
        keep_settings(out, settings)
        console = Console(stderr=True)
        columns = (
            TextColumn("Sampling"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            for index in progress.track(range(count)):
                file = sample_shard(opened, out, index, config, own)
                if not console.is_terminal:
                    console.print(f"{file} ({index + 1} of {count})", soft_wrap=True, highlight=False)
    corpus = Corpus(out, vocab_size=opened.config.vocab_size)
    scored = sum(int(corpus.row(index).scored.sum()) for index in range(len(corpus)))
    print(
        f"{out} holds {len(corpus):,} rows of {length} tokens, {scored:,} of them scored; "
        f"train on it with: twotower train {model} {out} RUN"
    )


def _num_shards(asked: int | None, prompts: Sequence[Sequence[int]] | None, rows: int) -> int:
    if prompts is None:
        return asked or _SHARDS
    most = -(-len(prompts) // rows)
    if asked is not None and asked > most:
        raise ValueError(f"shards is {asked}, must be 1 to {most}: {len(prompts)} prompts in shards of {rows} rows")
    return asked or most


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
