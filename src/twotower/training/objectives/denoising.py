"""The objective of training a denoiser: predict the masked tokens of every block, given the clean text before it.

Letters: b batch, v views (noisy versions of one row), t tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower
from twotower.training.config import DenoisingConfig
from twotower.training.corpus.shards import Corpus, CorpusBatch
from twotower.training.forward.block_parallel import Hidden, block_parallel_hidden
from twotower.training.held_out import answer
from twotower.training.masks.mixing import with_states
from twotower.training.masks.noise import Corrupted, Noise, corrupt
from twotower.training.masks.trajectory import known_from
from twotower.training.objectives.protocol import LossPart, Measured
from twotower.training.objectives.sums import loss_sums, next_token_targets, weigh
from twotower.training.run.compiling import compiled
from twotower.training.run.low_rank import add_low_rank_
from twotower.training.run.ranks import Ranks

# The number of rows that decode at once to find out in which order.
_DECODED_ROWS = 8


class NoisyRows(NamedTuple):
    """This rank's rows of a step: clean tokens x0 (b, t), their noisy versions, and each position's weight in the loss
    (v, b, t). The denominators are the denoising loss's and the number of next tokens that `ar_weight` adds."""

    x0: Tensor
    noisy: Corrupted
    weight: Tensor
    denominators: tuple[float, float]


class Denoising(nn.Module):
    """The loss of a two-tower model's denoiser. An `Objective`.

    Makes the model ready for it: freezes what is not trained, ties the towers (`context="tied"`), adds low-rank
    weights (`lora_rank`).
    """

    def __init__(self, model: TwoTower, config: DenoisingConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        if config.context == "tied":
            if model.config.denoiser_layers is not None:
                rule = f"'frozen' or 'trained' for a denoiser of layers {list(model.config.denoiser_layers)}"
                raise SettingError("context", config.context, rule)
            model.context_tower, model.context_lm_head = model.denoiser_tower, model.lm_head
        model.requires_grad_(False)
        trained: list[nn.Module] = [model.time_conditioning]
        if config.lora_rank > 0:
            add_low_rank_(model.denoiser_tower, config.lora_rank)
        else:
            trained += [model.denoiser_tower, model.lm_head]
        if config.context != "frozen":
            trained += [model.context_tower, model.context_lm_head]
        for module in trained:
            module.requires_grad_(True)
        # The heads are not compiled: the number of masked rows, and with it their shapes, changes at every step.
        self.towers: Callable[..., Hidden] = (
            compiled(block_parallel_hidden) if config.compile else block_parallel_hidden
        )

    def layer_groups(self) -> list[list[nn.Module]]:
        """Each layer of the context tower, together with the layer of the denoiser that it seeds, if there is one."""
        own = {layer.index: layer for layer in self.model.denoiser_tower.stack}
        stack = self.model.context_tower.stack
        return [list(dict.fromkeys((below, own.get(below.index, below)))) for below in stack]

    def prepare(self, batch: CorpusBatch, step: int, seed: int, device: torch.device) -> NoisyRows:
        """Masks a rank's rows of a 0-based step; a row's masks depend on `seed` and its number in the run alone,
        those of trajectories also on the weights."""
        c = self.config
        noisy = self._corrupted(batch, step, seed, _noise(c))
        later = any(share.name == "consistency" for share in c.losses)
        if later or any(share.name != "noise" for share in c.mask_shares):
            noisy = with_states(
                noisy,
                batch.ids,
                batch.samples,
                seed=seed,
                shares=c.mask_shares,
                mask_token_id=self.model.config.mask_token_id,
                later=later,
                known_from=lambda: self._known_from(batch.ids.to(device), noisy.to(device)).to(batch.ids.device),
            )
        weight, denominator = weigh(noisy, c.reduction)
        num_following = float(next_token_targets(batch.ids, noisy.scored, batch.document)[1].sum())
        views = weight.unflatten(0, (-1, len(batch.ids))).to(device)
        return NoisyRows(batch.ids.to(device), noisy.to(device), views, (denominator, num_following))

    def forward(self, rows: NoisyRows, part: slice, denominators: Sequence[float]) -> LossPart:
        """The weighted losses of the rows in `part`, plus `ar_weight` times the context tower's."""
        c = self.config
        sums = loss_sums(
            self.model,
            rows.x0[part],
            rows.noisy.rows(part),
            rows.weight[:, part].flatten(0, 1),
            losses=[share.name for share in c.losses],
            with_ar=c.ar_weight > 0,
            recompute=c.recompute,
            towers=self.towers,
        )
        # A small batch may have no masked position: its loss is then 0 and not nan.
        masked, following = (max(d, 1) for d in denominators)
        loss = torch.stack([share.weight * sums.losses[share.name] / masked for share in c.losses]).sum()
        if sums.ar is not None:
            loss = loss + c.ar_weight * sums.ar / following
        return LossPart(loss, None)

    def after_update_(self, loads: Tensor | None) -> None:
        """Nothing: experts keep the biases of the backbone that the denoiser started as."""

    @torch.no_grad()
    def measure(self, batch: CorpusBatch, step: int, device: torch.device) -> dict[str, Measured]:
        """The negative log-likelihood of held-out rows: `elbo`, an upper bound for the denoiser at the step's block
        size and with the same noise at every call, and `ar`, exact, for the context tower."""
        noisy = self._corrupted(batch, step, 0, Noise(grid=self.config.grid))
        weight, denominator = weigh(noisy, "elbo")
        count = float(next_token_targets(batch.ids, noisy.scored, batch.document)[1].sum())
        x0, noisy, weight = batch.ids.to(device), noisy.to(device), weight.to(device)
        sums = loss_sums(self.model, x0, noisy, weight, with_ar=True, towers=self.towers)
        assert sums.ar is not None
        return {
            "elbo": Measured(sums.losses["cross_entropy"].item(), denominator),
            "ar": Measured(sums.ar.item(), count),
        }

    def decode(self, held_out: Corpus, step: int, ranks: Ranks) -> dict[str, float]:
        """Tokens per denoiser pass and exact matches of answers decoded at the step's block size, see `answer`."""
        return answer(self.model, held_out, self.config.block_size(step, self.model.config.block_size), ranks)

    def _known_from(self, x0: Tensor, noisy: Corrupted) -> Tensor:
        """The order in which decoding makes the places of x0 (b, t) known, a few rows at a time."""
        c, found = self.config, []
        for start in range(0, len(x0), _DECODED_ROWS):
            part = slice(start, start + _DECODED_ROWS)
            rows = noisy.rows(part)
            found.append(
                known_from(
                    self.model,
                    x0[part],
                    rows.scored,
                    rows.layout,
                    passes=c.trajectory_passes,
                    threshold=c.trajectory_threshold,
                    towers=self.towers,
                )
            )
        return torch.cat(found)

    def _corrupted(self, batch: CorpusBatch, step: int, seed: int, noise: Noise) -> Corrupted:
        model = self.model.config
        return corrupt(
            batch.ids,
            batch.scored,
            batch.samples,
            seed=seed,
            noise=noise,
            block_size=self.config.block_size(step, model.block_size),
            mask_token_id=model.mask_token_id,
            document=batch.document,
        )


def _noise(config: DenoisingConfig) -> Noise:
    return Noise(
        level_per=config.level_per,
        full_mask_fraction=config.full_mask_fraction,
        later_weight=config.later_weight,
        complementary=config.complementary,
        grid=config.grid,
    )
