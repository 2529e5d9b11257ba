"""The `G` mixer: a gated delta net. Letters: b batch, s tokens, d width, h heads, p value width, g key heads,
n key width, c = h·p + 2·g·n, w conv kernel."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Linear, Pack
from twotower.model.recurrent import Scanned, scan_to_marks
from twotower.model.state import MambaState
from twotower.ops.conv import conv_silu, next_past
from twotower.ops.delta import DeltaInputs, delta_scan, delta_state, unit
from twotower.ops.norm import gated_group_rms_norm
from twotower.ops.ssd import ScanOutput, time_steps


class DeltaLayerInputs(NamedTuple):
    """One layer's inputs for s tokens: gate z (b, s, h·p), values, keys and queries before the convolution (b, s, c),
    and what the scan reads."""

    z: Tensor
    vkq: Tensor
    scan: DeltaInputs


class DeltaNet(nn.Module):
    """A projection, a causal convolution and the gated delta rule over the tokens; see `ops.delta` for the recurrence.

    The state H (b, h, p, n) and the convolution's last rows are held as Mamba-2's are. A block of the denoiser starts,
    as a Mamba-2 layer's does, from the context tower's: H_0 is its state after all tokens before the block, and the
    first w-1 convolutions read its rows. From there on the layer computes, with its own weights, the recurrence over
    the block's noisy tokens from left to right; the state at the end of a block is dropped.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        h, bc = config.mamba_num_heads, config.mamba_num_groups * config.mamba_state_size
        self.sizes = (config.mamba_width, config.mamba_width, bc, bc, h, h)  # z, v, k, q, a, β
        self.in_proj = Linear(config.hidden_size, sum(self.sizes), bias=False, dtype=dtype)
        # One row per tap, as in `Mamba2`
        self.conv_taps = nn.Parameter(torch.empty(config.conv_kernel, config.conv_width, dtype=dtype))
        wide = torch.promote_types(dtype, torch.float32)
        self.dt_bias = nn.Parameter(torch.empty(h, dtype=wide))
        self.A_log = nn.Parameter(torch.empty(h, dtype=wide))
        self.norm = nn.Parameter(torch.empty(config.mamba_head_dim, dtype=dtype))
        self.out_proj = Linear(config.mamba_width, config.hidden_size, bias=False, dtype=dtype)

    def initial_state(self, batch_size: int) -> MambaState:
        """Zeros, in the dtypes that `prepare` gives."""
        c, device, dtype = self.config, self.conv_taps.device, self.conv_taps.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return MambaState(
            torch.zeros(batch_size, c.conv_kernel - 1, c.conv_width, device=device, dtype=dtype),
            torch.zeros(batch_size, c.mamba_num_heads, c.mamba_head_dim, c.mamba_state_size, device=device, dtype=wide),
        )

    def prepare(self, x: Tensor, past: Tensor) -> DeltaLayerInputs:
        """The scan's inputs for x (b, s, d) after the conv rows `past` (b, w-1, c)."""
        z, vkq, gates = self.split(x)
        return DeltaLayerInputs(z, vkq, self.scan_inputs(conv_silu(vkq, past, self.conv_taps, None), gates))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate z (b, s, h·p), what is convolved (b, s, c) and the gates a and β (b, s, 2h) of x (b, s, d)."""
        c = self.config
        z, vkq, gates = self.in_proj(x).split((c.mamba_width, c.conv_width, 2 * c.mamba_num_heads), dim=-1)
        return z, vkq, gates

    def scan_inputs(self, vkq: Tensor, gates: Tensor) -> DeltaInputs:
        """What the scan reads, from v, k and q (…, c) after convolution and SiLU and from the gates (…, 2h):
        a = −exp(A_log)·softplus(a + dt_bias), β = sigmoid(β), keys of length 1 and queries of length n^-0.5."""
        c = self.config
        wide = vkq.to(torch.promote_types(vkq.dtype, torch.float32))
        v, k, q = wide.split(self.sizes[1:4], dim=-1)
        k, q = (unit(part.unflatten(-1, (c.mamba_num_groups, c.mamba_state_size))) for part in (k, q))
        a, beta = gates.chunk(2, dim=-1)
        decay = -self.A_log.exp() * time_steps(a, self.dt_bias, (0.0, float("inf")))
        values = v.unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim))
        return DeltaInputs(values, decay, beta.sigmoid().to(decay.dtype), k, q * c.mamba_state_size**-0.5)

    def outputs(self, inputs: DeltaLayerInputs, state: MambaState, dtype: torch.dtype) -> Tensor:
        """The mixer's output (b, s, d) for all tokens of a block, from the state before it."""
        return self.output(delta_scan(inputs.scan, state.ssm).y, inputs.z, dtype)

    def scan(self, inputs: DeltaLayerInputs, state: MambaState, marks: tuple[int, ...], dtype: torch.dtype) -> Scanned:
        """The mixer's output (b, s, d), the state after the last token, and the states after `marks` tokens."""

        def scan(piece: slice, ssm: Tensor) -> ScanOutput:
            return delta_scan(DeltaInputs(*(v[:, piece] for v in inputs.scan)), ssm)

        y, end, marked = scan_to_marks(scan, inputs.vkq, state, marks)
        return Scanned(self.output(y, inputs.z, dtype), end, marked)

    def advance(
        self, inputs: DeltaLayerInputs, state: MambaState, counts: Tensor | None, end: Tensor | None
    ) -> MambaState:
        """The state after the first counts[b] (b,) tokens of `inputs`, all of them where counts is None; `end` is the
        recurrent state after all tokens, if already known."""
        conv = next_past(inputs.vkq, state.conv, counts)
        if end is None or counts is not None:
            end = delta_state(inputs.scan, state.ssm, counts)
        return MambaState(conv, end)

    def output(self, y: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        """The mixer's output (b, s, d) from the scan's y (b, s, h, p): each head's norm, gate and output projection."""
        c = self.config
        weight = self.norm.to(y.dtype).repeat(c.mamba_num_heads)
        normed = gated_group_rms_norm(y.flatten(2), z, weight, c.mamba_num_heads, c.layer_norm_epsilon, norm_first=True)
        return self.out_proj(normed.to(dtype))

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        self.in_proj.pack_(dtype, pack)
        self.out_proj.pack_(dtype, pack)
        self.conv_taps.data = self.conv_taps.data.to(dtype)

    def released_tensors(self) -> dict[str, Tensor]:
        names = ("z_proj", "v_proj", "k_proj", "q_proj", "a_proj", "b_proj")
        found = {"dt_bias": self.dt_bias.data, "A_log": self.A_log.data, "norm.weight": self.norm.data}
        found["conv1d.weight"] = self.conv_taps.data.t().unsqueeze(1)
        found |= self.in_proj.released_tensors(names, self.sizes)
        return found | self.out_proj.released_tensors(("out_proj",), (self.out_proj.outputs,))
