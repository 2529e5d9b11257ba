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
from twotower.cli.logs import TensorBoardOption, WandbOption
from twotower.cli.options import DeviceOption, Dtype, check_out, open_device, open_model, torch_dtype
from twotower.cli.prepare import prepare, towers_config
from twotower.cli.recipe import RecipeOption
from twotower.cli.training import (
    DEFAULTS,
    BatchSizeOption,
    Bf16Option,
    CheckpointEveryOption,
    CompileOption,
    DecayStepsOption,
    DryRunOption,
    EmaDecayOption,
    EvaluateEveryOption,
    ExportOnlyOption,
    FinalLearningRateOption,
    LearningRateOption,
    MaxGradNormOption,
    MicroBatchSizeOption,
    NumRanksOption,
    RecomputeOption,
    SeedOption,
    ShardOption,
    SkipLimitOption,
    SpikeFactorOption,
    StepsOption,
    WarmupStepsOption,
    WeightDecayOption,
    export_state,
    num_processes,
    open_corpus,
    print_estimate,
    reporting,
    saved_state,
    torchrun_ranks,
)
from twotower.model.two_tower import TwoTower
from twotower.training.corpus.shards import is_corpus
from twotower.training.corpus.text import TextConfig
from twotower.training.corruption import LevelPer
from twotower.training.denoising import ContextTraining, Denoising, DenoisingConfig, Phase
from twotower.training.losses import Reduction
from twotower.training.run.checkpointing import read_progress
from twotower.training.run.identity import check_same, denoising_config, model_identity
from twotower.training.run.trainer import TrainConfig, Trainer, check_run
from twotower.training.run.weights import TensorStream

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEFAULTS = DenoisingConfig()


