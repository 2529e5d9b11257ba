"""The one place that picks what runs a tower: a backend that is there and fits, or the reference."""

import functools
import logging
import warnings
from typing import NamedTuple

import torch

from twotower.backends import native
from twotower.backends.native.build import kernels
from twotower.backends.native.compile import find_compilers
from twotower.backends.protocol import Backend, BackendChoice, StateDtypes
from twotower.config import TwoTowerConfig
from twotower.errors import SettingError
from twotower.model.head import Head
from twotower.model.time_conditioning import TimeConditioning
from twotower.model.tower import Tower
from twotower.model.two_tower import TwoTower
from twotower.ops.linear import activation_dtype, pack

logger = logging.getLogger(__name__)

# "reference" is PyTorch on any device and dtype; "native" C on a CPU, with float32 activations.
BACKENDS = ("reference", "native")
# What a CPU loses without the C kernels, see docs/hardware.md
SLOWDOWN = "3 to 9 times slower"


def choose_backend(
    device_type: str, dtype: torch.dtype, wanted: str | None = None, config: TwoTowerConfig | None = None
) -> BackendChoice:
    """What runs a tower of weights of `dtype` on a device: `wanted`, or the fastest there is that runs every layer of
    `config`. None in the place of the config is one of the usual layers.

    Raises SettingError where `wanted` is unknown or can't run here.
    """
    if wanted is not None and wanted not in BACKENDS:
        raise SettingError("backend", wanted, f"one of {', '.join(BACKENDS)}", "leave it out for the fastest there is")
    lacks = None if config is None else native.missing(config)
    what = f"{str(dtype).removeprefix('torch.')} on {device_type}"
    if wanted == "reference":
        return BackendChoice("reference", "asked for")
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        if wanted == "native":
            rule = f"a backend that runs {what}: native runs bfloat16 and float32 on cpu"
            raise SettingError("backend", wanted, rule, "use 'reference' or leave it out")
        choice = BackendChoice("reference", f"{what}: native runs only bfloat16 and float32 on cpu")
    elif lacks is not None:
        if wanted == "native":
            rule = f"a backend that runs this model: native lacks {lacks}"
            raise SettingError("backend", wanted, rule, "use 'reference' or leave it out")
        choice = BackendChoice("reference", f"{what}: native lacks {lacks}")
    elif kernels().library is None:
        if wanted == "native":
            rule = f"a backend that can run here, and the C kernels can't: {kernels().problem}"
            raise SettingError("backend", wanted, rule, f"{kernels().remedy}, or leave backend out")
        why = f"the C kernels can't run here: {kernels().problem}"
        loss = f"decoding on this CPU is {SLOWDOWN}, and verified is ar up to rounding alone"
        advice = f"{loss}, because {why}; {kernels().remedy}"
        choice = BackendChoice("reference", f"{what}; {why}", advice)
    else:
        why = "asked for" if wanted else f"{what}: the C kernels are faster"
        choice = BackendChoice("native", f"{why}; {kernels().origin}")
    _log_choice(choice)
    return choice


@functools.cache
def _log_choice(choice: BackendChoice) -> None:
    logger.info("backend %s (%s)", choice.name, choice.reason)


class NativeBuild(NamedTuple):
    """The first C compiler that was found, and the kernels' library, as paths; None for what is not there."""

    compiler: str | None
    library: str | None


def native_build() -> NativeBuild:
    """What the native backend has on this machine; compiles it where that is needed and wasn't done before."""
    opened = kernels().library
    return NativeBuild(next(iter(find_compilers()), None), None if opened is None else opened._name)


def state_dtypes(choice: BackendChoice, device_type: str, dtype: torch.dtype, config: TwoTowerConfig) -> StateDtypes:
    """What the states of a packed tower are made of, which `choice` runs on a device with weights of `dtype`."""
    if choice.name == "native":
        backend: Backend = native
        return backend.state_dtypes(config, dtype)
    reference = activation_dtype(device_type, dtype)
    return StateDtypes(reference, reference)


def pack_(model: TwoTower, wanted: str | None = None) -> None:
    """Gives every constant weight the layout that is fastest on its device; afterwards the model is for inference only.

    Each tower gets `wanted`, or the fastest backend for its device, and `model.backends` says which and why. Raises
    SettingError where `wanted` can't run. Warns, once in a process, where something that can be mended makes it slow.
    """
    dtype = model.context_tower.embeddings.dtype
    context = choose_backend(model.context_device.type, dtype, wanted, model.config)
    denoiser = choose_backend(model.denoiser_device.type, dtype, wanted, model.config)
    model.untie_heads_()
    _pack_side_(context, model.context_tower, [model.context_lm_head])
    _pack_side_(denoiser, model.denoiser_tower, [model.lm_head, model.time_conditioning])
    model.backends = {"context tower": context, "denoiser tower": denoiser}
    for choice in (context, denoiser):
        if choice.advice:
            _advise(choice.advice)


def pack_denoiser_(model: TwoTower, wanted: str | None = None) -> None:
    """`pack_` of the denoiser alone, for a model whose context tower something else runs."""
    dtype = model.denoiser_tower.embeddings.dtype
    denoiser = choose_backend(model.denoiser_device.type, dtype, wanted, model.config)
    model.untie_heads_()
    _pack_side_(denoiser, model.denoiser_tower, [model.lm_head, model.time_conditioning])
    model.backends = {"denoiser tower": denoiser}


@functools.cache
def _advise(advice: str) -> None:
    """Warns once in a process, however many towers and models it opens and whatever filters of warnings say."""
    warnings.warn(advice, stacklevel=4)  # where `load` was called


def _pack_side_(choice: BackendChoice, tower: Tower, others: list[Head | TimeConditioning]) -> None:
    if choice.name == "native":
        backend: Backend = native
        backend.take_tower_(tower)
        for module in others:
            module.pack_(tower.activation_dtype, backend.pack_weight)
    else:
        dtype = activation_dtype(tower.embeddings.device.type, tower.embeddings.dtype)
        for part in (tower, *others):
            part.pack_(dtype, pack)
