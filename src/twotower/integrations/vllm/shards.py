"""The denoiser divided over the devices that share the context tower's layers, as vLLM divides that one.

Each device has as many heads and as much of every inner width as the others, so that a block on it reads the keys and
recurrent states in the device's own cache. What the devices' mixers give is added up, and their logits, each of a part
of the vocabulary, are put beside each other (Megatron-LM, arXiv 1909.08053). As every device then has the same logits,
to the bit, all of them commit the same tokens.
"""

import dataclasses
import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.attention import Attention
from twotower.model.head import Head
from twotower.model.linear import Linear, Pack
from twotower.model.mamba2 import Mamba2
from twotower.model.two_tower import TwoTower

# Of which each device has an equal part
_DIVIDED = (
    "num_attention_heads",
    "mamba_num_heads",
    "intermediate_size",
    "expert_intermediate_size",
    "shared_expert_intermediate_size",
)


class Group(Protocol):
    """What is needed of vLLM's GroupCoordinator."""

    @property
    def world_size(self) -> int:
        """How many devices there are."""

    @property
    def rank_in_group(self) -> int:
        """Which of them this one is, from 0."""

    def all_reduce(self, input_: Tensor) -> Tensor:
        """The sum of all devices' tensors, on each of them."""

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """Those of all devices one after the other along a dimension, on each of them."""


def narrowed(config: TwoTowerConfig, size: int) -> TwoTowerConfig:
    """The config of what each of `size` devices has. KV heads that are fewer than devices, and the only group of Mamba
    layers, are on several of them. Raises ValueError for a number that can't be divided so."""
    whole: dict[str, Any] = {name: getattr(config, name) for name in _DIVIDED}
    kv, groups = config.num_key_value_heads, config.mamba_num_groups
    problems = [f"{name} {value} is no multiple of {size}" for name, value in whole.items() if value % size]
    if kv and kv % size and size % kv:
        problems.append(f"num_key_value_heads {kv} is no multiple of {size} and no divisor")
    if groups > 1 and groups % size:
        problems.append(f"n_groups {groups} is not 1 and no multiple of {size}")
    if problems:
        raise ValueError(
            f"--tensor-parallel-size is {size}, must divide the denoiser: {'; '.join(problems)}; choose another size"
        )
    parts = {name: value // size for name, value in whole.items()}
    parts |= {"num_key_value_heads": -(-kv // size), "mamba_num_groups": -(-groups // size)}
    return dataclasses.replace(config, **parts)


def cut(name: str, tensor: Tensor, config: TwoTowerConfig, group: Group) -> Tensor:
    """What this device has of a tensor of the denoiser, by its released name; `config` is that of the whole model."""
    size, rank = group.world_size, group.rank_in_group
    if name == "lm_head.weight":
        rows = -(-config.vocab_size // size)
        return F.pad(tensor, (0, 0, 0, rows * size - config.vocab_size))[rank * rows : (rank + 1) * rows]
    q, kv, h, g = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.mamba_num_heads,
        config.mamba_num_groups,
    )
    x, bc = (h, config.mamba_head_dim), (g, config.mamba_state_size)
    stacked = {"in_proj.weight": (x, x, bc, bc, (h, 1)), "conv1d.weight": (x, bc, bc), "conv1d.bias": (x, bc, bc)}
    rows_of = {"q_proj.weight": q, "k_proj.weight": kv, "v_proj.weight": kv, "up_proj.weight": size}
    rows_of |= {"gate_proj.weight": size, "norm.weight": h, "dt_bias": h, "A_log": h, "D": h}
    columns_of = {"o_proj.weight": q, "out_proj.weight": h, "down_proj.weight": size}

    def share(whole: Tensor, units: int, dim: int = 0) -> Tensor:
        parts = min(units, size)  # neighbours have the same one where there are more devices
        return whole.chunk(parts, dim)[rank * parts // size]

    part = ".".join(name.partition(".mixer.")[2].split(".")[-2:])
    if part in stacked:
        pieces = tensor.split([units * width for units, width in stacked[part]])
        return torch.cat([share(piece, units) for piece, (units, _) in zip(pieces, stacked[part], strict=True)])
    if part in columns_of:
        return share(tensor, columns_of[part], dim=1)
    return share(tensor, rows_of[part]) if part in rows_of else tensor


def join_(model: TwoTower, config: TwoTowerConfig, group: Group) -> None:
    """Makes the denoiser of a model of a `narrowed` config this device's part of that of the whole `config`."""

    def add_up(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return group.all_reduce(output)

    def mean(squares: Tensor) -> Tensor:
        return group.all_reduce(squares) / group.world_size

    for layer in model.denoiser_tower.stack:
        mixer = layer.mixer
        if isinstance(mixer, Mamba2):
            mixer.out_proj.register_forward_hook(add_up)
            mixer.mean = mean if config.mamba_num_groups == 1 else None
        else:
            last = mixer.o_proj if isinstance(mixer, Attention) else mixer
            last.register_forward_hook(add_up)
    embeddings = model.denoiser_tower.embeddings
    with embeddings.device:
        model.lm_head = HeadShard(config, embeddings.dtype, group)


class HeadShard(Head):
    """The head for this device's part of the vocabulary; its logits are those of all devices."""

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, group: Group) -> None:
        super().__init__(config, dtype)
        rows = -(-config.vocab_size // group.world_size)
        self.linear = Linear(config.hidden_size, rows, bias=False, dtype=dtype)
        self.linear.register_forward_hook(
            lambda module, inputs, output: group.all_gather(output)[..., : config.vocab_size].contiguous()
        )
        self.own = functools.partial(cut, "lm_head.weight", config=config, group=group)

    def tie_(self, embeddings: nn.Parameter) -> None:
        """Makes this device's rows of the embeddings (v, d) the weight."""
        self.linear.weight = nn.Parameter(self.own(embeddings.detach()))

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        """Packs the weight; the mask token's row may be another device's."""
        self.linear.pack_(dtype, pack)
