"""`twotower train`: train a denoiser tower and export the checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twotower.checkpoints.hf import save
from twotower.cli.options import Dtype, open_model, torch_dtype
from twotower.model.two_tower import TwoTower
from twotower.training.corruption import LevelPer
from twotower.training.data import Corpus
from twotower.training.objective import Reduction
from twotower.training.trainer import ContextTraining, StepReport, TrainConfig, Trainer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEFAULTS = TrainConfig(steps=1)


@app.command("train")
def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face id to start from.")],
    corpus: Annotated[Path, typer.Argument(help="Directory of shards that `tokenize` or `sample` wrote.")],
    out: Annotated[
        Path, typer.Argument(help="Directory for the state, metrics.jsonl and checkpoint/; a state in it is resumed.")
    ],
    steps: Annotated[int, typer.Option(help="Optimiser steps in all, 1 or more.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows per step, 1 or more.")] = _DEFAULTS.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate, above 0.")] = _DEFAULTS.learning_rate,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up, 0 or more.")] = _DEFAULTS.warmup_steps,
    decay_steps: Annotated[
        int, typer.Option(help="Last steps over which the rate falls to 0, 0 to --steps.")
    ] = _DEFAULTS.decay_steps,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, 0 or more.")] = _DEFAULTS.weight_decay,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm.")] = _DEFAULTS.max_grad_norm,
    micro_batch_size: Annotated[
        int, typer.Option(help="Rows computed at a time, 0 for all of a step's; changes memory, not the gradient.")
    ] = _DEFAULTS.micro_batch_size,
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
        bool, typer.Option("--complementary", help="Also train on each row with the other positions masked.")
    ] = False,
    context: Annotated[
        ContextTraining,
        typer.Option(help="Keep the context tower as it is, train it too, or train one tower that is both."),
    ] = _DEFAULTS.context,
    ar_weight: Annotated[
        float, typer.Option(help="Weight of the context tower's next-token loss, where --context is not frozen.")
    ] = _DEFAULTS.ar_weight,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute layers again in backward: less memory, more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Decides the rows and masks of every step.")] = _DEFAULTS.seed,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between two saved states, 1 or more.")
    ] = _DEFAULTS.checkpoint_every,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the loss; needs a C++ compiler.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Type of the exported weights.")] = "bfloat16",
    export_only: Annotated[
        bool, typer.Option("--export-only", help="Export the saved state without training.")
    ] = False,
) -> None:
    """Train the denoiser tower of MODEL on CORPUS, then write the whole checkpoint to OUT/checkpoint."""
    if export_only and not (out / "state.pt").exists():
        raise FileNotFoundError(f"{out} has no state.pt to export; train without --export-only first")
    config = TrainConfig(
        # a saved state is at step 1 or later: the trainer loads it and has nothing left to do
        steps=1 if export_only else steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=0 if export_only else decay_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        micro_batch_size=micro_batch_size,
        reduction=reduction,
        level_per=level_per,
        full_mask_fraction=full_mask_fraction,
        later_weight=later_weight,
        complementary=complementary,
        context=context,
        ar_weight=ar_weight,
        recompute=recompute,
        seed=seed,
        checkpoint_every=checkpoint_every,
        compile=compile,
    )
    opened = open_model(model, dtype="float32", pack=False)
    trainer = Trainer(opened, Corpus(corpus, vocab_size=opened.config.vocab_size), config, out)
    with _reporting(config.steps) as report:
        trainer.run(report)
    export(opened, out / "checkpoint", torch_dtype(dtype))
    print(
        f"step {trainer.step}: wrote {out / 'checkpoint'}; try it with: twotower generate --model {out / 'checkpoint'}"
    )


def export(model: TwoTower, path: Path, dtype: torch.dtype) -> None:
    """Writes a float32 model as a checkpoint of `dtype`; the parts that no model rounds stay float32."""
    copy = TwoTower(model.config, dtype=dtype)
    exact = model.released_tensors()
    for name, tensor in copy.released_tensors().items():
        tensor.copy_(exact[name])
    save(copy, path, tokenizer=model.tokenizer)


@contextmanager
def _reporting(steps: int) -> Iterator[Callable[[StepReport], None]]:
    """A progress bar on stderr where that is a terminal, else a line there every 50 steps."""
    console = Console(stderr=True)
    columns = (
        TextColumn("Training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps, numbers="")
        started = False

        def report(done: StepReport) -> None:
            nonlocal started
            if not started:  # the steps of an earlier run say nothing about the time left
                progress.reset(task, total=steps, completed=done.step - 1)
                started = True
            progress.update(task, completed=done.step, numbers=_numbers(done))
            if not console.is_terminal and (done.step % 50 == 0 or done.step == steps):
                console.print(f"step {done.step} of {steps}: {_numbers(done)}", soft_wrap=True, highlight=False)

        yield report


def _numbers(done: StepReport) -> str:
    return f"loss {done.loss:.3f}, rate {done.learning_rate:.1e}, {done.tokens_per_second:,.0f} tokens/s"
