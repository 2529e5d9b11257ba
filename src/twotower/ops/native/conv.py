"""Depthwise causal convolution with its SiLU, see `twotower.ops.conv`. Letters: b batch, s tokens, c channels, w kernel
width."""

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
