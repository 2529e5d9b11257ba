"""Activation checkpointing: recomputing in backward instead of keeping."""

from collections.abc import Callable
from typing import TypeVar

from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def maybe_recomputed(recompute: bool, function: Callable[..., T], *arguments: object) -> T:
    """function(*arguments). With `recompute` only the arguments are kept for backward, which calls the function again;
    it must therefore draw nothing at random."""
    if not recompute:
        return function(*arguments)
    result: T = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