@app.command("train")
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
    steps: StepsOption = DEFAULTS.steps,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    learning_rate: LearningRateOption = DEFAULTS.learning_rate,
    final_learning_rate: FinalLearningRateOption = DEFAULTS.final_learning_rate,
    warmup_steps: WarmupStepsOption = DEFAULTS.warmup_steps,
    decay_steps: DecayStepsOption = DEFAULTS.decay_steps,
    weight_decay: WeightDecayOption = DEFAULTS.weight_decay,
    max_grad_norm: MaxGradNormOption = DEFAULTS.max_grad_norm,
    micro_batch_size: MicroBatchSizeOption = DEFAULTS.micro_batch_size,
    reduction: Annotated[
        Reduction,
        typer.Option(
            help="Mean over the step's masked positions, mean of each row's mean, or the likelihood bound in nats per "
            "token, for which --full-mask-fraction and --later-weight must be 0."
        ),
    ] = _DEFAULTS.reduction,
    level_per: Annotated[
        LevelPer, typer.Option(help="Draw the noise level once per block or once per row.")
    ] = _DEFAULTS.level_per,
    full_mask_fraction: Annotated[
        float, typer.Option(help="Blocks that are wholly masked, 0 to 1.")
    ] = _DEFAULTS.full_mask_fraction,
    later_weight: Annotated[
        float, typer.Option(help="Mask later positions of a block more often, by exp(this x (1 - level) x place).")
    ] = _DEFAULTS.later_weight,
    complementary: Annotated[
        bool,
        typer.Option(
            "--complementary/--no-complementary",
            help="Also train on each row with the other positions masked; --later-weight must be 0.",
        ),
    ] = False,
    phases: Annotated[
        str,
        typer.Option(
            help="Block sizes with the step from which each holds, such as 0:32,2000:16.",
            show_default="the checkpoint's, throughout",
        ),
    ] = "",
    distil_weight: Annotated[
        float,
        typer.Option(help="Weight of the divergence from the context tower's own distribution of each masked token."),
    ] = _DEFAULTS.distil_weight,
    context: Annotated[
        ContextTraining,
        typer.Option(help="Keep the context tower as it is, train it too, or train one tower that is both."),
    ] = _DEFAULTS.context,
    ar_weight: Annotated[
        float, typer.Option(help="Weight of the context tower's next-token loss, where --context is not frozen.")
    ] = _DEFAULTS.ar_weight,
    lora_rank: Annotated[
        int,
        typer.Option(help="Train additions of this rank to the denoiser's projections, not the weights; 0 trains all."),
    ] = _DEFAULTS.lora_rank,
    recompute: RecomputeOption = False,
    compile: CompileOption = False,
    ema_decay: EmaDecayOption = DEFAULTS.ema_decay,
    spike_factor: SpikeFactorOption = DEFAULTS.spike_factor,
    skip_limit: SkipLimitOption = DEFAULTS.skip_limit,
    bf16: Bf16Option = False,
    shard: ShardOption = False,
    seed: SeedOption = DEFAULTS.seed,
    checkpoint_every: CheckpointEveryOption = DEFAULTS.checkpoint_every,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Corpus to measure, shards or text: all of it in nats per token, and its first answers by decoding "
            "them, unless with --shard; with the weights' running mean too.",
            show_default="none",
        ),
    ] = None,
    evaluate_every: EvaluateEveryOption = DEFAULTS.evaluate_every,
    device: DeviceOption = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Type of the exported weights.")] = "bfloat16",
    export_only: ExportOnlyOption = False,
    tensorboard: TensorBoardOption = False,
    wandb: WandbOption = None,
    row_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a row: what shards must have, and text gets; for a dry run before there is a corpus.",
            show_default=f"the shards', {TextConfig().length} for text",
        ),
    ] = None,
    num_ranks: NumRanksOption = 1,
    dry_run: DryRunOption = False,
    recipe: RecipeOption = None,
) -> None:
    """Train the denoiser tower of MODEL on CORPUS, then write the whole checkpoint to OUT/checkpoint.

    From an autoregressive checkpoint and a folder of text to a two-tower checkpoint this is all there is to call.

    Under torchrun (torchrun --nproc-per-node 8 -m twotower train …) every process takes its share of each step's rows;
    but for rounding the result doesn't depend on their number.
    """
    given = dict(locals())
    config = TrainConfig(**{f.name: given[f.name] for f in dataclasses.fields(TrainConfig)})
    what = DenoisingConfig(
        **{f.name: given[f.name] for f in dataclasses.fields(DenoisingConfig)} | {"phases": _phases(phases)}
    )
    if dry_run:
        length = row_length if is_corpus(corpus) or not Path(corpus).exists() else row_length or TextConfig().length
        shapes = towers_config(model)
        print_estimate(shapes, config, what, Path(corpus), row_length=length, num_ranks=num_ranks)
        return
    sources = {"corpus": corpus} if held_out is None else {"corpus": corpus, "held_out": held_out}
    if export_only:
        saved_state(out)
        sources = {}
    else:  # before what may take hours
        open_device(device)
        check_run(config, what, num_processes(), has_held_out=held_out is not None)
    check_out(out)
    model, folders = prepare(model, sources, out, row_length)
    folder = resolve(model)
    with torchrun_ranks(device) as ranks:
        if not export_only:
            towers = _open(folder, ranks.device, shard)
            size = towers.config.vocab_size
            corpora = {name: open_corpus(place, size, row_length) for name, place in folders.items()}
            rows, measured = corpora["corpus"], corpora.get("held_out")
            weights = functools.partial(released_stream, folder) if shard else None
            objective = Denoising(towers, what)
            trainer = Trainer(objective, rows, config, out, ranks, held_out=measured, weights=weights)
            with reporting(trainer, tensorboard=tensorboard, wandb=wandb, settings=given) as report:
                trainer.run(report)
        if ranks.rank == 0:
            _export(folder, out, torch_dtype(dtype))


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
    check_same(state, progress["run"], progress["run"] | model_identity(objective, weights), progress["step"])
    last = what.block_size(progress["step"] - 1, objective.model.config.block_size)
    config = dataclasses.replace(objective.model.config, block_size=last)
    tokenizer, documents = load_tokenizer(folder), carried_documents(folder)

    def write(tensors: TensorStream, path: Path) -> None:
        save_rounded(config, tensors, path, dtype, tokenizer=tokenizer, documents=documents)

    for path in export_state(objective, state, out / "checkpoint", weights, write):
        print(f"wrote {path}; try it with: twotower generate --model {path}")


def _phases(text: str) -> tuple[Phase, ...]:
    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        return tuple(Phase(int(start), int(size)) for start, size in pairs)
    except ValueError as error:
        raise ValueError(f"phases are {text!r}, must be steps and block sizes such as 0:32,2000:16") from error
