"""`twotower train`: train a denoiser tower and export the checkpoint."""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer

from twotower.checkpoints.hf import read_config, resolve, save
from twotower.cli.logs import TensorBoardOption, WandbOption
from twotower.cli.options import DeviceOption, Dtype, open_model, torch_dtype
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
    HeldOutOption,
    LearningRateOption,
    MaxGradNormOption,
    MicroBatchSizeOption,
    NumRanksOption,
    RecomputeOption,
    RowLengthOption,
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
    torchrun_ranks,
)
from twotower.model.two_tower import TwoTower
from twotower.training.corruption import LevelPer
from twotower.training.denoising import ContextTraining, Denoising, DenoisingConfig, Phase
from twotower.training.objective import Reduction
from twotower.training.trainer import TrainConfig, Trainer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEFAULTS = DenoisingConfig()


@app.command("train")
def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face id to start from.")],
    corpus: Annotated[Path, typer.Argument(help="Directory of shards that `tokenize` or `sample` wrote.")],
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
            "--complementary/--no-complementary", help="Also train on each row with the other positions masked."
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
    held_out: HeldOutOption = None,
    evaluate_every: EvaluateEveryOption = DEFAULTS.evaluate_every,
    device: DeviceOption = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Type of the exported weights.")] = "bfloat16",
    export_only: ExportOnlyOption = False,
    tensorboard: TensorBoardOption = False,
    wandb: WandbOption = None,
    row_length: RowLengthOption = None,
    num_ranks: NumRanksOption = 1,
    dry_run: DryRunOption = False,
    recipe: RecipeOption = None,
) -> None:
    """Train the denoiser tower of MODEL on CORPUS, then write the whole checkpoint to OUT/checkpoint.

    Under torchrun (torchrun --nproc-per-node 8 -m twotower train …) every process takes its share of each step's rows;
    but for rounding the result doesn't depend on their number.
    """
    given = dict(locals())
    config = TrainConfig(**{f.name: given[f.name] for f in dataclasses.fields(TrainConfig)})
    what = DenoisingConfig(
        **{f.name: given[f.name] for f in dataclasses.fields(DenoisingConfig)} | {"phases": _phases(phases)}
    )
    if dry_run:
        towers = read_config(resolve(model))
        print_estimate(towers, config, what, corpus, row_length=row_length, num_ranks=num_ranks)
        return
    with torchrun_ranks(device) as ranks:
        if not export_only:
            opened = open_model(model, dtype="float32", device=str(ranks.device), pack=False)
            rows = open_corpus(corpus, opened.config.vocab_size, row_length)
            measured = None if held_out is None else open_corpus(held_out, opened.config.vocab_size, row_length)
            trainer = Trainer(Denoising(opened, what), rows, config, out, ranks, held_out=measured)
            with reporting(trainer, tensorboard=tensorboard, wandb=wandb, settings=given) as report:
                trainer.run(report)
        if ranks.rank == 0:
            _export(model, out, what, torch_dtype(dtype))


def _export(model: str, out: Path, what: DenoisingConfig, dtype: torch.dtype) -> None:
    opened = open_model(model, dtype="float32", pack=False)
    objective = Denoising(opened, what)
    last = what.block_size(10**18, opened.config.block_size)
    opened.config = dataclasses.replace(opened.config, block_size=last)
    for folder in export_state(objective, out, lambda path: export(opened, path, dtype)):
        print(f"wrote {folder}; try it with: twotower generate --model {folder}")


def export(model: TwoTower, path: Path, dtype: torch.dtype) -> None:
    """Writes a float32 model as a checkpoint of `dtype`; the parts that no model rounds stay float32."""
    copy = TwoTower(model.config, dtype=dtype)
    exact = model.released_tensors()
    for name, tensor in copy.released_tensors().items():
        tensor.copy_(exact[name])
    save(copy, path, tokenizer=model.tokenizer)


def _phases(text: str) -> tuple[Phase, ...]:
    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        return tuple(Phase(int(start), int(size)) for start, size in pairs)
    except ValueError as error:
        raise ValueError(f"phases are {text!r}, must be steps and block sizes such as 0:32,2000:16") from error
