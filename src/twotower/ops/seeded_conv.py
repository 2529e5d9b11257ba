"""The causal convolution of the training pass. Letters: b batch, r rows of the layout (b or 1), t tokens, c channels,
w kernel width."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements that are worked on together: 1 MB of float32, half of a typical CPU core's second-level cache.
PIECE = 1 << 18


class RowReach(NamedTuple):
    """Which of the w-1 rows before each token a tap reads: `own` from the same stream, `past` from the context's.

    Both (w-1, r, t) bool, entry δ-1 for the row δ places earlier; where neither holds the row is zero.
    """

    own: Tensor
    past: Tensor


def make_reach(first: Tensor, own: Tensor, width: int) -> RowReach:
    """Reach of a kernel of `width` taps where token i's stream starts at own_i and its document at first_i (r, t)."""
    token = torch.arange(own.shape[1], device=own.device)
    rows = torch.stack([token - back for back in range(1, width)]) if width > 1 else token.new_zeros(0, token.numel())
    rows = rows.unsqueeze(1)  # (w-1, 1, t)
    return RowReach(rows >= own, (rows >= first) & (rows < own))


def seeded_conv(x: Tensor, context: Tensor | None, reach: RowReach, taps: Tensor, bias: Tensor | None) -> Tensor:
    """y_i = bias + Σ_δ taps[w-1-δ] · row_{i-δ}, the rows of x (b, t, c) preceded by those of `context` (b, t, c).

    taps (w, c), bias (c,) or None; returns (b, t, c). Each block's first tokens thus see the context tower's last w-1
    rows before it. `context` None is a stream without one: the context tower's own.
    """
    y: Tensor = _SeededConv.apply(x, context, reach.own, reach.past, taps, bias)
    return y


class _SeededConv(torch.autograd.Function):
    """`seeded_conv` with its gradient written out.

    Autograd would keep the rows that each tap read, w tensors of x's size, and pass over memory some thirty times. This
    keeps only the inputs, and works on pieces of a few tokens that stay in a CPU's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        context: Tensor | None,
        own: Tensor,
        past: Tensor,
        taps: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, context, own, past, taps)
        y, zero = torch.empty_like(x), x.new_zeros(())
        for piece in _pieces(x):
            if bias is None:
                torch.mul(x[:, piece], taps[-1], out=y[:, piece])
            else:
                torch.addcmul(bias, x[:, piece], taps[-1], out=y[:, piece])
            for back in range(1, min(taps.shape[0], piece.stop)):  # a row's first tokens have nothing before them
                read = slice(max(piece.start, back), piece.stop)
                rows = slice(read.start - back, read.stop - back)
                other = zero
                if context is not None:
                    other = torch.where(past[back - 1, :, read].unsqueeze(-1), context[:, rows], zero)
                seen = torch.where(own[back - 1, :, read].unsqueeze(-1), x[:, rows], other)
                y[:, read].addcmul_(seen, taps[-1 - back])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Row j has the gradient Σ_δ taps[w-1-δ] · grad_{j+δ} over the tokens j+δ that read it; the tap at δ has
        Σ_i grad_i · row_{i-δ}."""
        x, context, own, past, taps = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad_x = torch.empty_like(x)
        grad_context = torch.zeros_like(context) if wants[1] else None
        streams = [(x, own, grad_x)] if context is None else [(x, own, grad_x), (context, past, grad_context)]
        zero = grad.new_zeros(())
        grad_taps = torch.zeros_like(taps, dtype=torch.promote_types(taps.dtype, torch.float32))
        grad_bias = torch.zeros_like(grad_taps[0])
        for piece in _pieces(x):
            torch.mul(grad[:, piece], taps[-1], out=grad_x[:, piece])
            grad_taps[-1] += _summed(grad[:, piece] * x[:, piece], grad_taps.dtype)
            grad_bias += _summed(grad[:, piece], grad_taps.dtype)
            for back in range(1, min(taps.shape[0], x.shape[1] - piece.start)):
                reads = slice(piece.start + back, min(piece.stop + back, x.shape[1]))
                rows = slice(piece.start, reads.stop - back)
                for stream, reach, total in streams:
                    read = torch.where(reach[back - 1, :, reads].unsqueeze(-1), grad[:, reads], zero)
                    if total is not None:
                        total[:, rows].addcmul_(read, taps[-1 - back])
                    grad_taps[-1 - back] += _summed(read * stream[:, rows], grad_taps.dtype)
        to_bias = grad_bias.to(taps.dtype) if wants[5] else None
        return grad_x, grad_context, None, None, grad_taps.to(taps.dtype), to_bias


def _pieces(x: Tensor) -> Iterator[slice]:
    """Slices of the tokens of x (b, t, c), in order: one slice where a compiler fuses the passes or on a GPU."""
    b, t, c = x.shape
    whole = x.device.type != "cpu" or torch.compiler.is_compiling()
    size = t if whole else max(PIECE // max(b * c, 1), 1)
    return (slice(start, min(start + size, t)) for start in range(0, t, max(size, 1)))


def _summed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Over batch and tokens: (b, t, c) to (c,)."""
    return values.sum((0, 1), dtype=dtype)
