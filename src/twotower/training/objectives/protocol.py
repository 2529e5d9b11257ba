"""What the trainer knows of an objective: which weights it trains, its loss over rows of a corpus, how it is measured.

Letters: b batch, t tokens, l `E` layers, e experts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from twotower.model.one_tower import OneTower
from twotower.model.two_tower import TwoTower
from twotower.training.corpus.shards import Corpus, CorpusBatch
from twotower.training.run.ranks import Ranks


class LossPart(NamedTuple):
    """What a micro-batch adds to a step: its share of the loss, a differentiable scalar, and how many tokens each
    expert of each `E` layer got (l, e), or None where experts are not to be balanced."""

    loss: Tensor
    loads: Tensor | None


class Measured(NamedTuple):
    """A sum of negative log-likelihoods in nats, and the number of tokens it is over."""

    nats: float
    tokens: float


class StepRows(Protocol):
    """A rank's rows of a step, as the objective prepared them; what they hold is the objective's own business."""

    @property
    def denominators(self) -> tuple[float, ...]:
        """What the step's sums are divided by. The trainer adds these up over all ranks, so that the step's loss is a
        mean over all rows and does not depend on how they are spread over ranks and micro-batches."""


class ObjectiveConfig(Protocol):
    """An objective's settings, a frozen dataclass. They are kept with a run's saved states, and a run with other
    settings is refused when it would resume from them."""

    @property
    def compile(self) -> bool:
        """Whether the training pass is compiled, which sharded weights do not allow."""


Rows = TypeVar("Rows", bound=StepRows)


class Objective(Protocol[Rows]):
    """What is learnt. An objective is an `nn.Module` with the members below, and all of its parameters that require a
    gradient are trained; `next_token.NextToken` is the shortest example.

    Each step calls `prepare` once, the objective itself once per micro-batch, each followed by a backward pass, and
    `after_update_` once, unless the step was skipped for a harmful loss.
    """

    @property
    def model(self) -> TwoTower | OneTower:
        """The model whose released tensors a checkpoint holds."""

    @property
    def config(self) -> ObjectiveConfig: ...

    def layer_groups(self) -> list[list[nn.Module]]:
        """The modules whose parameters are used together; sharded parameters are gathered one group at a time."""

    def prepare(self, batch: CorpusBatch, step: int, seed: int, device: torch.device) -> Rows:
        """Moves this rank's rows of a 0-based step to `device` and draws what is random about them. It may depend on
        `seed`, `step`, `batch.samples` and the weights alone, so that neither resuming nor the number of ranks changes
        it but, through the weights, by rounding."""

    def __call__(self, rows: Rows, part: slice, denominators: Sequence[float]) -> LossPart:
        """The share that the rows in `part` have in the step's loss. `denominators` are those of `prepare`, added up
        over all ranks."""

    def after_update_(self, loads: Tensor | None) -> None:
        """Called after the optimiser's update, with the sum of the step's `LossPart.loads` over all ranks."""

    def measure(self, batch: CorpusBatch, step: int, device: torch.device) -> dict[str, Measured]:
        """The negative log-likelihood of held-out rows, by name; changes nothing and is the same at every call."""

    def decode(self, held_out: Corpus, step: int, ranks: Ranks) -> dict[str, float]:
        """What decoding answers to the questions of held-out rows gives, by name; empty where there is nothing to
        decode. Called on every rank, and never for a sharded model."""

    # These are nn.Module's own.
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
