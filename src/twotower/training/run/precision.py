"""Making a model compute in bfloat16, while its optimiser keeps float32 weights."""

from collections.abc import Collection

import torch
from torch import nn

from twotower.model.one_tower import OneTower
from twotower.model.time_conditioning import TimeConditioning
from twotower.model.tower import Tower
from twotower.model.two_tower import TwoTower
from twotower.training.run.low_rank import plain_name


def coarse_parameters(model: TwoTower | OneTower, dtype: torch.dtype) -> list[nn.Parameter]:
    """The parameters that a model of `dtype` holds in `dtype`: all but the routers and the A, D and dt_bias of `M`
    layers, which stay float32."""
    with torch.device("meta"):
        named = type(model)(model.config, dtype=dtype).named_parameters(remove_duplicate=False)
        coarse = {name for name, parameter in named if parameter.dtype == dtype}
    return [parameter for name, parameter in model.named_parameters() if plain_name(name) in coarse]


def compute_in_(model: TwoTower | OneTower, dtype: torch.dtype, keep: Collection[nn.Parameter]) -> None:
    """Makes the model compute as a model of `dtype` does: rounds its parameters, except those in `keep`."""
    kept = {id(parameter) for parameter in keep}
    for parameter in coarse_parameters(model, dtype):
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Tower):
            module.activation_dtype = dtype
        elif isinstance(module, TimeConditioning):
            module.released_dtype = dtype
