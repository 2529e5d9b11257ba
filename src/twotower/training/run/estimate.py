"""Estimates what a training run needs, from its settings alone: nothing is loaded or allocated.

Letters: t tokens of a row, d width, h heads, p head width, n state width, a active experts, e experts, v vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from twotower.config import TwoTowerConfig
from twotower.config_rules import SEEDED_KINDS
from twotower.model.attention import Attention
from twotower.model.layer import Layer, RecurrentMixer
from twotower.model.moe import MixtureOfExperts
from twotower.model.one_tower import OneTower
from twotower.model.recurrent import RECURRENT_KINDS
from twotower.model.two_tower import TwoTower
from twotower.planning.footprint import recurrent_sizes
from twotower.training.config import DenoisingConfig, NextTokenConfig, TrainConfig
from twotower.training.objectives.denoising import Denoising
from twotower.training.objectives.next_token import NextToken
from twotower.training.objectives.sums import HEAD_ROWS
from twotower.training.run.precision import coarse_parameters
from twotower.training.run.trainer import trained_parameters


class Memory(NamedTuple):
    """Bytes of one rank: weights (with float32 masters), gradients, the optimiser's moments, the running mean of the
    weights, and, roughly, what the forward pass of a micro-batch keeps for the backward pass."""

    weights: int
    gradients: int
    moments: int
    running_mean: int
    activations: int


class Estimate(NamedTuple):
    """What a run needs; FLOPs are those of matrix products, attention and scans, forward and backward."""

    parameters: int
    trained: int
    tokens: int
    flops: float
    memory: Memory


def estimate(
    config: TwoTowerConfig,
    run: TrainConfig,
    what: DenoisingConfig | NextTokenConfig,
    *,
    row_length: int,
    num_ranks: int,
) -> Estimate:
    """Estimates a run over rows of `row_length` tokens on `num_ranks` ranks."""
    with torch.device("meta"):
        objective: Denoising | NextToken
        if isinstance(what, DenoisingConfig):
            objective = Denoising(TwoTower(config), what)
        else:
            objective = NextToken(OneTower(config), what)
    tokens = run.steps * run.batch_size * row_length
    per_rank = run.batch_size // num_ranks
    rows = min(run.micro_batch_size or per_rank, per_rank)
    parameters = list(objective.parameters())
    return Estimate(
        sum(p.numel() for p in parameters),
        sum(parameter.numel() for parameter in trained_parameters(objective).values()),
        tokens,
        tokens * _flops_per_token(objective, row_length),
        _memory(objective, run, row_length * rows, num_ranks),
    )


def _memory(objective: Denoising | NextToken, run: TrainConfig, tokens: int, num_ranks: int) -> Memory:
    trained = {id(p) for p in trained_parameters(objective).values()}
    coarse = {id(p) for p in coarse_parameters(objective.model, torch.bfloat16)}
    ranks = num_ranks if run.shard else 1
    weights = learnt = 0
    for parameter in objective.parameters():
        count = -(-parameter.numel() // ranks) if id(parameter) in coarse else parameter.numel()
        rounded = run.bf16 and id(parameter) in coarse
        if id(parameter) in trained:
            learnt += count
            weights += 4 * count + (2 * count if rounded and not run.shard else 0)
        else:
            weights += (2 if rounded else 4) * count
    if run.shard:
        weights += _gathered(objective, 2 if run.bf16 else 4)
    mean = 4 * learnt if run.ema_decay > 0 else 0
    return Memory(weights, 4 * learnt, 8 * learnt, mean, _activations(objective, tokens, 2 if run.bf16 else 4))


def _gathered(objective: Denoising | NextToken, width: int) -> int:
    """Bytes that a rank holds unsharded while it computes: the group of layers in use, the next one, which is being
    gathered, and all parameters outside of layers."""
    layers = [sum(p.numel() for module in group for p in module.parameters()) for group in objective.layer_groups()]
    rest = sum(p.numel() for p in objective.parameters()) - sum(layers)
    return width * (2 * max(layers) + rest)


def _activations(objective: Denoising | NextToken, tokens: int, width: int) -> int:
    """A residual stream per layer and tower, what each layer saves (with `recompute` only one at a time), the gradients
    of one layer and the logits of one chunk. Peaks of the stories and hybrid recipes' models were 0.95 to 1.7
    times this."""
    config, what = objective.model.config, objective.config
    views = what.num_views if isinstance(what, DenoisingConfig) else 1
    residual = 4 if config.residual_in_fp32 else width
    inner = {kind: _saved_per_token(config, kind) for kind in set(config.pattern)}
    pattern, context = config.pattern, 0
    if isinstance(what, DenoisingConfig):
        pattern = "".join(pattern[i] for i in config.denoiser_indices)
        # A frozen layer that seeds nothing leaves nothing behind
        context = len(pattern) if what.context == "frozen" else config.num_layers
    streams = (len(pattern) * views + context) * config.hidden_size * residual
    layers = [inner[kind] * width * views for kind in pattern]
    kept = max(layers) if what.recompute else sum(layers)
    logits = 4 * HEAD_ROWS * config.vocab_size * 4
    return tokens * (streams + kept + 2 * max(layers)) + logits


def _saved_per_token(c: TwoTowerConfig, kind: str) -> int:
    """Numbers per token that a layer saves for backward, about: modulation, sums and norms, each product's input."""
    modulated = 9 * c.hidden_size
    if kind in RECURRENT_KINDS:
        return modulated + 4 * (c.mamba_width + recurrent_sizes(c, kind)[0]) + 2 * c.mamba_width
    if kind == "*":
        return modulated + 2 * (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    inner = 4 if c.gated_mlp else 3
    if kind == "-":
        return modulated + inner * c.intermediate_size
    inputs = c.moe_latent_size or c.hidden_size
    active = c.num_experts_per_tok * (inner * c.expert_intermediate_size + 2 * inputs)
    return modulated + active + inner * c.shared_expert_intermediate_size + 2 * c.moe_latent_size


def _flops_per_token(objective: Denoising | NextToken, length: int) -> float:
    """Backward is twice a forward pass, recomputing nearly one more. Heads run on masked positions only, forward twice,
    and the context tower as far up as something reads it, as `block_parallel_hidden` says."""
    config, what = objective.model.config, objective.config
    head = 2.0 * config.vocab_size * config.hidden_size * 4
    if isinstance(objective, NextToken):
        return _learning(objective.model.tower.stack, config, length, what.recompute) + head
    assert isinstance(what, DenoisingConfig)
    views, names = what.num_views, {share.name for share in what.losses}
    masked = _masked(what)
    again = 1 if what.recompute else 0
    denoiser = (3 + again) * sum(_forward(layer, config, length) for layer in objective.model.denoiser_tower.stack)
    top = config.last_seeding_layer
    whole = what.ar_weight > 0 or "distillation" in names
    read = objective.model.context_tower.stack[: None if whole else top + 1]
    if what.context == "frozen":
        # What is recomputed is what seeds the denoiser
        context = sum(_forward(layer, config, length) for layer in read)
        seeds = [layer for layer in read if layer.index in config.denoiser_indices and layer.kind in SEEDED_KINDS]
        context += again * sum(_forward(layer, config, length) - _output(layer) for layer in seeds)
    else:
        context = _learning(read, config, length, what.recompute)
    total = views * denoiser + views * masked * head + context
    total += masked * head / 2 * (views * ("distillation" in names) + ("consistency" in names))
    if any(share.name == "trajectory" for share in what.mask_shares):
        decoded = sum(_forward(layer, config, length) for layer in objective.model.denoiser_tower.stack)
        decoded += sum(_forward(layer, config, length) for layer in objective.model.context_tower.stack[: top + 1])
        total += what.trajectory_passes * (decoded + masked * head / 4)
    return total + (head if what.ar_weight else 0)


def _masked(what: DenoisingConfig) -> float:
    """The share of positions that are masked, about: of noise as its levels are drawn, of a draft all but the first of
    many, of known beginnings and of trajectories, which mostly end early, half and more."""
    noise = 0.5 * (1 - what.full_mask_fraction) + what.full_mask_fraction
    of_kind = {"noise": noise, "drafting": 1.0, "prefix": 0.5, "trajectory": 0.6}
    total = sum(share.weight for share in what.mask_shares)
    return sum(share.weight / total * of_kind[share.name] for share in what.mask_shares)


def _learning(layers: Sequence[Layer], config: TwoTowerConfig, length: int, recompute: bool) -> float:
    """Forward and backward. Recomputing stops before a layer's last product, whose result backward doesn't need: only
    the denoiser's gates do."""
    total = sum(3 * _forward(layer, config, length) for layer in layers)
    return total + (sum(_forward(layer, config, length) - _output(layer) for layer in layers) if recompute else 0)


def _output(layer: Layer) -> float:
    """The product that writes to the residual stream: in expert layers the shared expert's, else the latents'."""
    mixer = layer.mixer
    if isinstance(mixer, RecurrentMixer):
        return 2.0 * mixer.out_proj.weight.numel()
    if isinstance(mixer, Attention):
        return 2.0 * mixer.o_proj.weight.numel()
    if isinstance(mixer, MixtureOfExperts):
        last = mixer.latent_out if mixer.shared is None else mixer.shared.down_proj
        # Without either, or with a gate behind it, the last products are recomputed to weigh them.
        return 0.0 if last is None or mixer.shared_gate is not None else 2.0 * last.weight.numel()
    return 2.0 * mixer.down_proj.weight.numel()


def _forward(layer: Layer, config: TwoTowerConfig, length: int) -> float:
    """2 per weight and token, 4·h·p per key, of which there are t/2, and 6·h·p·n of a scan."""
    used = config.num_experts_per_tok / config.num_experts if config.num_experts else 1.0
    total = 0.0
    for parameter in layer.parameters():
        if parameter.ndim == 3:  # stacked experts
            total += 2 * parameter.numel() * used
        elif parameter.ndim in (2, 4):  # the gates of an `R` layer have 4
            total += 2 * parameter.numel()
    attention = 4 * config.num_attention_heads * config.head_dim * length / 2
    if layer.kind in RECURRENT_KINDS:
        return total + 6 * recurrent_sizes(config, layer.kind)[1]
    return total + (attention if layer.kind == "*" else 0)


def lines(found: Estimate, what: DenoisingConfig | NextTokenConfig, block_size: int, num_ranks: int) -> list[str]:
    """The estimate in words."""
    memory = [f"{name.replace('_', ' ')} {_bytes(value)}" for name, value in found.memory._asdict().items()]
    total = _bytes(sum(found.memory))
    ranks = f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
    result = [
        f"parameters: {found.parameters:,}, of which {found.trained:,} are trained",
        f"tokens: {found.tokens:,}",
        f"FLOPs: about {found.flops:.2e}",
        f"memory of each of {ranks}: about {total} ({', '.join(memory)})",
    ]
    if isinstance(what, DenoisingConfig):
        phases = [f"{phase.block_size} from step {phase.start}" for phase in what.phases] or [f"{block_size}"]
        result.append(f"blocks: {', '.join(phases)}")
    return result


def _bytes(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"
