"""Scans whose decay is one number for each channel and state: Mamba-1's selective scan (arXiv 2312.00752), and with
n = 1 the RG-LRU (arXiv 2402.19427). Letters: b batch, s tokens, c channels, n state width.

Recurrence per channel, element by element of its state, with A (c, n):

    h_t = exp(dt_t·A)·h_{t-1} + u_t·B_t,   y_t = h_t·C_t + skip_t

Everything is float32 or wider. A token with dt = 0 and u = 0 leaves the state as it was, which is how padding and
rejected tokens are skipped. As no two decays agree, products of tokens with tokens would not save anything: the states
of a few tokens at a time are made one after the other.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower.ops.ssd import ScanOutput

# Numbers in the states that are held at once: 1 MB of float32, half of a typical CPU core's second-level cache.
PIECE = 1 << 18


class SelectiveInputs(NamedTuple):
    """What one layer's scan reads: dt, u and skip (…, c), B and C (…, n). The dimensions (…) are (b, s) here."""

    dt: Tensor
    u: Tensor
    B: Tensor
    C: Tensor
    skip: Tensor

    def masked(self, kept: Tensor) -> "SelectiveInputs":
        """Without the tokens where kept (…) is False: they leave the state as it was."""
        return self._replace(dt=self.dt * kept.unsqueeze(-1), u=self.u * kept.unsqueeze(-1))

    def pieces(self, part: slice) -> "SelectiveInputs":
        """A part of the second dimension: tokens, or chunks of tokens."""
        return SelectiveInputs(*(v[:, part] for v in self))


def selective_scan(inputs: SelectiveInputs, A: Tensor, state: Tensor) -> ScanOutput:
    """Outputs (b, s, c) of all s tokens and the last state, from the initial `state` (b, c, n)."""
    size = max(PIECE // state.numel(), 1)
    pieces = []
    for start in range(0, inputs.u.shape[1], size):
        piece = inputs.pieces(slice(start, start + size))
        states = selective_states(piece, A, state, None)
        pieces.append(selective_output(states, piece))
        state = states[:, -1].clone()  # not a view, which would keep the states of all tokens
    return ScanOutput(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), state)


def selective_state(inputs: SelectiveInputs, A: Tensor, state: Tensor, counts: Tensor | None) -> Tensor:
    """The state (b, c, n) after all tokens, or the first counts[b] (b,) int64 of each row."""
    if counts is not None:
        inputs = inputs.masked(torch.arange(inputs.u.shape[1], device=counts.device) < counts[:, None])
    return selective_scan(inputs, A, state).state


def selective_states(inputs: SelectiveInputs, A: Tensor, state: Tensor, fresh: Tensor | None) -> Tensor:
    """The states (b, s, c, n) after every token; where fresh (b, s) is True, what was before the token is forgotten."""
    decay = (inputs.dt.unsqueeze(-1) * A).exp()
    if fresh is not None:
        decay = decay.masked_fill(fresh[..., None, None], 0.0)
    return _recurrence(decay, inputs.u.unsqueeze(-1) * inputs.B.unsqueeze(-2), state)


def selective_output(states: Tensor, inputs: SelectiveInputs) -> Tensor:
    """The outputs (b, s, c) of the states (b, s, c, n) after every token."""
    return (states @ inputs.C.unsqueeze(-1)).squeeze(-1) + inputs.skip


@torch.compiler.disable  # it would unroll the loop over tokens
def _recurrence(decay: Tensor, added: Tensor, state: Tensor) -> Tensor:
    """h_t = decay_t·h_{t-1} + added_t for decay and added (b, s, …) and the state h_0 (b, …): all h (b, s, …)."""
    states: Tensor = _Recurrence.apply(decay, added, state)
    return states


class _Recurrence(torch.autograd.Function):
    """`_recurrence` with its gradient written out.

    Autograd would keep a graph of s small steps; this keeps the decays and the result. With g the gradients of the h,
    and G_t = g_t + decay_{t+1}·G_{t+1}: added_t has G_t, decay_t has G_t·h_{t-1}, and h_0 has decay_1·G_1.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor, state: Tensor) -> Tensor:
        states = torch.empty_like(added)
        before = state
        for d, a, h in zip(decay.unbind(1), added.unbind(1), states.unbind(1), strict=True):
            before = torch.addcmul(a, d, before, out=h)
        ctx.save_for_backward(decay, state, states)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, state, states = ctx.saved_tensors
        totals = grad.clone()
        for t in range(grad.shape[1] - 1, 0, -1):
            totals[:, t - 1].addcmul_(decay[:, t], totals[:, t])
        before = torch.cat((state.unsqueeze(1), states[:, :-1]), dim=1)
        return totals * before, totals, decay[:, 0] * totals[:, 0]
