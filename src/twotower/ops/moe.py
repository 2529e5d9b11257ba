"""Mixture of experts. Letters: r token rows, d width, e experts, a active experts per token, f expert width, u outputs
of an expert's first product (f, or 2f where gated)."""

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.linear import PackedWeight, cpu_has_bf16_matmul, linear
from twotower.ops.mlp import Activation, activate


class Routing(NamedTuple):
    """experts (r, a) int64 and their weights (r, a) float64."""

    experts: Tensor
    weights: Tensor


class ExpertWeights(NamedTuple):
    """up (e, u, d) and down (e, f, d), both with the experts' input width last, and optional biases (e, u) and (e, d).

    `packed_up` and `packed_down` hold one packed weight per expert, or nothing; with them `up` and `down` are empty.
    `weigh_inputs` multiplies a row by its weight before the expert instead of after it, as Llama 4 does.
    """

    up: Tensor
    down: Tensor
    packed_up: tuple[PackedWeight, ...] = ()
    packed_down: tuple[PackedWeight, ...] = ()
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Activation = Activation()
    weigh_inputs: bool = False


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
    router: str = "sigmoid",
    bias: Tensor | None = None,
) -> Routing:
    """The top `num_active` experts of each row of x (r, d) by score + correction_bias (e,), and their scores.

    Scores are the sigmoid or softmax, whichever `router` says, of x · weight (e, d) + bias (e,). `normalise` divides
    the chosen ones by their sum: with softmax that is a softmax over the chosen alone.

    With several groups only `topk_groups` of them stay, those with the largest sum of their two best values (sigmoid,
    arXiv 2412.19437) or the largest value (softmax, arXiv 2405.04434).
    """
    # fp64: bf16 and fp32 ties reorder experts between otherwise equal runs
    logits = x.double() @ weight.double().t()  # (r, e)
    logits = logits if bias is None else logits + bias.double()
    scores = logits.sigmoid() if router == "sigmoid" else logits.softmax(-1)
    choice = scores + correction_bias.double()
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))  # (r, groups, e/groups)
        counted = min(2, grouped.shape[-1]) if router == "sigmoid" else 1
        best = grouped.topk(counted, dim=-1).values.sum(-1)
        keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(topk_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(-2)
    experts = choice.topk(num_active, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * scaling_factor)


def apply_experts(x: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    """Σ over the chosen experts of weight · down(activation(up(x))) for every row of x (r, d): (r, d)."""
    num_experts = len(experts.packed_up) or experts.up.shape[0]
    rows, active = routing.experts.shape
    # Bandwidth against arithmetic: with bf16 matrix units 64 rows through all experts cost less than reading them, so
    # two large products beat many small ones once half of the experts are touched anyway.
    plain_bf16 = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not experts.packed_up
    one_input = not experts.weigh_inputs
    if plain_bf16 and one_input and rows <= 64 and 2 * rows * active >= num_experts and cpu_has_bf16_matmul():
        return _all_experts(x, routing, experts)
    return _grouped_experts(x, routing, experts, num_experts)


def _all_experts(x: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    (e, u, d), f = experts.up.shape, experts.down.shape[1]
    gates = torch.zeros(x.shape[0], e, dtype=torch.float64, device=x.device)
    gates = gates.scatter_(1, routing.experts, routing.weights).to(x.dtype)  # (r, e), zero where not chosen
    hidden = linear(x, experts.up.view(e * u, d)).view(-1, e, u)
    if experts.up_bias is not None:
        hidden = hidden + experts.up_bias
    hidden = activate(hidden, experts.activation) * gates.unsqueeze(-1)
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

    flat = routing.experts.flatten()  # (r·a,)
    if rows == 1:
        order, chosen, sizes = None, flat.tolist(), [1] * active
        entered = x.expand(active, -1)
    else:
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=num_experts).tolist()
        chosen = [e for e, count in enumerate(counts) if count]
        sizes = [counts[e] for e in chosen]
        entered = x[order // active]
    if experts.weigh_inputs:
        entered = entered * (weights.flatten() if order is None else weights.flatten()[order]).unsqueeze(-1)
        weights = torch.ones_like(weights)
    hidden = [up(piece, e) for piece, e in zip(entered.split(sizes), chosen, strict=True)]
    pieces = activate(torch.cat(hidden), experts.activation).split(sizes)
    y = torch.cat([down(piece, e) for piece, e in zip(pieces, chosen, strict=True)])
    if order is None:
        return weights @ y
    # Back to the rows' own order, then add each row's experts: no atomics, so the same bits every run.
    y = y[order.argsort()].view(rows, active, -1)
    return (weights.unsqueeze(1) @ y).squeeze(1)
