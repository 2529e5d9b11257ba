"""All layers of a tower in one call to C, see tower.c: its structures, field by field."""

import ctypes
from typing import Any

from torch import Tensor

from twotower.ops.native.call import DOUBLE, LONG, POINTER, function, threads


def _fields(longs: str = "", *, pointers: str = "", doubles: str = "") -> list[tuple[str, Any]]:
    named = [(name, POINTER) for name in pointers.split()]
    return named + [(name, DOUBLE) for name in doubles.split()] + [(name, LONG) for name in longs.split()]


class Product(ctypes.Structure):
    """A packed weight of `outputs` rows and its bias, null where there is none."""

    _fields_ = _fields("outputs", pointers="weight bias")


class LayerWeights(ctypes.Structure):
    """One layer. `kind` is its letter; `first` and `second` are in and out projections (M), qkv and o (*), up and down
    (-) or the shared expert's (E); what a kind does not have is null."""

    _fields_ = [
        *_fields("kind"),
        *_fields(pointers="norm"),
        ("first", Product),
        ("second", Product),
        *_fields(pointers="taps conv_bias dt_bias A D gate_norm"),
        *_fields(pointers="router correction up down up_bias down_bias"),
    ]


class Shape(ctypes.Structure):
    """What every layer of a tower agrees on."""

    _fields_ = [
        *_fields("num_layers width bf16"),
        *_fields(doubles="eps"),
        *_fields("mamba_heads mamba_head mamba_groups state kernel"),
        *_fields(doubles="shortest longest"),
        *_fields("heads kv_heads head gated experts active groups kept normalise expert"),
        *_fields(doubles="factor"),
    ]


class Pass(ctypes.Structure):
    """What one pass reads and writes."""

    _fields_ = [
        *_fields("b s threads", pointers="x hidden norm"),
        *_fields("angle_batch", pointers="modulation cosine sine"),
        *_fields("keeps", pointers="memory projected convolved steps"),
        *_fields("num_cuts causal", pointers="ends cuts"),
        *_fields("num_pages page_size key_batch key_head key_token", pointers="starts widths places pages"),
    ]


def run(shape: Shape, layers: "ctypes.Array[LayerWeights]", what: Pass) -> None:
    function("tt_tower", "ppp")(ctypes.addressof(shape), ctypes.addressof(layers), ctypes.addressof(what))


def advance(
    shape: Shape,
    layers: "ctypes.Array[LayerWeights]",
    memory: int,
    saved: list[Tensor],
    counts: Tensor | None,
    conv: Tensor,
    ssm: Tensor | None,
) -> None:
    """Writes the `M` layers' states after some tokens of a pass to `conv` and, where it is given, `ssm`.

    `memory` is the address of the pass's; `saved` are its projected, convolved and steps.
    """
    _, b, s, _ = saved[0].shape
    call = function("tt_advance", "ppp ppp ll ppp i")
    call(
        *(ctypes.addressof(shape), ctypes.addressof(layers), memory),
        *(v.data_ptr() for v in saved),
        *(b, s, None if counts is None else counts.data_ptr()),
        *(conv.data_ptr(), None if ssm is None else ssm.data_ptr(), threads()),
    )
