"""Parameters, gradients and optimiser state spread over the ranks (FSDP2)."""

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
    """Shards the parameters of `root` over the ranks, except those in `whole`.

    Each of `groups` is gathered for as long as it is used, what is in none while `root` is. `dtype` None gathers
    parameters as they are; gradients are float32 sums over the ranks, not means.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
    )
    for modules in groups:
        fully_shard(modules, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
    register_fsdp_forward_method(root, "measure")
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def drop_gathered_(root: nn.Module) -> None:
    """Lets go of the parameters that a sharded `root` keeps whole after a forward pass, so that they are gathered anew:
    they have changed."""
    if isinstance(root, FSDPModule):
        root.reshard()
