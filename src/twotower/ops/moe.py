"""Mixture of experts. Letters: r token rows, d width, e experts, a active experts per token, f expert width."""

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.linear import PackedWeight, cpu_has_bf16_matmul, linear


class Routing(NamedTuple):
    """experts (r, a) int64 and their weights (r, a) float64."""

    experts: Tensor
    weights: Tensor


class ExpertWeights(NamedTuple):
    """up and down (e, f, d), both with the model width last, and optional biases (e, f) and (e, d).

    `packed_up` and `packed_down` hold one packed weight per expert, or nothing; with them `up` and `down` are empty.
    """

    up: Tensor
    down: Tensor
    packed_up: tuple[PackedWeight, ...] = ()
    packed_down: tuple[PackedWeight, ...] = ()
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def route(
    x: Tensor,
    weight: Tensor,
    correction_bias: Tensor,
    *,
    num_active: int,
    num_groups: int,
    topk_groups: int,
    normalise: bool,
    scaling_factor: float,
) -> Routing:
    """Sigmoid router over x (r, d) with weight (e, d): the top `num_active` of score + correction_bias (e,).

    With several groups only the `topk_groups` groups with the largest sum of their two best values stay; the others'
    values become 0.0, not -inf, as released. The returned weights are the unbiased scores.
    """
    # fp64: bf16 and fp32 ties reorder experts between otherwise equal runs
    scores = (x.double() @ weight.double().t()).sigmoid()  # (r, e)
    choice = scores + correction_bias.double()
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))  # (r, groups, e/groups)
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(topk_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~keep.unsqueeze(-1), 0.0).flatten(-2)
    experts = choice.topk(num_active, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * scaling_factor)


def apply_experts(x: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    """Σ over the chosen experts of weight · down(relu(up(x))²) for every row of x (r, d): (r, d)."""
    num_experts = len(experts.packed_up) or experts.up.shape[0]
    rows, active = routing.experts.shape
    # Bandwidth against arithmetic: with bf16 matrix units 64 rows through all experts cost less than reading them, so
    # two large products beat many small ones once half of the experts are touched anyway.
    plain_bf16 = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not experts.packed_up
    if plain_bf16 and rows <= 64 and 2 * rows * active >= num_experts and cpu_has_bf16_matmul():
        return _all_experts(x, routing, experts)
    return _grouped_experts(x, routing, experts, num_experts)


def _all_experts(x: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    e, f, d = experts.up.shape
    gates = torch.zeros(x.shape[0], e, dtype=torch.float64, device=x.device)
    gates = gates.scatter_(1, routing.experts, routing.weights).to(x.dtype)  # (r, e), zero where not chosen
    hidden = linear(x, experts.up.view(e * f, d)).view(-1, e, f)
    if experts.up_bias is not None:
        hidden = hidden + experts.up_bias
    hidden = hidden.relu().square() * gates.unsqueeze(-1)
    y = hidden.view(-1, e * f) @ experts.down.view(e * f, d)
    return y if experts.down_bias is None else y + gates @ experts.down_bias


def _grouped_experts(x: Tensor, routing: Routing, experts: ExpertWeights, num_experts: int) -> Tensor:
    """Rows sorted by expert, then two products for each expert that has rows."""
    rows, active = routing.experts.shape
    weights = routing.weights.to(x.dtype)
    # All experts' views at once: backward then stacks their gradients instead of adding one padded with zeros for each
    ups = experts.packed_up or experts.up.unbind()
    # Transposed one by one: torch 2.13 compiles the bfloat16 gradient of a transposed stack to reads of unset memory
    downs = experts.packed_down or [weight.mT for weight in experts.down.unbind()]

    def up(piece: Tensor, e: int) -> Tensor:
        return linear(piece, ups[e], None if experts.up_bias is None else experts.up_bias[e])

    def down(piece: Tensor, e: int) -> Tensor:
        return linear(piece, downs[e], None if experts.down_bias is None else experts.down_bias[e])

    if rows == 1:
        chosen = routing.experts[0].tolist()
        hidden = [up(x, e).relu().square() for e in chosen]
        return weights @ torch.cat([down(piece, e) for piece, e in zip(hidden, chosen, strict=True)])
    flat = routing.experts.flatten()  # (r·a,)
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=num_experts).tolist()
    chosen = [e for e, count in enumerate(counts) if count]
    sizes = [counts[e] for e in chosen]
    pieces = x[order // active].split(sizes)
    hidden = [up(piece, e) for piece, e in zip(pieces, chosen, strict=True)]
    pieces = torch.cat(hidden).relu().square().split(sizes)
    y = torch.cat([down(piece, e) for piece, e in zip(pieces, chosen, strict=True)])
    # Back to the rows' own order, then add each row's experts: no atomics, so the same bits every run.
    y = y[order.argsort()].view(rows, active, -1)
    return (weights.unsqueeze(1) @ y).squeeze(1)
