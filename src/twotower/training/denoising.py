"""The objective of training a denoiser: predict the masked tokens of every block, given the clean text before it.

Letters: b batch, v views (noisy versions of one row), t tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from twotower.model.two_tower import TwoTower
from twotower.training.corpus.shards import Corpus, RowBatch
from twotower.training.corruption import Corrupted, LevelPer, Noise, corrupt
from twotower.training.forward.block_parallel import Hidden, block_parallel_hidden
from twotower.training.held_out import answer
from twotower.training.losses import Reduction, loss_sums, next_token_targets, weigh
from twotower.training.objective import LossPart, Measured
from twotower.training.run.compiling import compiled
from twotower.training.run.low_rank import add_low_rank_
from twotower.training.run.ranks import Ranks

ContextTraining = Literal["frozen", "trained", "tied"]


class Phase(NamedTuple):
    """From the 0-based step `start` on, blocks have `block_size` tokens."""

    start: int
    block_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """`reduction` is explained at `objective.weigh`, `level_per`, `full_mask_fraction`, `later_weight` and
    `complementary` at `corruption.Noise`, `recompute` at `block_parallel_hidden`.

    `context` says whether the context tower stays as it is, is trained through the seeding, or is one and the same as
    the denoiser tower; `ar_weight` adds that much of its next-token loss. `distil_weight` adds that much of the
    denoiser's divergence from the context tower's own distribution of each masked token. `phases` change the block
    size; without any it is the model's. `lora_rank` above 0 trains additions of that rank to the denoiser's
    projections, and the time modules, instead of all its weights.
    """

    reduction: Reduction = "masked_mean"
    level_per: LevelPer = "block"
    full_mask_fraction: float = 0.25
    later_weight: float = 0.0
    complementary: bool = False
    context: ContextTraining = "frozen"
    ar_weight: float = 0.0
    distil_weight: float = 0.0
    phases: tuple[Phase, ...] = ()
    lora_rank: int = 0
    recompute: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction is {self.reduction!r}, must be one of {', '.join(get_args(Reduction))}")
        if self.context not in get_args(ContextTraining):
            raise ValueError(f"context is {self.context!r}, must be frozen, trained or tied")
        for name in ("ar_weight", "distil_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}, must be 1 or more, or 0 to train all weights")
        if self.lora_rank > 0 and self.context != "frozen":
            raise ValueError(
                f"lora_rank is {self.lora_rank} with context={self.context}, must be 0 unless it is frozen"
            )
        if self.ar_weight > 0 and self.context == "frozen":
            raise ValueError(f"ar_weight is {self.ar_weight} for a frozen context tower; train it or set it to 0")
        uniform = self.noise.full_mask_fraction == 0 and self.noise.later_weight == 0
        if self.reduction == "elbo" and not uniform:
            raise ValueError(
                "reduction is elbo, a bound only where t̂ alone decides; set full_mask_fraction and later_weight to 0"
            )
        if self.complementary and self.later_weight > 0:
            raise ValueError(
                f"later_weight is {self.later_weight} with complementary, must be 0: the two views of a row together "
                "mask every position equally often; drop one"
            )
        starts = [phase.start for phase in self.phases]
        if self.phases and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ValueError(f"phases start at {starts}, must start at 0 and rise")
        if any(phase.block_size < 1 for phase in self.phases):
            raise ValueError(f"phases have blocks of {[p.block_size for p in self.phases]}, must be 1 or more")

    @property
    def noise(self) -> Noise:
        return Noise(
            level_per=self.level_per,
            full_mask_fraction=self.full_mask_fraction,
            later_weight=self.later_weight,
            complementary=self.complementary,
        )

    def block_size(self, step: int, default: int) -> int:
        """The block size of a 0-based step."""
        return next((phase.block_size for phase in reversed(self.phases) if phase.start <= step), default)


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
        """Each layer of the denoiser together with the same layer of the context tower, which seeds it."""
        pairs = zip(self.model.context_tower.stack, self.model.denoiser_tower.stack, strict=True)
        return [list(dict.fromkeys(pair)) for pair in pairs]

    def prepare(self, batch: RowBatch, step: int, seed: int, device: torch.device) -> NoisyRows:
        """Masks a rank's rows of a 0-based step; a row's noise depends on `seed` and its number in the run alone."""
        noisy = self._corrupted(batch, step, seed, self.config.noise)
        weight, denominator = weigh(noisy, self.config.reduction)
        num_following = float(next_token_targets(batch.ids, noisy.scored, batch.document)[1].sum())
        views = weight.unflatten(0, (-1, len(batch.ids))).to(device)
        return NoisyRows(batch.ids.to(device), noisy.to(device), views, (denominator, num_following))

    def forward(self, rows: NoisyRows, part: slice, denominators: Sequence[float]) -> LossPart:
        """The denoising loss of the rows in `part`, plus `distil_weight` and `ar_weight` times the other two."""
        c = self.config
        sums = loss_sums(
            self.model,
            rows.x0[part],
            rows.noisy.rows(part),
            rows.weight[:, part].flatten(0, 1),
            with_ar=c.ar_weight > 0,
            with_distil=c.distil_weight > 0,
            recompute=c.recompute,
            towers=self.towers,
        )
        # A small batch may have no masked position: its loss is then 0 and not nan.
        masked, following = (max(d, 1) for d in denominators)
        loss = sums.denoising / masked
        if sums.distil is not None:
            loss = loss + c.distil_weight * sums.distil / masked
        if sums.ar is not None:
            loss = loss + c.ar_weight * sums.ar / following
        return LossPart(loss, None)

    def after_update_(self, loads: Tensor | None) -> None:
        """Nothing: experts keep the biases of the backbone that the denoiser started as."""

    @torch.no_grad()
    def measure(self, batch: RowBatch, step: int, device: torch.device) -> dict[str, Measured]:
        """The negative log-likelihood of held-out rows: `elbo`, an upper bound for the denoiser at the step's block
        size and with the same noise at every call, and `ar`, exact, for the context tower."""
        noisy = self._corrupted(batch, step, 0, Noise())
        weight, denominator = weigh(noisy, "elbo")
        count = float(next_token_targets(batch.ids, noisy.scored, batch.document)[1].sum())
        x0, noisy, weight = batch.ids.to(device), noisy.to(device), weight.to(device)
        sums = loss_sums(self.model, x0, noisy, weight, with_ar=True, towers=self.towers)
        assert sums.ar is not None
        return {"elbo": Measured(sums.denoising.item(), denominator), "ar": Measured(sums.ar.item(), count)}

    def decode(self, held_out: Corpus, step: int, ranks: Ranks) -> dict[str, float]:
        """Tokens per denoiser pass and exact matches of answers decoded at the step's block size, see `answer`."""
        return answer(self.model, held_out, self.config.block_size(step, self.model.config.block_size), ranks)

    def _corrupted(self, batch: RowBatch, step: int, seed: int, noise: Noise) -> Corrupted:
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
