"""`twotower pretrain`: train a backbone of any pattern from nothing."""

import functools
from pathlib import Path
from typing import Annotated

import torch
import typer

from twotower.checkpoints.families.nemotron_h import read_one_tower_config
from twotower.checkpoints.hf import carried_documents, load_tokenizer, resolve, save_rounded
from twotower.checkpoints.hf.config_file import as_dtype
from twotower.checkpoints.hf.tokenizer_file import TRAINING_FILE
from twotower.cli.options import check_out
from twotower.cli.recipe import RecipeOption
from twotower.cli.settings import with_settings
from twotower.cli.stopping import end_if_stopped, stop_request
from twotower.cli.training_run import (
    RunOptions,
    check_finished,
    export_state,
    open_corpus,
    own_rank,
    print_estimate,
    reporting,
    saved_state,
    telling,
    torchrun_ranks,
)
from twotower.config import TwoTowerConfig
from twotower.model.one_tower import OneTower
from twotower.training.config import NextTokenConfig, TrainConfig
from twotower.training.objectives.next_token import NextToken
from twotower.training.run.checkpointing import read_progress
from twotower.training.run.identity import changes, check_changes, config_identity
from twotower.training.run.lock import locked
from twotower.training.run.record import training_document
from twotower.training.run.trainer import Trainer
from twotower.training.run.weights import TensorStream

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("pretrain")
@with_settings
def command(
    config: Annotated[
        str, typer.Argument(help="Directory with the backbone's config.json and, to go on with it, its tokenizer.json.")
    ],
    corpus: Annotated[Path, typer.Argument(help="Directory of shards that `tokenize CONFIG` wrote.")],
    out: Annotated[
        Path, typer.Argument(help="Directory for state/, metrics.jsonl and backbone/; a state in it is resumed.")
    ],
    *,
    training: TrainConfig,
    what: NextTokenConfig,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Corpus to measure, all of it, in nats per token; with the weights' running mean too.",
            show_default="none",
        ),
    ] = None,
    row_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens that CORPUS's rows must have; for a dry run before there is a corpus.", show_default="any"
        ),
    ] = None,
    run: RunOptions,
    recipe: RecipeOption = None,
) -> None:
    """Train one tower on the next tokens of CORPUS, then write it to OUT/backbone for `twotower init`.

    CONFIG's config.json says what it is made of, as that of a Nemotron-H model does; --seed also decides its first
    weights. Under torchrun every process takes its share of each step's rows.
    """
    folder = resolve(config)
    shapes = read_one_tower_config(folder)
    if run.dry_run:
        print_estimate(shapes, training, what, corpus, row_length=row_length, num_ranks=run.num_ranks)
        return
    check_out(out)
    with locked(out, own_rank()), torchrun_ranks(run.device) as ranks:
        if not run.export_only:
            check_finished(out / "backbone", out)
            rows = open_corpus(corpus, shapes, row_length, folder)
            measured = None if held_out is None else open_corpus(held_out, shapes, row_length, folder)
            model = _open(shapes, training.seed, ranks.device, training.shard)
            initial = functools.partial(_without_weights(shapes).initial_tensors, training.seed)
            weights = initial if training.shard else None
            trainer = Trainer(NextToken(model, what), rows, training, out, ranks, held_out=measured, weights=weights)
            inputs = {"config": config, "corpus": str(corpus), "held_out": None if held_out is None else str(held_out)}
            settings = inputs | {"dtype": run.dtype}
            with reporting(trainer, run, settings) as report, stop_request(trainer) as request:
                is_done = trainer.run(
                    report,
                    request.is_there,
                    begin=telling(trainer, what, out / "backbone"),
                    inputs=settings,
                    allow_changes=run.allow_changes,
                )
            end_if_stopped(trainer, request, is_done=is_done)
        if ranks.rank == 0:
            _export(folder, out, as_dtype(run.dtype))


def _open(shapes: TwoTowerConfig, seed: int, device: torch.device, shard: bool) -> OneTower:
    """The model to train: whole, or without weights where each rank is to take only its shards of them."""
    if shard:
        return _without_weights(shapes)
    model = OneTower(shapes)
    model.initialise_(seed)
    return model.to(device)


def _without_weights(shapes: TwoTowerConfig) -> OneTower:
    with torch.device("meta"):
        return OneTower(shapes)


def _export(folder: Path, out: Path, dtype: torch.dtype) -> None:
    model = _without_weights(read_one_tower_config(folder))
    state = saved_state(out)
    progress = read_progress(state)
    check_changes(
        state, changes(state, progress["run"], progress["run"] | config_identity(model.config), progress["step"])
    )
    tokenizer, documents = load_tokenizer(folder), carried_documents(folder)
    documents[TRAINING_FILE] = training_document(progress)

    def write(tensors: TensorStream, path: Path) -> None:
        save_rounded(OneTower, model.config, tensors, path, dtype, tokenizer=tokenizer, documents=documents)

    # All of it is trained: of what it started from only the names matter
    released = model.released_tensors()
    objective = NextToken(model, NextTokenConfig())
    for path in export_state(objective, state, out / "backbone", lambda: iter(released.items()), write):
        print(f"give it a denoiser with: twotower init {path} START")
