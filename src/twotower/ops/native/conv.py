"""Depthwise causal convolution with its SiLU, see `twotower.ops.conv`. Letters: b batch, s tokens, c channels, w kernel
width."""

import torch
from torch import Tensor

from twotower.ops.native.call import dense, function, threads


def conv_silu(x: Tensor, past: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    x, past = dense(x), past.contiguous()
    b, s, c = x.shape
    out = x.new_empty(b, s, c)
    call = function("tt_conv_silu", "pll ppp llll pi")
    read = (past.data_ptr(), taps.data_ptr(), None if bias is None else bias.data_ptr())
    call(x.data_ptr(), x.stride(0), x.stride(1), *read, b, s, c, taps.shape[0], out.data_ptr(), threads())
    return out


def next_past(x: Tensor, past: Tensor, counts: Tensor | None) -> Tensor:
    x, past = dense(x), past.contiguous()
    b, s, c = x.shape
    out = torch.empty_like(past)
    call = function("tt_next_past", "pll pp llll p")
    read = (past.data_ptr(), None if counts is None else counts.data_ptr())
    call(x.data_ptr(), x.stride(0), x.stride(1), *read, b, s, c, past.shape[1] + 1, out.data_ptr())
    return out
