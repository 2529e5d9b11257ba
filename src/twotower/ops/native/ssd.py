"""Mamba-2's scan token by token, see `twotower.ops.ssd`. Letters: b batch, s tokens, h heads, p head width, g groups, n
state width.

A head's state row stays in registers through all tokens of a call, so the plain recurrence beats the quadratic form.
"""

import torch
from torch import Tensor

from twotower.ops.native.call import dense, function, threads
from twotower.ops.ssd import ScanInputs, ScanOutput


def time_steps(dt: Tensor, dt_bias: Tensor, limit: tuple[float, float]) -> Tensor:
    dt = dense(dt)
    b, s, h = dt.shape
    out = dt.new_empty(b, s, h)
    call = function("tt_time_steps", "pll pff lll p")
    call(dt.data_ptr(), dt.stride(0), dt.stride(1), dt_bias.data_ptr(), *limit, b, s, h, out.data_ptr())
    return out


def ssd_scan(inputs: ScanInputs, A: Tensor, D: Tensor, state: Tensor) -> ScanOutput:
    y, end = _floats(inputs.x.shape), _floats(state.shape)
    _scan(inputs, A, D, state, None, y, end)
    return ScanOutput(y, end)


def ssd_output(inputs: ScanInputs, A: Tensor, D: Tensor, state: Tensor) -> Tensor:
    y = _floats(inputs.x.shape)
    _scan(inputs, A, D, state, None, y, None)
    return y


def ssd_state(inputs: ScanInputs, A: Tensor, state: Tensor, counts: Tensor | None = None) -> Tensor:
    end = _floats(state.shape)
    _scan(inputs, A, A, state, counts, None, end)  # D only enters y
    return end


def _floats(shape: torch.Size) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _scan(
    inputs: ScanInputs,
    A: Tensor,
    D: Tensor,
    state: Tensor,
    counts: Tensor | None,
    y: Tensor | None,
    end: Tensor | None,
) -> None:
    x, dt, B, C = inputs
    b, s, h, p = x.shape
    g, n = B.shape[2:]
    assert x.stride()[2:] == (p, 1)
    assert B.stride() == C.stride()
    assert B.stride()[2:] == (n, 1)
    assert dt.stride(2) == 1
    state = state.contiguous()
    call = function("tt_ssd", "pll ppll pll pppp llllll plpi")
    call(
        *(x.data_ptr(), x.stride(0), x.stride(1)),
        *(B.data_ptr(), C.data_ptr(), B.stride(0), B.stride(1)),
        *(dt.data_ptr(), dt.stride(0), dt.stride(1)),
        *(A.data_ptr(), D.data_ptr(), state.data_ptr(), None if counts is None else counts.data_ptr()),
        *(b, s, h, p, g, n),
        *(None if y is None else y.data_ptr(), s * h * p, None if end is None else end.data_ptr(), threads()),
    )
