"""`twotower ngrams`: counts of n-grams for a checkpoint, which `verified` can draft from."""

from pathlib import Path
from typing import Annotated

import typer

from twotower.checkpoints.hf import load_tokenizer
from twotower.checkpoints.hf.generation_file import read_config, write_drafter
from twotower.checkpoints.hf.ngrams_file import NGRAMS_FILE, write_ngrams
from twotower.cli.options import own_folder
from twotower.cli.recipe import RecipeOption
from twotower.cli.settings import with_settings
from twotower.decoding.drafters import DRAFTERS, draft_sources
from twotower.training.corpus.ngrams import NgramConfig, count_ngrams
from twotower.training.corpus.shards import Corpus

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("ngrams")
@with_settings
def command(
    model: Annotated[str, typer.Argument(help="Two-tower checkpoint directory, which gets the file ngrams.npz.")],
    corpus: Annotated[Path, typer.Argument(help="Directory of shards that twotower sample or tokenize wrote.")],
    *,
    config: NgramConfig,
    drafter: Annotated[
        str,
        typer.Option(
            help="What verified then drafts from where nobody says, written into generation_config.json: of "
            f"{', '.join(DRAFTERS)}, or several with commas."
        ),
    ] = "ngram",
    recipe: RecipeOption = None,
) -> None:
    """Count which token follows which in a corpus, and keep with the checkpoint what drafts can be made of.

    A corpus of the model's own texts, by twotower sample, serves best; 10 million tokens are counted in a minute.
    Counts belong to a vocabulary and survive training. Compare: twotower bench decode --modes verified --drafter ngram
    """
    draft_sources(drafter)
    folder = own_folder(model, NGRAMS_FILE)
    shapes = read_config(folder)
    tokenizer = load_tokenizer(folder, shapes.vocab_size)
    held = Corpus(corpus, vocab_size=shapes.vocab_size, tokenizer=tokenizer)
    table = count_ngrams(held, shapes.vocab_size, config)
    file = write_ngrams(folder, table, tokenizer)
    write_drafter(folder, drafter)
    size = f"{len(table.keys):,} contexts of up to {config.order - 1} tokens in {file.stat().st_size / 1e6:.1f} MB"
    print(
        f"{file} holds {size}, from {len(held) * held.length:,} tokens; verified drafts from {drafter} unless told "
        "otherwise"
    )
