"""Host values to a device, without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[object] | Tensor, device: torch.device) -> Tensor:
    """A tensor of numbers or of nested sequences of them on a device; a CPU tensor is moved there.

    torch.tensor(…, device=…) would wait until a GPU has done all that it was asked to do before.
    """
    held = values if isinstance(values, Tensor) else torch.tensor(values)
    return held.to(device, non_blocking=True)
