"""The settings of a training run, as the commands and recipes that train take them. Imports no torch."""

import dataclasses
from typing import Literal, NamedTuple, get_args

from twotower.errors import SettingError
from twotower.options import check_options, option
from twotower.training.corpus.row_length import past_positions_option
from twotower.training.run.schedule import Guard, RateSchedule

Reduction = Literal["masked_mean", "example_mean", "elbo"]
LevelPer = Literal["block", "example"]
Grid = Literal["anywhere", "answers"]
ContextTraining = Literal["frozen", "trained", "tied"]
LossName = Literal["cross_entropy", "certainty", "consistency", "distillation", "acceptance"]
MaskName = Literal["noise", "drafting", "prefix", "trajectory"]


class Phase(NamedTuple):
    """From the 0-based step `start` on, blocks have `block_size` tokens."""

    start: int
    block_size: int

    def __str__(self) -> str:
        return f"{self.start}:{self.block_size}"


def parse_phases(text: str) -> tuple[Phase, ...]:
    """ "0:32,2000:16" as two phases. Raises SettingError for anything else."""
    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        return tuple(Phase(int(start), int(size)) for start, size in pairs)
    except ValueError as error:
        raise SettingError("phases", text, "steps and block sizes such as 0:32,2000:16") from error


class Share(NamedTuple):
    """A loss or a kind of masks by its name, and how much of it there is."""

    name: str
    weight: float


