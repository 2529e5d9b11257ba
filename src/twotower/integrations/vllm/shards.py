"""The keys of a context tower whose heads lie on several devices, brought together on the one with the denoiser.
Letters: l layers, b rows, k KV heads, of a device or of all, t tokens, p head width."""

from typing import Protocol

import torch
from torch import Tensor

from twotower.config import TwoTowerConfig
from twotower.model.state import ContextState, KeyBuffer


class Group(Protocol):
    """What is needed of vLLM's GroupCoordinator."""

    @property
    def world_size(self) -> int:
        """How many devices there are."""

    def gather(self, input_: Tensor, dst: int, dim: int) -> Tensor | None:
        """Those of all devices one after the other along a dimension, on one of them; None on the others."""


def whole_state(state: ContextState, config: TwoTowerConfig, group: Group) -> ContextState | None:
    """The state of all heads on the group's first device, from each device's own; None on the others.

    Every device of the group must call it for the same rows. Where there are several there are no recurrent states.
    """
    if group.world_size == 1:
        return state
    assert isinstance(state.buffer, KeyBuffer)
    assert not state.mamba
    mine = torch.stack([*state.buffer.keys, *state.buffer.values])  # (2 l, b, k, t, p)
    both = group.gather(mine, dst=0, dim=2)
    if both is None:
        return None
    # Where there are more devices than heads, those beside each other have the same one.
    copies = max(1, group.world_size // config.num_key_value_heads)
    keys, values = ([layer.contiguous() for layer in half] for half in both[:, :, ::copies].chunk(2))
    return ContextState(state.lengths, (), KeyBuffer(keys, values, state.lengths), None, state.rope_lengths)
