"""The objective of pretraining one tower: predict the next token.

Letters: b batch, t tokens, l `E` layers, e experts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower.model.moe import MixtureOfExperts
from twotower.model.one_tower import OneTower
from twotower.training.config import NextTokenConfig
from twotower.training.corpus.shards import Corpus, CorpusBatch
from twotower.training.forward.causal_parallel import Causal, causal_hidden
from twotower.training.forward.layout import Layout, make_layout
from twotower.training.forward.seeded_mixers import CHUNK_SIZE
from twotower.training.objectives.protocol import LossPart, Measured
from twotower.training.objectives.sums import next_token_targets, token_losses
from twotower.training.run.compiling import compiled
from twotower.training.run.ranks import Ranks

# How far one step moves an expert's bias: the rate of arXiv 2408.15664.
BALANCE_RATE = 1e-3


class TextRows(NamedTuple):
    """This rank's rows of a step: tokens x0 (b, t), the token after each (b, t), which of these are learnt (b, t) bool,
    and where documents lie; the denominator is the number of tokens learnt."""

    x0: Tensor
    following: Tensor
    counts: Tensor
    layout: Layout
    denominators: tuple[float]


class NextToken(nn.Module):
    """The mean cross-entropy of the next token over the scored tokens, with experts kept in balance. An `Objective`."""

    def __init__(self, model: OneTower, config: NextTokenConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.hidden: Callable[..., Causal] = compiled(causal_hidden) if config.compile else causal_hidden

    def layer_groups(self) -> list[list[nn.Module]]:
        """Each layer by itself."""
        return [[layer] for layer in self.model.tower.stack]

    def prepare(self, batch: CorpusBatch, step: int, seed: int, device: torch.device) -> TextRows:
        """Moves a rank's rows to its device; nothing is random."""
        document = batch.document.to(device)
        x0, scored = batch.ids.to(device), batch.scored.to(device)
        scored = scored & (x0 != self.model.config.mask_token_id)  # no tower gives it any probability
        following, counts = next_token_targets(x0, scored, document)
        # One tower attends to no blocks, so any block size gives the same layout of documents.
        return TextRows(x0, following, counts, make_layout(document, CHUNK_SIZE), (float(counts.sum()),))

    def forward(self, rows: TextRows, part: slice, denominators: Sequence[float]) -> LossPart:
        """Σ cross-entropy of the rows in `part`, divided by the step's number of learnt tokens."""
        layout = Layout(rows.layout.block[part], rows.layout.document[part])
        hidden, loads = self.hidden(self.model.tower, rows.x0[part], layout, recompute=self.config.recompute)
        counts = rows.counts[part]
        found = token_losses(self.model.lm_head, hidden[counts], rows.following[part][counts])
        return LossPart(found["cross_entropy"].sum() / max(denominators[0], 1), loads)

    @torch.no_grad()
    def after_update_(self, loads: Tensor | None) -> None:
        """Raises the bias by which an expert is chosen if it got less than the mean of the step's tokens, loads (l, e),
        and lowers it if it got more, by a fixed amount: balance without a loss for it (arXiv 2408.15664)."""
        assert loads is not None
        mixers = [m for m in self.model.modules() if isinstance(m, MixtureOfExperts)]
        for mixer, load in zip(mixers, loads, strict=True):
            mixer.correction_bias.add_((load.mean() - load).sign().to(mixer.correction_bias), alpha=BALANCE_RATE)

    @torch.no_grad()
    def measure(self, batch: CorpusBatch, step: int, device: torch.device) -> dict[str, Measured]:
        """The negative log-likelihood of held-out rows, as `ar`."""
        rows = self.prepare(batch, step, 0, device)
        (count,) = rows.denominators
        loss = self(rows, slice(None), (count,)).loss
        return {"ar": Measured(loss.item() * max(count, 1), count)}

    def decode(self, held_out: Corpus, step: int, ranks: Ranks) -> dict[str, float]:
        """Nothing: block decoding needs two towers."""
        return {}
