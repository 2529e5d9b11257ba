"""Weights that no process holds as a whole: into the shards of ranks, and out of a saved state.

Released tensors are parts of parameters: projections that are rows of a fused one, experts of a stack.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from twotower.model.one_tower import OneTower
from twotower.model.time_conditioning import TimeConditioning, frequencies
from twotower.model.two_tower import TwoTower
from twotower.training.denoising import Denoising
from twotower.training.next_token import NextToken
from twotower.training.run.checkpointing import read_tensor
from twotower.training.run.low_rank import LowRank, plain_name
from twotower.training.run.ranks import Ranks

# Released names and tensors
TensorStream = Iterator[tuple[str, Tensor]]

# Parameters that are held while their parts are written: experts' up, down and their biases take turns
_HELD = 4


class _TensorPlace(NamedTuple):
    """Which elements of a parameter a released tensor is, as `Tensor.as_strided` counts them."""

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
    """Released name -> place, of a model of these shapes to which nothing is added."""
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
def fill_(objective: Denoising | NextToken, tensors: TensorStream, ranks: Ranks) -> None:
    """Allocates the parameters of a sharded model on the meta device on the rank's, and copies into each shard its part
    of the released `tensors`."""
    objective._apply(lambda t: torch.empty_like(t, device=ranks.device) if t.is_meta else t.to(ranks.device))
    for module in objective.modules():
        if isinstance(module, TimeConditioning):
            module.frequencies = frequencies(ranks.device)
    places, parameters = _places(objective.model), _parameters(objective.model)
    own = _own(places, parameters)
    for name, tensor in tensors:
        if name in own:
            _copy_part_(parameters[places[name].parameter], places[name], tensor, ranks)


def own_tensors(objective: Denoising | NextToken, weights: Callable[[], TensorStream] | None) -> TensorStream:
    """The released tensors that a model starts from, each place once and without what is added to them; from `weights`
    where the model is on the meta device."""
    places, parameters = _places(objective.model), _parameters(objective.model)
    own = _own(places, parameters)
    stream = ((n, p.of(parameters[p.parameter].data)) for n, p in places.items()) if weights is None else weights()
    return ((name, tensor) for name, tensor in stream if name in own)


def _own(places: Mapping[str, _TensorPlace], parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Names without those that others replace: of tied towers' tensors the denoiser's, which come later, stay."""
    return set({(id(parameters[p.parameter]), p.offset): name for name, p in places.items()}.values())


def _copy_part_(parameter: nn.Parameter, place: _TensorPlace, tensor: Tensor, ranks: Ranks) -> None:
    """A shard is a run of rows, so that its elements follow each other, as do those of a released tensor in `order`."""
    local, start = parameter.data, 0
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        each = -(-parameter.shape[0] // ranks.size)
        start = min(ranks.rank * each, parameter.shape[0]) * math.prod(parameter.shape[1:])
    first, last = max(start, place.offset), min(start + local.numel(), place.offset + tensor.numel())
    if first < last:
        part = tensor.permute(place.order).reshape(-1)[first - place.offset : last - place.offset]
        local.view(-1)[first - start : last - start].copy_(part)


def trained_tensors(objective: Denoising | NextToken, state: Path, group: str, released: TensorStream) -> TensorStream:
    """The tensors of a model as `group` of a state has them: `released`, those that the run started from, with what was
    trained in the place of what it replaces. `objective`, on the meta device, says what that is."""
    model = objective.model
    places, parameters = _places(model), _parameters(model)
    names = {id(p): name for name, p in objective.named_parameters() if p.requires_grad}
    additions = {
        plain_name(name).removesuffix(".0"): (f"model.{name}", module)
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
    }

    @functools.lru_cache(maxsize=_HELD)
    def read(name: str) -> Tensor:
        return read_tensor(state, f"{group}.{name}")

    @functools.lru_cache(maxsize=_HELD)
    def added(name: str) -> Tensor:
        prefix, module = additions[name]
        parts = {part: read_tensor(state, f"{group}.{prefix}.{part}") for part in ("up", "down")}
        return functional_call(module, parts, (torch.zeros(()),))

    for name, tensor in released:
        place = places[name]
        trained = names.get(id(parameters[place.parameter]))
        if trained is not None:
            yield name, place.of(read(trained))
        elif place.parameter in additions:
            yield name, tensor.float() + place.of(added(place.parameter))
        else:
            yield name, tensor
