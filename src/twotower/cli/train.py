"""`twotower train`: train a denoiser tower and export the checkpoint."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

import torch
import typer

from twotower.checkpoints.hf import (
    carried_documents,
    load_tokenizer,
    read_config,
    released_stream,
    resolve,
    save_rounded,
)
from twotower.checkpoints.hf.config_file import as_dtype
from twotower.checkpoints.hf.tokenizer_file import TRAINING_FILE
from twotower.cli.options import check_out, open_device, open_model
from twotower.cli.prepare import prepare, towers_config
from twotower.cli.recipe import RecipeOption
from twotower.cli.settings import with_settings
from twotower.cli.stopping import end_if_stopped, stop_request
from twotower.cli.training_run import (
    RunOptions,
    check_finished,
    export_state,
    num_processes,
    open_corpus,
    own_rank,
    print_estimate,
    reporting,
    saved_state,
    telling,
    torchrun_ranks,
)
from twotower.model.two_tower import TwoTower
from twotower.training.config import DenoisingConfig, TrainConfig
from twotower.training.corpus.row_length import usual_length
from twotower.training.corpus.shards import is_corpus
from twotower.training.corpus.text import USUAL_LENGTH
from twotower.training.objectives.denoising import Denoising
from twotower.training.run.checkpointing import read_progress
from twotower.training.run.identity import changes, check_changes, denoising_config, model_identity
from twotower.training.run.lock import locked
from twotower.training.run.record import training_document
from twotower.training.run.trainer import Trainer, check_run
from twotower.training.run.weights import TensorStream

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("train")
@with_settings
def command(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory or Hugging Face id to start from; a single tower, or what else `init` takes, is "
            "made into two in OUT/initial."
        ),
    ],
    corpus: Annotated[
        str,
        typer.Argument(
            help="Directory of shards that `tokenize` or `sample` wrote; text, or what else `tokenize` takes, is "
            "tokenized with its defaults, but for --row-length, to OUT/corpus."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Directory for state/, metrics.jsonl and checkpoint/; a state in it is resumed.")
    ],
    *,
    config: TrainConfig,
    what: DenoisingConfig,
    denoiser_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that the denoiser has, as `init` takes them, such as spread:3; OUT/initial is then made of a "
            "checkpoint of two towers too.",
            show_default="all of MODEL's",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Corpus to measure, shards or text: all of it in nats per token, and its first answers by decoding "
            "them, unless with --shard; with the weights' running mean too.",
            show_default="none",
        ),
    ] = None,
    row_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a row: what shards must have, and text gets; for a dry run before there is a corpus.",
            show_default=f"the shards'; for text {USUAL_LENGTH}, or the model's positions",
        ),
    ] = None,
    run: RunOptions,
    recipe: RecipeOption = None,
) -> None:
    """Train the denoiser tower of MODEL on CORPUS, then write the whole checkpoint to OUT/checkpoint.

    From an autoregressive checkpoint and a folder of text to a two-tower checkpoint this is all there is to call.

    Under torchrun (torchrun --nproc-per-node 8 -m twotower train …) every process takes its share of each step's rows;
    but for rounding the result doesn't depend on their number.
    """
    if run.dry_run:
        shapes = towers_config(model, denoiser_layers)
        if row_length is None and Path(corpus).exists() and not is_corpus(corpus):
            row_length = usual_length(USUAL_LENGTH, shapes)
        print_estimate(shapes, config, what, Path(corpus), row_length=row_length, num_ranks=run.num_ranks)
        return
    settings = {"model": model, "corpus": corpus, "held_out": held_out, "dtype": run.dtype}
    sources = {"corpus": corpus} if held_out is None else {"corpus": corpus, "held_out": held_out}
    if run.export_only:
        saved_state(out)
        sources = {}
    else:  # before what may take hours
        if denoiser_layers is not None:
            towers_config(model, denoiser_layers)
        open_device(run.device)
        check_run(config, what, num_processes(), has_held_out=held_out is not None)
    check_out(out)
    with locked(out, own_rank()):
        if not run.export_only:
            check_finished(out / "checkpoint", out)
        model, folders = prepare(model, sources, out, row_length, config.past_positions, denoiser_layers)
        folder = resolve(model)
        with torchrun_ranks(run.device) as ranks:
            if not run.export_only:
                towers = _open(folder, ranks.device, config.shard)
                corpora = {
                    name: open_corpus(place, towers.config, row_length, folder) for name, place in folders.items()
                }
                rows, measured = corpora["corpus"], corpora.get("held_out")
                weights = functools.partial(released_stream, folder) if config.shard else None
                objective = Denoising(towers, what)
                trainer = Trainer(objective, rows, config, out, ranks, held_out=measured, weights=weights)
                with reporting(trainer, run, settings) as report, stop_request(trainer) as request:
                    is_done = trainer.run(
                        report,
                        request.is_there,
                        begin=telling(trainer, what, out / "checkpoint"),
                        inputs=settings,
                        allow_changes=run.allow_changes,
                    )
                end_if_stopped(trainer, request, is_done=is_done)
            if ranks.rank == 0:
                _export(folder, out, as_dtype(run.dtype))


def _open(folder: Path, device: torch.device, shard: bool) -> TwoTower:
    """The model to train: whole, or without weights where each rank is to take only its shards of them."""
    return _without_weights(folder) if shard else open_model(folder, dtype="float32", device=str(device), pack=False)


def _without_weights(folder: Path) -> TwoTower:
    with torch.device("meta"):
        return TwoTower(read_config(folder))


def _export(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Writes the last state of a run that started from `folder`, with the block size that it was trained at last."""
    state = saved_state(out)
    progress = read_progress(state)
    what = denoising_config(state, progress["run"])
    with torch.device("meta"):
        objective = Denoising(_without_weights(folder), what)
    weights = functools.partial(released_stream, folder)
    check_changes(
        state, changes(state, progress["run"], progress["run"] | model_identity(objective, weights), progress["step"])
    )
    last = what.block_size(progress["step"] - 1, objective.model.config.block_size)
    config = dataclasses.replace(objective.model.config, block_size=last)
    tokenizer, documents = load_tokenizer(folder), carried_documents(folder)
    documents[TRAINING_FILE] = training_document(progress)

    def write(tensors: TensorStream, path: Path) -> None:
        save_rounded(TwoTower, config, tensors, path, dtype, tokenizer=tokenizer, documents=documents)

    for path in export_state(objective, state, out / "checkpoint", weights, write):
        print(f"try it with: twotower generate --model {path}")
