"""Parameters, gradients and optimiser state sharded over the ranks, by PyTorch's FSDP2 (`fully_shard`)."""

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from twotower.training.run.ranks import Ranks


def shard_(
    root: nn.Module,
    groups: Sequence[list[nn.Module]],
    ranks: Ranks,
    *,
    dtype: torch.dtype | None,
    whole: Collection[nn.Parameter],
) -> None:
    """Shards the parameters of `root` over the ranks, except those in `whole`, which every rank keeps.

    The parameters of each of `groups` are gathered while its modules run, those in no group while `root` runs, in
    `dtype` (None: as they are). Gradients are sums over the ranks, not means, in float32.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
    )
    for modules in groups:
        fully_shard(modules, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
    for name in ("prepare", "measure"):  # what computes with the model beside its forward pass
        register_fsdp_forward_method(root, name)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def drop_gathered_(root: object) -> None:
    """Frees the whole parameters that a sharded `root` keeps after a forward pass, so that the next pass gathers them
    anew. Needed where the shards have changed in between. Does nothing for a module that is not sharded."""
    if isinstance(root, FSDPModule):
        root.reshard()
