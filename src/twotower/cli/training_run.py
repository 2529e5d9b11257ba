"""What `train` and `pretrain` share: options, ranks, progress, and writing the result."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twotower.checkpoints.hf import load_tokenizer
from twotower.cli.logs import logging_to
from twotower.cli.options import Dtype, open_device
from twotower.config import TwoTowerConfig
from twotower.errors import SettingError
from twotower.options import check_options, option
from twotower.training.config import DenoisingConfig, NextTokenConfig, TrainConfig
from twotower.training.corpus.row_length import check_row_length
from twotower.training.corpus.shards import Corpus, is_corpus
from twotower.training.objectives.protocol import Objective
from twotower.training.run.checkpointing import check_tensors, latest_state, stored_groups
from twotower.training.run.estimate import estimate, lines
from twotower.training.run.identity import all_settings
from twotower.training.run.ranks import Ranks, joined
from twotower.training.run.record import trained_step
from twotower.training.run.room import check_room
from twotower.training.run.trainer import Start, StepReport, Trainer, trained_parameters
from twotower.training.run.weights import TensorStream, trained_tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run computes, what it writes and logs, and whether it only estimates or exports."""

    device: str = option("cpu", "Where the model is: cpu, cuda, cuda:N or mps.")
    dtype: Dtype = option("bfloat16", "Type of the exported weights.")
    export_only: bool = option(
        False, "Write the last saved state, with its own settings, as a checkpoint without training."
    )
    tensorboard: bool = option(False, "Also write OUT/tensorboard; needs the package tensorboard.")
    wandb: str | None = option(None, "Also log to this W&B project; needs the package wandb.", shown_default="none")
    num_ranks: int = option(1, "Ranks that --dry-run counts with.", least=1)
    allow_changes: bool = option(
        False,
        "Go on from a saved state although settings that decide what is learnt, such as the learning rate, the batch "
        "size or the corpus, are others than it was trained with.",
    )
    dry_run: bool = option(False, "Print parameters, tokens, FLOPs and memory, and do nothing.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.dry_run and self.export_only:
            raise SettingError("export_only", True, "left out with dry_run, which writes nothing", "drop one of them")


def num_processes() -> int:
    """The number of processes that torchrun started, as its environment variables say; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_rank() -> int:
    """The number of this process among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def torchrun_ranks(device: str) -> Iterator[Ranks]:
    """Joins the ranks that torchrun started, each on its own GPU where `device` is cuda; without it this process is the
    only rank."""
    size = num_processes()
    if size == 1:
        yield Ranks(device=open_device(device))
        return
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    with joined(own_rank(), size, open_device(own)) as ranks:
        yield ranks


def open_corpus(folder: Path, config: TwoTowerConfig, row_length: int | None, model: Path | None = None) -> Corpus:
    """Opens a corpus whose rows must be of `row_length`, if given, and of the vocabulary of the checkpoint in the
    folder `model`, if given and if it has a tokenizer."""
    tokenizer = None if model is None else load_tokenizer(model)
    corpus = Corpus(folder, vocab_size=config.vocab_size, tokenizer=tokenizer)
    if row_length not in (None, corpus.length):
        raise SettingError("row_length", row_length, f"{corpus.length}, the length of the rows in {folder}")
    return corpus


def print_estimate(
    config: TwoTowerConfig,
    run: TrainConfig,
    what: DenoisingConfig | NextTokenConfig,
    corpus: Path,
    *,
    row_length: int | None,
    num_ranks: int,
) -> None:
    """Prints what a run needs. Raises ValueError where neither a corpus nor `row_length` says how long rows are,
    and SettingError where they are longer than the run may have."""
    if is_corpus(corpus):
        row_length = open_corpus(corpus, config, row_length).length
    if row_length is None:
        raise ValueError(f"{corpus} is not there to tell how long its rows are; give --row-length")
    check_row_length("row_length", row_length, config, run.past_positions)
    Ranks(size=num_ranks).share(run.batch_size)
    found = estimate(config, run, what, row_length=row_length, num_ranks=num_ranks)
    print("\n".join(lines(found, what, config.block_size, num_ranks)))


def saved_state(out: Path) -> Path:
    """The last saved state of a run. Raises FileNotFoundError without one."""
    state = latest_state(out)
    if state is None:
        raise FileNotFoundError(f"{out} has no saved state to export; train without --export-only first")
    return state


def check_finished(checkpoint: Path, out: Path) -> None:
    """Raises FileExistsError where training would end by replacing a checkpoint that `out` has no state of."""
    if (checkpoint / "config.json").exists() and latest_state(out) is None:
        raise FileExistsError(
            f"{checkpoint} is a finished checkpoint, and {out} has no saved state that training could go on from; move "
            "it away, or give another OUT"
        )


def telling(trainer: Trainer, what: DenoisingConfig | NextTokenConfig, checkpoint: Path) -> Callable[[Start], None]:
    """A function that says on stderr what a run goes on from, what is other than it was, and what it will do, and that
    raises SettingError where memory has no room for it."""

    def tell(start: Start) -> None:
        if start.step < trainer.config.steps:
            shapes, length = trainer.objective.model.config, trainer.corpus.length
            check_room(shapes, trainer.config, what, trainer.ranks, row_length=length)
        if trainer.ranks.rank > 0:
            return
        console, steps = Console(stderr=True), trainer.config.steps
        left = max(steps - start.step, 0)
        told = f"beginning: {trainer.folder} has no saved state"
        if start.state is not None:
            told = f"going on from {start.state}: {start.step:,} steps and {start.tokens:,} tokens are done"
        if start.loss is not None:
            told += f", loss {start.loss:.3f} at last"
        tokens = left * trainer.config.batch_size * trainer.corpus.length
        plan = f"{left:,} steps, {tokens:,} tokens, to go" if left else f"nothing is left to train of {steps:,} steps"
        lines = [f"{told}; {plan}", *(f"  {note}" for note in start.notes)]
        if left and (checkpoint / "config.json").exists():
            lines.append(f"  {_named(checkpoint)} will be replaced at the end")
        console.print("\n".join(lines), soft_wrap=True, highlight=False)

    return tell


def _named(checkpoint: Path) -> str:
    """A checkpoint and, where its training.json says it, its step."""
    step = trained_step(checkpoint)
    return str(checkpoint) if step is None else f"{checkpoint} (step {step:,})"


def export_state(
    objective: Objective[Any],
    state: Path,
    out: Path,
    released: Callable[[], TensorStream],
    write: Callable[[TensorStream, Path], None],
) -> list[Path]:
    """Writes a state as the checkpoint `out`, and its running mean, if it has one, beside it; returns their folders.
    Prints what was written, and what it replaced.

    `objective` is on the meta device, `released` streams the tensors of the model that the run started from, and
    `write` takes those of the trained one, of which only a few are in memory, and a folder.
    """
    written = []
    for group, folder in (("weights", out), ("ema", out.with_name(f"{out.name}-ema"))):
        if group in stored_groups(state):
            check_tensors(state, {group: trained_parameters(objective)})
            replaced = f" in place of {_named(folder)}" if (folder / "config.json").exists() else ""
            write(trained_tensors(objective, state, group, released()), folder)
            print(f"wrote {folder} from {state.name}{replaced}")
            written.append(folder)
    return written


@contextmanager
def reporting(
    trainer: Trainer, options: RunOptions, settings: dict[str, Any]
) -> Iterator[Callable[[StepReport], None]]:
    """Yields a function that shows a step's report on stderr, as a progress bar in a terminal and else as a line every
    50 steps, and logs it; on ranks other than 0 it does nothing. `settings` and the trainer's own describe the run in
    the logs."""
    if trainer.ranks.rank > 0:
        yield lambda done: None
        return
    described = {**settings, **dataclasses.asdict(trainer.config), **all_settings(trainer.objective.config)}
    described = {name: value for name, value in described.items() if value is not None}
    with (
        logging_to(trainer.folder, tensorboard=options.tensorboard, wandb=options.wandb, settings=described) as log,
        _showing(trainer.config.steps) as show,
    ):

        def report(done: StepReport) -> None:
            log(done)
            show(done)

        yield report


@contextmanager
def _showing(steps: int) -> Iterator[Callable[[StepReport], None]]:
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

        def show(done: StepReport) -> None:
            nonlocal started
            if not started:  # the steps of an earlier run say nothing about the time left
                progress.reset(task, total=steps, completed=done.step - 1)
                started = True
            progress.update(task, completed=done.step, numbers=_numbers(done))
            notable = done.step % 50 == 0 or done.step == steps or done.fault is not None or done.held_out is not None
            if not console.is_terminal and notable:
                console.print(f"step {done.step} of {steps}: {_numbers(done)}", soft_wrap=True, highlight=False)

        yield show


def _numbers(done: StepReport) -> str:
    skipped = "" if done.fault is None else f", skipped ({done.fault})"
    skipped += "".join(f", held-out {name} {value:.3f}" for name, value in (done.held_out or {}).items())
    skipped += f", {done.num_skipped} skipped so far" if done.num_skipped else ""
    return f"loss {done.loss:.3f}, rate {done.learning_rate:.1e}, {done.tokens_per_second:,.0f} tokens/s{skipped}"
