"""Moving released tensors one at a time: from a checkpoint into the shards of ranks, and from a saved state into a
checkpoint. No process ever holds the whole model.

A released tensor is a part of a parameter where the model fuses several: rows of a fused projection, an expert of a
stack of experts.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from twotower.model.one_tower import OneTower
from twotower.model.time_conditioning import TimeConditioning, frequencies
from twotower.model.two_tower import TwoTower
from twotower.training.objectives.protocol import Objective
from twotower.training.run.checkpointing import read_tensor
from twotower.training.run.low_rank import LowRank, plain_name
from twotower.training.run.ranks import Ranks

# Released names and tensors, one at a time.
TensorStream = Iterator[tuple[str, Tensor]]

# How many whole parameters are kept while their parts are written. The released order goes through an expert layer
# expert by expert, and so in turn through the stacks of up and down projections and their biases.
_HELD = 4


class _TensorPlace(NamedTuple):
    """The elements of a parameter that are a released tensor, in the terms of `Tensor.as_strided`."""

    parameter: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        return whole.as_strided(self.shape, self.stride, self.offset)

    @property
    def order(self) -> list[int]:
        """The dimensions of the released tensor in the order in which the parameter stores them."""
        return sorted(range(len(self.shape)), key=lambda dim: self.stride[dim], reverse=True)


def _places(model: TwoTower | OneTower) -> dict[str, _TensorPlace]:
    """Released name -> place, found in a new model of the same shapes, without low-rank additions, on the meta device.
    Views share their parameter's storage, which tells whose part they are."""
    with torch.device("meta"):
        plain = type(model)(model.config)
    owners = {parameter.untyped_storage()._cdata: name for name, parameter in plain.named_parameters()}
    return {
        name: _TensorPlace(owners[t.untyped_storage()._cdata], tuple(t.shape), t.stride(), int(t.storage_offset()))
        for name, t in plain.released_tensors().items()
    }


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


@torch.no_grad()
def fill_(objective: Objective[Any], tensors: TensorStream, ranks: Ranks) -> None:
    """Moves a sharded model from the meta device to the rank's, and copies the rank's part of each of the released
    `tensors` into its shards."""
    assert isinstance(objective, nn.Module)
    objective._apply(lambda t: torch.empty_like(t, device=ranks.device) if t.is_meta else t.to(ranks.device))
    for module in objective.modules():
        if isinstance(module, TimeConditioning):
            module.frequencies = frequencies(ranks.device)
    places, parameters = _places(objective.model), _parameters(objective.model)
    own = _own(places, parameters)
    for name, tensor in tensors:
        if name in own:
            _copy_part_(parameters[places[name].parameter], places[name], tensor, ranks)


def own_tensors(objective: Objective[Any], weights: Callable[[], TensorStream] | None) -> TensorStream:
    """The released tensors that a model starts from, without low-rank additions; tied ones once. `weights` streams them
    where the model is on the meta device."""
    places, parameters = _places(objective.model), _parameters(objective.model)
    own = _own(places, parameters)
    stream = ((n, p.of(parameters[p.parameter].data)) for n, p in places.items()) if weights is None else weights()
    return ((name, tensor) for name, tensor in stream if name in own)


def _own(places: Mapping[str, _TensorPlace], parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The released names that fill the model. Where two name the same elements, in tied towers, the later one counts:
    the denoiser's."""
    return set({(id(parameters[p.parameter]), p.offset): name for name, p in places.items()}.values())


def _copy_part_(parameter: nn.Parameter, place: _TensorPlace, tensor: Tensor, ranks: Ranks) -> None:
    """Copies the part of a released tensor that lies in this rank's shard of the parameter.

    FSDP shards a parameter by rows, so a shard is one run of the parameter's elements in memory. A released tensor,
    with its dimensions in the parameter's order, is another, and the two overlap in one run.
    """
    local, start = parameter.data, 0
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        each = -(-parameter.shape[0] // ranks.size)
        start = min(ranks.rank * each, parameter.shape[0]) * math.prod(parameter.shape[1:])
    first, last = max(start, place.offset), min(start + local.numel(), place.offset + tensor.numel())
    if first < last:
        part = tensor.permute(place.order).reshape(-1)[first - place.offset : last - place.offset]
        local.view(-1)[first - start : last - start].copy_(part)


def trained_tensors(objective: Objective[Any], state: Path, group: str, released: TensorStream) -> TensorStream:
    """Every released tensor of a trained model, one at a time: from the saved `state` where it was trained, plus its
    low-rank addition where it has one, else unchanged from `released`, the tensors that the run started from.

    `group` is the state's group of weights, "weights" or "ema". `objective` is on the meta device and says what is
    trained.
    """
    places, parameters = _places(objective.model), _parameters(objective.model)
    stored_names = {id(p): name for name, p in objective.named_parameters() if p.requires_grad}
    # Parameter that stays -> where the state has the addition to it, and the module that computes it
    additions = {
        plain_name(name).removesuffix(".0"): (f"{group}.model.{name}", module)
        for name, module in objective.model.named_modules()
        if isinstance(module, LowRank)
    }

    @functools.lru_cache(maxsize=_HELD)
    def trained(name: str) -> Tensor:
        return read_tensor(state, f"{group}.{name}")

    @functools.lru_cache(maxsize=_HELD)
    def addition(parameter: str) -> Tensor:
        prefix, module = additions[parameter]
        factors = {part: read_tensor(state, f"{prefix}.{part}") for part in ("up", "down")}
        return functional_call(module, factors, (torch.zeros(()),))  # added to a weight of 0

    for name, tensor in released:
        place = places[name]
        stored_name = stored_names.get(id(parameters[place.parameter]))
        if stored_name is not None:
            tensor = place.of(trained(stored_name))
        elif place.parameter in additions:
            tensor = tensor.float() + place.of(addition(place.parameter))
        yield name, tensor
