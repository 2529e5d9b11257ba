"""What a backbone learns at a step. Letters: b batch, t tokens, l `E` layers, e experts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower.model.moe import MixtureOfExperts
from twotower.model.one_tower import OneTower
from twotower.training.corpus.shards import RowBatch
from twotower.training.forward.block_parallel import CHUNK_SIZE
from twotower.training.forward.causal_parallel import Causal, causal_hidden
from twotower.training.forward.layout import Layout, make_layout
from twotower.training.held_out import Measured
from twotower.training.losses import LossPart, next_token_targets, token_sums
from twotower.training.run.compiling import compiled

BALANCE_RATE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """How the loss is computed; `recompute` is explained at `causal_hidden`."""

    recompute: bool = False
    compile: bool = False


class TextRows(NamedTuple):
    """This rank's rows of a step: x0 (b, t), their next tokens and which of them count (b, t), and the documents."""

    x0: Tensor
    following: Tensor
    counts: Tensor
    layout: Layout
    denominators: tuple[float, ...]


class NextToken(nn.Module):
    """The mean cross-entropy of the next token, over the scored ones, with experts kept in balance."""

    def __init__(self, model: OneTower, config: NextTokenConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.hidden: Callable[..., Causal] = compiled(causal_hidden) if config.compile else causal_hidden

    def layer_groups(self) -> list[list[nn.Module]]:
        """One layer at a time."""
        return [[layer] for layer in self.model.tower.stack]

    def prepare(self, batch: RowBatch, step: int, seed: int, device: torch.device) -> TextRows:
        """A rank's rows on its device; nothing is random."""
        document = batch.document.to(device)
        x0, scored = batch.ids.to(device), batch.scored.to(device)
        following, counts = next_token_targets(x0, scored, document)
        return TextRows(x0, following, counts, make_layout(document, CHUNK_SIZE), (float(counts.sum()),))

    @torch.no_grad()
    def measure(self, batch: RowBatch, step: int, device: torch.device) -> dict[str, Measured]:
        """The negative log-likelihood of held-out rows."""
        rows = self.prepare(batch, step, 0, device)
        (count,) = rows.denominators
        loss = self(rows, slice(None), (count,)).loss
        return {"ar": Measured(loss.item() * max(count, 1), count)}

    @torch.no_grad()
    def balance_(self, loads: Tensor) -> None:
        """Moves each expert's bias, by which it is chosen, towards an equal share of a step's tokens, loads (l, e).

        Balance without a loss for it (arXiv 2408.15664): by a fixed amount up for less, down for more than the mean.
        """
        mixers = [m for m in self.model.modules() if isinstance(m, MixtureOfExperts)]
        for mixer, load in zip(mixers, loads, strict=True):
            mixer.correction_bias.add_((load.mean() - load).sign().to(mixer.correction_bias), alpha=BALANCE_RATE)

    def forward(self, rows: TextRows, part: slice, denominators: Sequence[float]) -> LossPart:
        """What some of the rows add to the step, whose `denominators` are all ranks' together."""
        layout = Layout(rows.layout.block[part], rows.layout.document[part])
        hidden, loads = self.hidden(self.model.tower, rows.x0[part], layout, recompute=self.config.recompute)
        counts = rows.counts[part]
        sums = token_sums(self.model.lm_head, hidden[counts], rows.following[part][counts], None)
        return LossPart(sums.hard / max(denominators[0], 1), loads)
