"""Training a denoiser in one call, in this process."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from twotower.model.two_tower import TwoTower
from twotower.training.config import DenoisingConfig, TrainConfig
from twotower.training.corpus.shards import Corpus
from twotower.training.objectives.denoising import Denoising
from twotower.training.run.lock import locked
from twotower.training.run.room import check_room
from twotower.training.run.trainer import Start, StepReport, Trainer


def train(
    model: TwoTower,
    corpus: str | Path,
    out: str | Path,
    config: TrainConfig | None = None,
    denoising: DenoisingConfig | None = None,
    *,
    held_out: str | Path | None = None,
    report: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
    allow_changes: bool = False,
) -> None:
    """Trains the denoiser of `model`, in place, on the rows of a corpus, as `twotower train` does.

    Load the model with `twotower.load(path, dtype="float32", pack=False)`, and write it with `twotower.save`. `corpus`
    and `held_out` are folders of shards that `twotower tokenize` or `twotower sample` made for this model's tokenizer.
    `out` keeps metrics.jsonl and the last saved state: a call with the same arguments resumes from it, and more
    `config.steps` go on with it. Other settings that decide what is learnt are refused unless
    `allow_changes`. None for `config` or `denoising` means their defaults. `report` is called after every
    step; rows of `held_out` are measured every `config.evaluate_every` steps. `stop` is asked
    after every step: once it is true, the state of that step is saved and the call returns.

    Raises SettingError for a setting that is not allowed, and ValueError or FileNotFoundError, with what to change, for
    a model that can't be trained, a corpus that can't be read, or an `out` that belongs to another run or that another
    call is writing to.
    """
    model.released_tensors()  # raises ValueError for a packed model
    dtype = model.denoiser_tower.embeddings.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the model is held in {dtype}, must be float32 to learn in small steps; load it with dtype='float32', and "
            "set bf16 to compute in bfloat16"
        )
    size, tokenizer = model.config.vocab_size, model.tokenizer
    rows = Corpus(corpus, vocab_size=size, tokenizer=tokenizer)
    measured = None if held_out is None else Corpus(held_out, vocab_size=size, tokenizer=tokenizer)
    objective = Denoising(model, denoising or DenoisingConfig())
    trainer = Trainer(objective, rows, config or TrainConfig(), out, held_out=measured)

    def begin(start: Start) -> None:
        _warn(start, trainer.config.steps)
        if start.step < trainer.config.steps:
            check_room(model.config, trainer.config, objective.config, trainer.ranks, row_length=rows.length)

    with locked(Path(out)):
        trainer.run(
            report or (lambda done: None),
            stop or (lambda: False),
            begin=begin,
            inputs={"corpus": str(corpus), "held_out": None if held_out is None else str(held_out)},
            allow_changes=allow_changes,
        )


def _warn(start: Start, steps: int) -> None:
    """Warns of what is other than in the saved state, and of a run that has nothing left to do."""
    for note in start.notes:
        warnings.warn(f"going on from {start.state}: {note}", stacklevel=4)
    if start.step >= steps:
        warnings.warn(f"{start.state} has all of {steps} steps: nothing is left to train", stacklevel=4)
