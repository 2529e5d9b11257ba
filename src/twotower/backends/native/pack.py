"""Weights in panels, as the C products read them. Letters: i inputs, o outputs, r rows, NR outputs of a panel.

Where the CPU multiplies bf16 itself, rows are rounded to bf16 beside a bf16 weight, as bf16 activations would be; sums
are float32 everywhere.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.backends.native.call import function, threads


def panel_width() -> int:
    """Outputs side by side in a panel: two vectors of this CPU."""
    return int(function("tt_panel_width")())


def has_bf16_pairs() -> bool:
    """Whether this CPU multiplies bf16 values by pairs; the inputs of a bf16 weight then lie in pairs."""
    return bool(function("tt_bf16_pairs")())


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
    """Panels (…, i, NR) with their values by pairs of inputs, (i/2, NR, 2), and the last of an odd number behind."""
    inputs, width = panels.shape[-2:]
    pairs, last = panels.split((inputs // 2 * 2, inputs % 2), dim=-2)
    pairs = pairs.unflatten(-2, (-1, 2)).transpose(-1, -2)  # (…, i/2, NR, 2)
    return torch.cat((pairs.flatten(-3), last.flatten(-2)), dim=-1).unflatten(-1, (inputs, width))


@dataclasses.dataclass(frozen=True)
class PanelWeight:
    """A weight of `outputs` rows in panels (o/NR, i, NR)."""

    panels: Tensor
    outputs: int

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (…, i) float32 times the weight, plus bias (o,): (…, o)."""
        rows = x if x.ndim == 2 else x.flatten(0, -2)  # (r, i)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        y = x.new_empty(*x.shape[:-1], self.outputs)
        function("tt_linear")(
            *(rows.data_ptr(), rows.stride(0), rows.shape[0]),
            *(self.panels.data_ptr(), self.panels.dtype == torch.bfloat16, self.outputs, x.shape[-1]),
            None if bias is None else bias.data_ptr(),
            *(y.data_ptr(), threads()),
        )
        return y


def pack_weight(weight: Tensor) -> PanelWeight:
    """Packs a constant weight (o, i), bf16 or float32, for products with float32 rows."""
    return PanelWeight(pack_panels(weight), weight.shape[0])
