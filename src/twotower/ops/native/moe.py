"""Mixture of experts, see `twotower.ops.moe`. Letters: r token rows, d width, e experts, a active experts per token, f
expert width."""

import torch
from torch import Tensor

from twotower.ops.moe import ExpertWeights, Routing
from twotower.ops.native.call import function, threads


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
    assert weight.dtype == correction_bias.dtype == torch.float64
    x = x.contiguous()
    r, d = x.shape
    experts = torch.empty(r, num_active, dtype=torch.int64)
    weights = torch.empty(r, num_active, dtype=torch.float64)
    call = function("tt_route", "pll pp llll id ppi")
    sizes = (weight.shape[0], num_active, num_groups, topk_groups, normalise, scaling_factor)
    read = (x.data_ptr(), r, d, weight.data_ptr(), correction_bias.data_ptr())
    call(*read, *sizes, experts.data_ptr(), weights.data_ptr(), threads())
    return Routing(experts, weights)


def apply_experts(x: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    """`experts.up` (e, f/NR, d, NR) and `experts.down` (e, d/NR, f, NR) hold packed panels."""
    x = x.contiguous()
    r, d = x.shape
    y = torch.empty_like(x)
    call = function("tt_experts", "pl ppll ppi ll pp pi")
    call(
        *(x.data_ptr(), r),
        *(routing.experts.data_ptr(), routing.weights.data_ptr(), routing.experts.shape[1], experts.up.shape[0]),
        *(experts.up.data_ptr(), experts.down.data_ptr(), experts.up.dtype == torch.bfloat16),
        *(d, experts.down.shape[2]),
        None if experts.up_bias is None else experts.up_bias.data_ptr(),
        None if experts.down_bias is None else experts.down_bias.data_ptr(),
        *(y.data_ptr(), threads()),
    )
    return y
