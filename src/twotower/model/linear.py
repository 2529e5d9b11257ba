"""A projection that can be packed for inference. Letters: i inputs, o outputs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from twotower.ops.linear import PackedWeight, linear

# Packs a constant weight (o, i); None where the plain tensor is the fastest form.
Pack = Callable[[Tensor], PackedWeight | None]


class Linear(nn.Module):
    """weight (o, i) and an optional bias (o,). Several released projections may be stacked in one weight."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None
        self.packed: PackedWeight | None = None

    @property
    def operand(self) -> Tensor | PackedWeight:
        """What `ops.linear.linear` multiplies by."""
        return self.weight if self.packed is None else self.packed

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.operand, self.bias)

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        """Replaces the weight by its packed form for activations of `dtype`; it can't be trained or saved any more."""
        self.packed = pack(self.weight)
        if self.packed is not None:
            del self.weight
        if self.bias is not None:
            self.bias.data = self.bias.data.to(dtype)

    def released_tensors(self, names: Sequence[str], sizes: Sequence[int]) -> dict[str, Tensor]:
        """The released projections `names`, with `sizes` output rows each, as views of the stacked parameter."""
        if self.packed is not None:
            raise ValueError("this model is packed for inference and can't be saved; load it with pack=False")
        found = {f"{n}.weight": w for n, w in zip(names, self.weight.data.split(list(sizes)), strict=True)}
        if self.bias is not None:
            found |= {f"{n}.bias": w for n, w in zip(names, self.bias.data.split(list(sizes)), strict=True)}
        return found
