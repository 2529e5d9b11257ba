"""Compiling a training pass."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

# How often one function may be compiled. Each kind of layer needs a version, more at the ends of the stack and for
# sizes that change.
_VERSIONS = 64


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compile(function)`, with a higher limit on recompilation: by default PyTorch stops compiling a function
    after 8 versions, and a model with several kinds of layers needs more."""
    fast = torch.compile(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._dynamo.config.patch(recompile_limit=_VERSIONS):
            return fast(*args, **kwargs)

    return call