def parse_shares(text: str) -> tuple[Share, ...]:
    """ "cross_entropy,certainty:0.5" as two shares; one without a number has weight 1. Raises SettingError for a weight
    that isn't a number."""
    shares = []
    for part in filter(None, text.replace(" ", "").split(",")):
        name, colon, weight = part.partition(":")
        try:
            shares.append(Share(name, float(weight) if colon else 1.0))
        except ValueError as error:
            raise SettingError("weight", part, "a name and a number such as certainty:0.5") from error
    return tuple(shares)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """What a denoiser learns and which tensors are trained. Each loss of `objective` is explained by the file of its
    name in `training.objectives`, each kind of `masks` in `training.masks`, `reduction` by
    `training.objectives.sums.weigh`, `recompute` by `training.forward.block_parallel`."""

    objective: tuple[Share, ...] = option(
        (),
        "Losses and their weights, such as cross_entropy,certainty:0.5; of cross_entropy, certainty, consistency, "
        "distillation and acceptance.",
        shown_default="cross_entropy",
        parse=parse_shares,
    )
    masks: tuple[Share, ...] = option(
        (),
        "How blocks are masked, in shares such as noise:2,trajectory:1; of noise, drafting, prefix and trajectory.",
        shown_default="noise",
        parse=parse_shares,
    )
    trajectory_passes: int = option(
        3, "How many passes of the denoiser's own decoding --masks trajectory goes through.", least=1
    )
    trajectory_threshold: float = option(
        0.8,
        "The γ of that decoding: in each pass a block's surest place becomes known, and all surer than γ.",
        least=0,
        most=1,
    )
    reduction: Reduction = option(
        "masked_mean",
        "Mean over the step's masked positions, mean of each row's mean, or the likelihood bound in nats per token, "
        "for which --full-mask-fraction and --later-weight must be 0.",
    )
    level_per: LevelPer = option("block", "Draw the noise level once per block or once per row (example).")
    grid: Grid = option(
        "anywhere",
        "Where blocks begin: anywhere, by chance for each row, or at each document's first learnt token (answers), as "
        "when a prompt is answered.",
    )
    full_mask_fraction: float = option(0.25, "Fraction of the blocks that are wholly masked.", least=0, most=1)
    later_weight: float = option(
        0.0,
        "Mask later positions of a block more often, in proportion to exp(this x (1 - level) x place); 0 masks all "
        "alike.",
        least=0,
    )
    complementary: bool = option(
        False, "Also train on each row with the other positions masked; --later-weight must be 0."
    )
    phases: tuple[Phase, ...] = option(
        (),
        "Block sizes with the step from which each holds, such as 0:32,2000:16.",
        shown_default="the checkpoint's, throughout",
        parse=parse_phases,
    )
    context: ContextTraining = option(
        "frozen", "Keep the context tower as it is, train it through the seeding, or train one tower that is both."
    )
    ar_weight: float = option(
        0.0, "Weight of the context tower's next-token loss, where --context is not frozen.", least=0
    )
    lora_rank: int = option(
        0,
        "Train additions of this rank to the denoiser's projections, and the time modules, instead of all weights; 0 "
        "trains all.",
        least=0,
    )
    recompute: bool = option(False, "Compute layers again in the backward pass: less memory, more time.")
    compile: bool = option(False, "Compile the towers with torch.compile; needs a C++ compiler.")

    def __post_init__(self) -> None:
        check_options(self)
        _check_shares("objective", self.objective, get_args(LossName))
        _check_shares("masks", self.masks, get_args(MaskName))
        if self.lora_rank > 0 and self.context != "frozen":
            raise SettingError("lora_rank", self.lora_rank, f"0 with context={self.context}", "or keep that frozen")
        if self.ar_weight > 0 and self.context == "frozen":
            raise SettingError("ar_weight", self.ar_weight, "0 for a frozen context tower", "or train that tower")
        for name in ("full_mask_fraction", "later_weight"):
            if self.reduction == "elbo" and getattr(self, name) != 0:
                rule = "0 with reduction=elbo, a bound only where the noise level alone decides what is masked"
                raise SettingError(name, getattr(self, name), rule)
        self._check_masks()
        if self.complementary and self.later_weight > 0:
            rule = "0 with complementary, whose two views of a row mask every position equally often"
            raise SettingError("later_weight", self.later_weight, rule, "drop one of them")
        for name, unused in (("later_weight", 0.0), ("level_per", "block"), ("complementary", False)):
            if self.full_mask_fraction == 1 and getattr(self, name) != unused:
                rule = f"{unused} with full_mask_fraction=1, where every block is wholly masked"
                raise SettingError(name, getattr(self, name), rule, "drop one of them")
        starts = [phase.start for phase in self.phases]
        if self.phases and (starts[0] != 0 or starts != sorted(set(starts))):
            raise SettingError("phases", self.phases, "of steps that start at 0 and rise")
        if any(phase.block_size < 1 for phase in self.phases):
            raise SettingError("phases", self.phases, "of blocks of at least 1 token")

    def _check_masks(self) -> None:
        """Raises SettingError where kinds of masks and other settings contradict each other or do nothing."""
        kinds, names = {share.name for share in self.mask_shares}, {loss.name for loss in self.losses}
        made = sorted(kinds - {"noise"}) or sorted(names & {"consistency"})
        if self.reduction == "elbo" and kinds != {"noise"}:
            raise SettingError("masks", made[0], "noise with reduction=elbo, a bound for uniform noise only")
        if self.complementary and made:
            rule = f"False with {made[0]}, which makes other versions of a row"
            raise SettingError("complementary", True, rule, "drop one of them")
        unused = {
            "noise": ["later_weight", "level_per", "full_mask_fraction"],
            "trajectory": ["trajectory_passes", "trajectory_threshold"],
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for kind in unused.keys() - kinds:
            for name in unused[kind]:
                if getattr(self, name) != defaults[name]:
                    raise SettingError(
                        name,
                        getattr(self, name),
                        f"left out where masks has no {kind}",
                        f"add {kind} to it, or drop this",
                    )

    @property
    def losses(self) -> tuple[Share, ...]:
        """The losses of `objective`: the cross-entropy where it names none."""
        return self.objective or (Share("cross_entropy", 1.0),)

    @property
    def mask_shares(self) -> tuple[Share, ...]:
        """The kinds of `masks`: noise where it names none."""
        return self.masks or (Share("noise", 1.0),)

    @property
    def num_views(self) -> int:
        """How many versions of each row the denoiser sees."""
        return 2 if self.complementary or any(loss.name == "consistency" for loss in self.losses) else 1

    def block_size(self, step: int, default: int) -> int:
        """The block size of a 0-based step; `default` is that of a run without phases, the model's own."""
        return next((phase.block_size for phase in reversed(self.phases) if phase.start <= step), default)


def _check_shares(name: str, shares: tuple[Share, ...], allowed: tuple[str, ...]) -> None:
    if not all(isinstance(share, Share) for share in shares):
        raise SettingError(name, shares, "a tuple of Share", "or give a text to parse_shares")
    given = ",".join(f"{share.name}:{share.weight:g}" if share.weight != 1 else share.name for share in shares)
    if any(share.name not in allowed for share in shares) or len({share.name for share in shares}) < len(shares):
        raise SettingError(name, given, f"of {', '.join(allowed)}, each at most once")
    for share in shares:
        if not 0 < share.weight < float("inf"):
            raise SettingError(name, given, "of weights above 0", "leave out what should not count")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """How the loss of the next token is computed; `training.forward.causal_parallel` explains `recompute`."""

    recompute: bool = option(False, "Compute layers again in the backward pass: less memory, more time.")
    compile: bool = option(False, "Compile the tower with torch.compile; needs a C++ compiler.")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast a run learns, and what it keeps. `run.schedule` explains the rates and which steps are
    skipped. Weights, sums of gradients and optimiser are float32, whatever `bf16` says."""

    steps: int = option(1000, "Optimiser steps in all.", least=1)
    batch_size: int = option(16, "Rows per step; under torchrun a multiple of the ranks.", least=1)
    learning_rate: float = option(1e-3, "Highest learning rate.", above=0)
    final_learning_rate: float = option(
        0.0, "What the rate falls to over --decay-steps, which it needs; at most --learning-rate.", least=0
    )
    warmup_steps: int = option(100, "Steps over which the rate rises to its highest.", least=0)
    decay_steps: int = option(0, "Last steps, over which the rate falls, at most --steps.", least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay.", least=0)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", above=0)
    micro_batch_size: int = option(
        0,
        "Rows that a rank computes at a time, 0 for all of its share; changes memory, not the gradient.",
        least=0,
    )
    ema_decay: float = option(
        0.0,
        "Above 0: also keep a running mean of the weights with this decay, and write a checkpoint of it, named -ema.",
        least=0,
        below=1,
    )
    spike_factor: float = option(
        3.0,
        "Skip a step whose loss is this many times the value that nine in ten recent losses stay below; above 1, or 0 "
        "to skip none.",
        least=0,
    )
    skip_limit: int = option(10, "Stop when more than this many of the last 100 steps were skipped.", least=0)
    bf16: bool = option(False, "Compute in bfloat16; weights and optimiser stay float32.")
    shard: bool = option(False, "Under torchrun: spread weights and optimiser over the ranks.")
    past_positions: bool = past_positions_option()
    seed: int = option(0, "Decides the rows and masks of every step.", least=0, below=2**63)
    checkpoint_every: int = option(100, "Steps between two saved states.", least=1)
    evaluate_every: int = option(
        0, "Steps between two measurements of --held-out, and after the last step; 0 without held-out rows.", least=0
    )

    def __post_init__(self) -> None:
        check_options(self)
        self.schedule  # noqa: B018  checks how the rates go together
        self.guard()

    @property
    def schedule(self) -> RateSchedule:
        """The learning rates of the run."""
        names = [f.name for f in dataclasses.fields(RateSchedule)]
        return RateSchedule(**{name: getattr(self, name) for name in names})

    def guard(self) -> Guard:
        """A new guard against harmful steps."""
        return Guard(spike_factor=self.spike_factor, skip_limit=self.skip_limit)
