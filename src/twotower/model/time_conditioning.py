"""The denoiser's conditioning on the noise level t. Letters: b batch, d width, i layers."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Linear, Pack
from twotower.ops.transfer import to_device

NUM_FREQUENCIES = 128
MAX_LEVELS = 64  # noise levels whose modulation is remembered, 0.8 MB each at the released size in bf16


class Modulation(NamedTuple):
    """One layer's shift, scale and gate, each (b, 1, d)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def frequencies(device: torch.device | None = None) -> Tensor:
    """The frequencies of the sinusoids (128,), from 1 down to 1/10000, on `device` or the default one."""
    j = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=device)
    return torch.exp(j * (-math.log(10000.0) / NUM_FREQUENCIES))


class TimeConditioning(nn.Module):
    """Noise level -> sinusoidal embedding -> two MLPs -> (3, d), to which every layer adds its own table."""

    frequencies: Tensor  # (128,)

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        d = self.hidden_size = config.hidden_size
        self.embed_in = Linear(2 * NUM_FREQUENCIES, d, bias=True, dtype=dtype)
        self.embed_out = Linear(d, d, bias=True, dtype=dtype)
        self.block = Linear(d, 3 * d, bias=True, dtype=dtype)
        self.indices = config.denoiser_indices  # of the layers, by which the released tables are named
        self.tables = nn.Parameter(torch.empty(len(self.indices), 3, d, dtype=dtype))
        self.released_dtype = dtype
        self.constant = False  # true once the weights no longer change
        self._known: dict[float, Tensor] = {}
        self.register_buffer("frequencies", frequencies(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Masked fractions t (b,) in [0, 1] to every layer's shift, scale and gate: (i, b, 3, 1, d)."""
        return self.tables[:, None, :, None] + self.shared(t)[None, :, :, None]

    def at(self, t: tuple[float, ...]) -> Tensor:
        """`forward` for levels known on the host: (i, b, 3, 1, d). With constant weights the result for a level is
        remembered: blocks of s positions have only s different levels."""
        if not self.constant:
            return self(to_device(t, self.frequencies.device))
        every = [self._remembered(level) for level in t]
        return every[0] if len(t) == 1 else torch.cat(every, dim=1)

    def _remembered(self, level: float) -> Tensor:
        found = self._known.get(level)
        if found is None:
            if len(self._known) == MAX_LEVELS:
                del self._known[next(iter(self._known))]  # the oldest
            found = self._known[level] = self(to_device((level,), self.frequencies.device))
        return found

    def shared(self, t: Tensor) -> Tensor:
        """(b, 3, d): what t (b,) adds to every layer's own table."""
        dtype = self.tables.dtype
        # The released model casts t before multiplying; in bf16 that rounds 812.5 to 812, and it was trained so.
        scaled = (t.to(self.released_dtype) * 1000).to(torch.promote_types(dtype, torch.float32))
        angles = scaled[:, None] * self.frequencies  # (b, 128)
        embedding = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
        hidden = self.embed_out(F.silu(self.embed_in(embedding)))
        return self.block(F.silu(hidden)).unflatten(-1, (3, -1))

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        for layer in (self.embed_in, self.embed_out, self.block):
            layer.pack_(dtype, pack)
        self.tables.data = self.tables.data.to(dtype)
        self.constant = True

    def released_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, layer in (("t_embedder.mlp.0", self.embed_in), ("t_embedder.mlp.2", self.embed_out)):
            found |= layer.released_tensors((name,), (self.hidden_size,))
        found |= self.block.released_tensors(("t_block.1",), (3 * self.hidden_size,))
        tables = zip(self.indices, self.tables.data, strict=True)
        return found | {f"scale_shift_tables.{i}": table for i, table in tables}
