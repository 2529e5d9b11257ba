"""Compiling a training pass."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

# Versions of one function. Each kind of layer needs one, and again at the ends of the stack and for changing sizes.
_VERSIONS = 64


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compile`, which by itself gives up on a function after 8 versions: fewer than a model of several kinds of
    layers needs."""
    fast = torch.compile(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._dynamo.config.patch(recompile_limit=_VERSIONS):
            return fast(*args, **kwargs)

    return call
