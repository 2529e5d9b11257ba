"""Products of a few rows with a packed weight, see `twotower.ops.linear`. Letters: i inputs, o outputs, r rows.

Where the CPU multiplies bf16 itself, rows are rounded to bf16 beside a weight of it, as bf16 activations are; sums are
float32 everywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.native.call import dense, function, threads


def panel_width() -> int:
    """Outputs side by side in a panel: two vectors of this CPU."""
    return int(function("tt_panel_width", "")())


def has_bf16_pairs() -> bool:
    """Whether this CPU multiplies pairs of bf16 values, as which inputs then lie in panels of bf16."""
    return bool(function("tt_bf16_pairs", "")())


def pack_panels(weight: Tensor) -> Tensor:
    """A weight (…, o, i), bf16 or float32, as panels of its outputs: (…, o/NR rounded up, i, NR)."""
    width = panel_width()
    padded = F.pad(weight.detach(), (0, 0, 0, -weight.shape[-2] % width))
    panels = padded.unflatten(-2, (-1, width)).transpose(-1, -2)  # (…, panels, i, NR)
    if weight.dtype == torch.bfloat16 and has_bf16_pairs():
        return _paired(panels)
    if weight.dtype == torch.bfloat16:
        # outputs j and j + NR/2 side by side: one 32-bit load then gives two vectors
        panels = panels.unflatten(-1, (2, width // 2)).transpose(-1, -2).flatten(-2)
    return panels.contiguous()


def _paired(panels: Tensor) -> Tensor:
    """Panels (…, i, NR) whose values lie by pairs of inputs, (i/2, NR, 2) and behind them the last of an odd number."""
    inputs, width = panels.shape[-2:]
    pairs, last = panels.split((inputs // 2 * 2, inputs % 2), dim=-2)
    pairs = pairs.unflatten(-2, (-1, 2)).transpose(-1, -2)  # (…, i/2, NR, 2)
    return torch.cat((pairs.flatten(-3), last.flatten(-2)), dim=-1).unflatten(-1, (inputs, width))


def linear(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    """x (…, i) float32 times a packed weight of `outputs` rows, plus bias (o,): (…, o)."""
    rows = dense(x if x.ndim == 2 else x.flatten(0, -2))  # (r, i)
    y = x.new_empty(*x.shape[:-1], outputs)
    call = function("tt_linear", "pll pi ll p pi")
    call(
        *(rows.data_ptr(), rows.stride(0), rows.shape[0]),
        *(panels.data_ptr(), panels.dtype == torch.bfloat16, outputs, x.shape[-1]),
        None if bias is None else bias.data_ptr(),
        *(y.data_ptr(), threads()),
    )
    return y
