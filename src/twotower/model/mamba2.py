"""The `M` mixer: Mamba-2. Letters: b batch, s tokens, d width, h heads, p head width, g groups, n state width,
c = h·p + 2·g·n, w conv kernel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Linear, Pack
from twotower.model.recurrent import Scanned, scan_to_marks
from twotower.model.state import MambaState
from twotower.ops.conv import conv_silu, next_past
from twotower.ops.norm import gated_group_rms_norm
from twotower.ops.ssd import ScanInputs, ScanOutput, ssd_output, ssd_scan, ssd_state, time_steps


class MambaInputs(NamedTuple):
    """One layer's inputs for s tokens: gate z (b, s, h·p), xBC before the convolution (b, s, c), and what the scan
    reads."""

    z: Tensor
    xbc: Tensor
    scan: ScanInputs


class Mamba2(nn.Module):
    """A projection, a causal convolution and a gated scan over the tokens; see `ops.ssd` for the recurrence."""

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.packed_A: Tensor | None = None  # A of a packed model, whose A_log no longer changes
        # Of mean squares over all devices, where each has a part of the norm's one group
        self.mean: Callable[[Tensor], Tensor] | None = None
        heads = config.mamba_num_heads
        self.in_proj = Linear(
            config.hidden_size, config.mamba_width + config.conv_width + heads, bias=config.use_bias, dtype=dtype
        )
        # One row per tap: the released (c, 1, w) is a view of it.
        self.conv_taps = nn.Parameter(torch.empty(config.conv_kernel, config.conv_width, dtype=dtype))
        self.conv_bias = nn.Parameter(torch.empty(config.conv_width, dtype=dtype)) if config.use_conv_bias else None
        # At least float32 in every model, as the scan is
        wide = torch.promote_types(dtype, torch.float32)
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=wide))
        self.A_log = nn.Parameter(torch.empty(heads, dtype=wide))
        self.D = nn.Parameter(torch.empty(heads, dtype=wide))
        self.norm = None if config.mamba_norm is None else nn.Parameter(torch.empty(config.mamba_width, dtype=dtype))
        self.out_proj = Linear(config.mamba_width, config.hidden_size, bias=config.use_bias, dtype=dtype)

    def initial_state(self, batch_size: int) -> MambaState:
        """Zeros, in the dtypes that `prepare` gives."""
        c = self.config
        device, dtype = self.conv_taps.device, self.conv_taps.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return MambaState(
            torch.zeros(batch_size, c.conv_kernel - 1, c.conv_width, device=device, dtype=dtype),
            torch.zeros(batch_size, c.mamba_num_heads, c.mamba_head_dim, c.mamba_state_size, device=device, dtype=wide),
        )

    def prepare(self, x: Tensor, past: Tensor) -> MambaInputs:
        """The scan's inputs for x (b, s, d) after the conv rows `past` (b, w-1, c)."""
        z, xbc, dt = self.split(x)
        return MambaInputs(z, xbc, self.scan_inputs(conv_silu(xbc, past, self.conv_taps, self.conv_bias), dt))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate z (b, s, h·p), xBC before the convolution (b, s, c) and dt (b, s, h) of x (b, s, d)."""
        c = self.config
        projected = self.in_proj(x)
        if self.scales is not None:
            projected = projected * self.scales.to(projected.dtype)
        z, xbc, dt = projected.split((c.mamba_width, c.conv_width, c.mamba_num_heads), dim=-1)
        return z, xbc, dt

    @property
    def scales(self) -> Tensor | None:
        """The factors of the input projection's outputs (h·p + c + h,), or None where there are none."""
        c = self.config
        bc = c.mamba_num_groups * c.mamba_state_size
        sizes = (c.mamba_width, c.mamba_width, bc, bc, c.mamba_num_heads)  # z, x, B, C, dt
        parts = [self.D.new_full((n,), scale) for n, scale in zip(sizes, c.mamba_scales, strict=False)]
        return torch.cat(parts) if parts else None

    def scan_inputs(self, xbc: Tensor, dt: Tensor) -> ScanInputs:
        """What the scan reads, from xBC (…, c) after convolution and SiLU and from dt (…, h) before its softplus."""
        c = self.config
        wide = xbc.to(torch.promote_types(xbc.dtype, torch.float32))
        x, B, C = wide.split((c.mamba_width, *(c.mamba_num_groups * c.mamba_state_size,) * 2), dim=-1)
        heads, groups = (c.mamba_num_heads, c.mamba_head_dim), (c.mamba_num_groups, c.mamba_state_size)
        steps = time_steps(dt, self.dt_bias, c.time_step_limit)
        return ScanInputs(x.unflatten(-1, heads), steps, B.unflatten(-1, groups), C.unflatten(-1, groups))

    def outputs(self, inputs: MambaInputs, state: MambaState, dtype: torch.dtype) -> Tensor:
        """The mixer's output (b, s, d) for all tokens of a block, from the state before it."""
        y = ssd_output(inputs.scan, self.A, self.D, state.ssm)
        return self.output(y, inputs.z, dtype)

    def scan(self, inputs: MambaInputs, state: MambaState, marks: tuple[int, ...], dtype: torch.dtype) -> Scanned:
        """The mixer's output (b, s, d), the SSM state after the last token, and the states after `marks` tokens."""

        def scan(piece: slice, ssm: Tensor) -> ScanOutput:
            return ssd_scan(ScanInputs(*(v[:, piece] for v in inputs.scan)), self.A, self.D, ssm)

        y, end, marked = scan_to_marks(scan, inputs.xbc, state, marks)
        return Scanned(self.output(y, inputs.z, dtype), end, marked)

    def advance(self, inputs: MambaInputs, state: MambaState, counts: Tensor | None, end: Tensor | None) -> MambaState:
        """The state after the first counts[b] (b,) tokens of `inputs`, all of them where counts is None.

        This is the replay of an accepted prefix; `end` is the SSM state after all tokens, if already known.
        """
        conv = next_past(inputs.xbc, state.conv, counts)
        if end is None or counts is not None:
            end = ssd_state(inputs.scan, self.A, state.ssm, counts)
        return MambaState(conv, end)

    @property
    def A(self) -> Tensor:
        return -self.A_log.exp() if self.packed_A is None else self.packed_A

    def output(self, y: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        """The mixer's output (b, s, d) from the scan's y (b, s, h, p): gate, norm and output projection."""
        c = self.config
        normed = gated_group_rms_norm(
            y.flatten(2),
            z,
            self.norm,
            c.mamba_num_groups,
            c.layer_norm_epsilon,
            norm_first=c.mamba_norm == "before_gate",
            mean=self.mean,
        )
        return self.out_proj(normed.to(dtype))

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        self.packed_A = -self.A_log.detach().exp()
        self.in_proj.pack_(dtype, pack)
        self.out_proj.pack_(dtype, pack)
        for parameter in (self.conv_taps, self.conv_bias):
            if parameter is not None:
                parameter.data = parameter.data.to(dtype)
        if self.norm is not None:
            self.norm.data = self.norm.data.to(self.D.dtype)

    def released_tensors(self) -> dict[str, Tensor]:
        found = {"dt_bias": self.dt_bias.data, "A_log": self.A_log.data, "D": self.D.data}
        found["conv1d.weight"] = self.conv_taps.data.t().unsqueeze(1)
        if self.conv_bias is not None:
            found["conv1d.bias"] = self.conv_bias.data
        found |= self.in_proj.released_tensors(("in_proj",), (self.in_proj.outputs,))
        if self.norm is not None:
            found["norm.weight"] = self.norm.data
        return found | self.out_proj.released_tensors(("out_proj",), (self.out_proj.outputs,))
