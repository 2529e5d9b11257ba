"""The `S` and `R` mixers: Mamba-1 and the RG-LRU. Letters: b batch, s tokens, d width, c channels, e channels that are
convolved, n state width, w conv kernel."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Linear, Pack
from twotower.model.mamba1 import Mamba1
from twotower.model.recurrent import Scanned, scan_to_marks
from twotower.model.rg_lru import RGLRU
from twotower.model.state import MambaState
from twotower.ops.conv import causal_conv, next_past
from twotower.ops.selective_scan import SelectiveInputs, selective_scan, selective_state
from twotower.ops.ssd import ScanOutput


class SelectiveLayerInputs(NamedTuple):
    """One layer's inputs for s tokens: gate z (b, s, c), what is convolved (b, s, e), and what the scan reads."""

    z: Tensor
    rows: Tensor
    scan: SelectiveInputs


class SelectiveMixer(nn.Module):
    """A projection to channels and a gate, a causal convolution, and a scan with decays of its own for every channel,
    whose inputs `core` makes; see `ops.selective_scan` for the recurrence.

    The state is h (b, c, n) and the last rows of what is convolved. A block of the denoiser starts, as a Mamba-2
    layer's does, from the context tower's: with h' and row' those of the context tower and L tokens before the block,

        row_i = row'_{L+i} for i ≤ 0,   h_0 = h'_L,   h_i = exp(dt_i·A)·h_{i-1} + u_i·B_i for i = 1 … s

    where A is the denoiser's own, and dt, u and B are what it makes of its block's noisy tokens and the rows before
    them. It goes from left to right, and the state at the end of a block is dropped.
    """

    def __init__(self, config: TwoTowerConfig, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.mamba_width
        self.core = Mamba1(config, dtype) if kind == "S" else RGLRU(config, dtype)
        self.in_proj = Linear(config.hidden_size, 2 * width, bias=config.use_bias, dtype=dtype)
        # One row per tap, as in `Mamba2`
        self.conv_taps = nn.Parameter(torch.empty(config.conv_kernel, width, dtype=dtype))
        self.conv_bias = nn.Parameter(torch.empty(width, dtype=dtype)) if config.use_conv_bias else None
        self.out_proj = Linear(width, config.hidden_size, bias=config.use_bias, dtype=dtype)

    def initial_state(self, batch_size: int) -> MambaState:
        """Zeros, in the dtypes that `prepare` gives."""
        (w, c), dtype = self.conv_taps.shape, self.conv_taps.dtype
        A = self.core.A
        return MambaState(
            torch.zeros(batch_size, w - 1, c + self.core.counts, device=A.device, dtype=dtype),
            torch.zeros(batch_size, *A.shape, device=A.device, dtype=A.dtype),
        )

    def prepare(self, x: Tensor, past: Tensor) -> SelectiveLayerInputs:
        """The scan's inputs for x (b, s, d) after the conv rows `past` (b, w-1, e)."""
        z, rows = self.split(x)
        return SelectiveLayerInputs(z, rows, self.core.scan_inputs(causal_conv(rows, past, *self.kernel)))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gate z (b, s, c) and what is convolved (b, s, e) of x (b, s, d)."""
        rows, z = self.in_proj(x).chunk(2, dim=-1)
        return z, torch.cat((rows, torch.ones_like(rows[..., :1])), dim=-1) if self.core.counts else rows

    @property
    def kernel(self) -> tuple[Tensor, Tensor | None]:
        """The convolution's taps (w, e) and bias (e,). Where a core `counts`, a channel of ones comes out as what it
        was one token before: 1, or 0 where a text begins."""
        if not self.core.counts:
            return self.conv_taps, self.conv_bias
        one_before = torch.zeros_like(self.conv_taps[:, :1])
        one_before[-2] = 1.0
        bias = None if self.conv_bias is None else F.pad(self.conv_bias, (0, 1))
        return torch.cat((self.conv_taps, one_before), dim=1), bias

    def outputs(self, inputs: SelectiveLayerInputs, state: MambaState, dtype: torch.dtype) -> Tensor:
        """The mixer's output (b, s, d) for all tokens of a block, from the state before it."""
        return self.output(selective_scan(inputs.scan, self.core.A, state.ssm).y, inputs.z, dtype)

    def scan(
        self, inputs: SelectiveLayerInputs, state: MambaState, marks: tuple[int, ...], dtype: torch.dtype
    ) -> Scanned:
        """The mixer's output (b, s, d), the state after the last token, and the states after `marks` tokens."""

        def scan(piece: slice, ssm: Tensor) -> ScanOutput:
            return selective_scan(inputs.scan.pieces(piece), self.core.A, ssm)

        y, end, marked = scan_to_marks(scan, inputs.rows, state, marks)
        return Scanned(self.output(y, inputs.z, dtype), end, marked)

    def advance(
        self, inputs: SelectiveLayerInputs, state: MambaState, counts: Tensor | None, end: Tensor | None
    ) -> MambaState:
        """The state after the first counts[b] (b,) tokens of `inputs`, all of them where counts is None; `end` is the
        recurrent state after all tokens, if already known."""
        conv = next_past(inputs.rows, state.conv, counts)
        if end is None or counts is not None:
            end = selective_state(inputs.scan, self.core.A, state.ssm, counts)
        return MambaState(conv, end)

    def output(self, y: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        """The mixer's output (b, s, d) from the scan's y (b, s, c): gate and output projection."""
        return self.out_proj((y * self.core.gate(z.to(y.dtype))).to(dtype))

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        for part in (self.core, self.in_proj, self.out_proj):
            part.pack_(dtype, pack)
        for parameter in (self.conv_taps, self.conv_bias):
            if parameter is not None:
                parameter.data = parameter.data.to(dtype)

    def released_tensors(self) -> dict[str, Tensor]:
        found = self.core.released_tensors() | {"conv1d.weight": self.conv_taps.data.t().unsqueeze(1)}
        if self.conv_bias is not None:
            found["conv1d.bias"] = self.conv_bias.data
        names = self.core.projections
        found |= self.in_proj.released_tensors(names, (self.in_proj.outputs // len(names),) * len(names))
        return found | self.out_proj.released_tensors(("out_proj",), (self.out_proj.outputs,))
