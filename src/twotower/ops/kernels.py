"""The ops that models and decoding call, as one value: the reference or a backend with the same signatures."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from twotower.ops import attention, conv, mlp, moe, norm, ssd, unmask
from twotower.ops.backend import Backend
from twotower.ops.moe import Routing
from twotower.ops.ssd import ScanOutput
from twotower.ops.unmask import Best, BlockPlaces


class Kernels(NamedTuple):
    """Each field is documented where the reference stands, under the same name."""

    rms_norm: Callable[..., Tensor]
    modulated_rms_norm: Callable[..., Tensor]
    gated_group_rms_norm: Callable[..., Tensor]
    residual_sum: Callable[..., Tensor]
    conv_silu: Callable[..., Tensor]
    next_past: Callable[..., Tensor]
    time_steps: Callable[..., Tensor]
    ssd_scan: Callable[..., ScanOutput]
    ssd_output: Callable[..., Tensor]
    ssd_state: Callable[..., Tensor]
    rotate: Callable[..., Tensor]
    causal_mask: Callable[..., Tensor]
    block_mask: Callable[..., Tensor | None]
    cached_attention: Callable[..., Tensor]
    seeded_attention: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    route: Callable[..., Routing]
    apply_experts: Callable[..., Tensor]
    best: Callable[..., Best]
    argmax: Callable[..., Tensor]
    commit: Callable[..., Tensor]
    fix: Callable[..., BlockPlaces]


REFERENCE = Kernels(
    rms_norm=norm.rms_norm,
    modulated_rms_norm=norm.modulated_rms_norm,
    gated_group_rms_norm=norm.gated_group_rms_norm,
    residual_sum=norm.residual_sum,
    conv_silu=conv.conv_silu,
    next_past=conv.next_past,
    time_steps=ssd.time_steps,
    ssd_scan=ssd.ssd_scan,
    ssd_output=ssd.ssd_output,
    ssd_state=ssd.ssd_state,
    rotate=attention.rotate,
    causal_mask=attention.causal_mask,
    block_mask=attention.block_mask,
    cached_attention=attention.cached_attention,
    seeded_attention=attention.seeded_attention,
    mlp=mlp.mlp,
    route=moe.route,
    apply_experts=moe.apply_experts,
    best=unmask.best,
    argmax=unmask.argmax,
    commit=unmask.commit,
    fix=unmask.fix,
)


def kernels(backend: Backend) -> Kernels:
    """The ops of a backend that `ops.backend.choose_backend` gave."""
    if backend is Backend.REFERENCE:
        return REFERENCE
    from twotower.ops.native import attention as n_attention
    from twotower.ops.native import conv as n_conv
    from twotower.ops.native import mlp as n_mlp
    from twotower.ops.native import moe as n_moe
    from twotower.ops.native import norm as n_norm
    from twotower.ops.native import ssd as n_ssd
    from twotower.ops.native import unmask as n_unmask

    return Kernels(
        rms_norm=n_norm.rms_norm,
        modulated_rms_norm=n_norm.modulated_rms_norm,
        gated_group_rms_norm=n_norm.gated_group_rms_norm,
        residual_sum=n_norm.residual_sum,
        conv_silu=n_conv.conv_silu,
        next_past=n_conv.next_past,
        time_steps=n_ssd.time_steps,
        ssd_scan=n_ssd.ssd_scan,
        ssd_output=n_ssd.ssd_output,
        ssd_state=n_ssd.ssd_state,
        rotate=n_attention.rotate,
        causal_mask=n_attention.causal_mask,
        block_mask=n_attention.block_mask,
        cached_attention=n_attention.cached_attention,
        seeded_attention=n_attention.seeded_attention,
        mlp=n_mlp.mlp,
        route=n_moe.route,
        apply_experts=n_moe.apply_experts,
        best=n_unmask.best,
        argmax=n_unmask.argmax,
        commit=n_unmask.commit,
        fix=n_unmask.fix,
    )
