"""`twotower pretrain`: train a backbone of any pattern from nothing."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

import torch
import typer

from twotower.checkpoints.families.nemotron_h import save_backbone
from twotower.checkpoints.hf import carried_documents, load_tokenizer, read_config, resolve
from twotower.cli.logs import TensorBoardOption, WandbOption
from twotower.cli.options import DeviceOption, Dtype, torch_dtype
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
    open_corpus,
    print_estimate,
    reporting,
    saved_state,
    torchrun_ranks,
)
from twotower.config import TwoTowerConfig
from twotower.model.one_tower import OneTower
from twotower.training.next_token import NextToken, NextTokenConfig
from twotower.training.run.checkpointing import read_progress
from twotower.training.run.identity import check_same, config_identity
from twotower.training.run.trainer import TrainConfig, Trainer
from twotower.training.run.weights import TensorStream

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("pretrain")
def command(
    config: Annotated[
        str, typer.Argument(help="Directory with the backbone's config.json and, to go on with it, its tokenizer.json.")
    ],
    corpus: Annotated[Path, typer.Argument(help="Directory of shards that `tokenize CONFIG` wrote.")],
    out: Annotated[
        Path, typer.Argument(help="Directory for state/, metrics.jsonl and backbone/; a state in it is resumed.")
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
        Path | None,
        typer.Option(
            help="Corpus to measure, all of it, in nats per token; with the weights' running mean too.",
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
            help="Tokens that CORPUS's rows must have; for a dry run before there is a corpus.", show_default="any"
        ),
    ] = None,
    num_ranks: NumRanksOption = 1,
    dry_run: DryRunOption = False,
    recipe: RecipeOption = None,
) -> None:
    """Train one tower on the next tokens of CORPUS, then write it to OUT/backbone for `twotower init`.

    CONFIG's config.json says what it is made of, as that of a Nemotron-H model does; --seed also decides its first
    weights. Under torchrun every process takes its share of each step's rows.
    """
    given = dict(locals())
    run = TrainConfig(**{f.name: given[f.name] for f in dataclasses.fields(TrainConfig)})
    what = NextTokenConfig(recompute=recompute, compile=compile)
    folder = resolve(config)
    shapes = read_config(folder)
    if dry_run:
        print_estimate(shapes, run, what, corpus, row_length=row_length, num_ranks=num_ranks)
        return
    with torchrun_ranks(device) as ranks:
        if not export_only:
            rows = open_corpus(corpus, shapes.vocab_size, row_length)
            measured = None if held_out is None else open_corpus(held_out, shapes.vocab_size, row_length)
            model = _open(shapes, seed, ranks.device, shard)
            weights = functools.partial(_without_weights(shapes).initial_tensors, seed) if shard else None
            trainer = Trainer(NextToken(model, what), rows, run, out, ranks, held_out=measured, weights=weights)
            with reporting(trainer, tensorboard=tensorboard, wandb=wandb, settings=given) as report:
                trainer.run(report)
        if ranks.rank == 0:
            _export(folder, out, torch_dtype(dtype))


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
    model = _without_weights(read_config(folder))
    state = saved_state(out)
    progress = read_progress(state)
    check_same(state, progress["run"], progress["run"] | config_identity(model.config), progress["step"])
    tokenizer, documents = load_tokenizer(folder), carried_documents(folder)

    def write(tensors: TensorStream, path: Path) -> None:
        save_backbone(model.config, tensors, path, dtype, tokenizer=tokenizer, documents=documents)

    # All of it is trained: of what it started from only the names matter
    released = model.released_tensors()
    objective = NextToken(model, NextTokenConfig())
    for path in export_state(objective, state, out / "backbone", lambda: iter(released.items()), write):
        print(f"wrote {path}; give it a denoiser with: twotower init {path} START")
