"""Root-mean-square norms, see `twotower.ops.norm`. Letters: r rows, d width, g groups."""

import torch
from torch import Tensor

from twotower.ops.native.call import dense, function, threads


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    assert dtype == torch.float32
    x = x.contiguous()
    d = x.shape[-1]
    y = torch.empty_like(x)
    call = function("tt_rms_norm", "pll pfi ppll pi")
    call(x.data_ptr(), x.numel() // d, d, weight.data_ptr(), eps, 0, None, None, 0, 1, y.data_ptr(), threads())
    return y


def modulated_rms_norm(
    x: Tensor, weight: Tensor, eps: float, shift: Tensor, scale: Tensor, *, norm_first: bool, dtype: torch.dtype
) -> Tensor:
    assert dtype == torch.float32
    assert shift.stride() == scale.stride()
    x = x.contiguous()
    b, s, d = x.shape
    y = torch.empty_like(x)
    call = function("tt_rms_norm", "pll pfi ppll pi")
    order = 2 if norm_first else 1
    where = (shift.data_ptr(), scale.data_ptr(), shift.stride(0), s)
    call(x.data_ptr(), b * s, d, weight.data_ptr(), eps, order, *where, y.data_ptr(), threads())
    return y


def residual_sum(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    b, s, d = x.shape
    out, y = x.contiguous().clone(), y.contiguous()
    call = function("tt_residual", "pppl lll i")
    gates = (None, 0) if gate is None else (gate.data_ptr(), gate.stride(0))
    call(out.data_ptr(), y.data_ptr(), *gates, b, s, d, threads())
    return out


def gated_group_rms_norm(y: Tensor, z: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    out = y.new_empty(y.shape)
    y, z = y.flatten(0, -2), dense(z).flatten(0, -2)  # (r, d); z may be columns of a wider table
    r, d = y.shape
    call = function("tt_gated_group_rms_norm", "plpll pllf pi")
    rows = (y.data_ptr(), y.stride(0), z.data_ptr(), z.stride(0), r)
    call(*rows, weight.data_ptr(), num_groups, d // num_groups, eps, out.data_ptr(), threads())
    return out
