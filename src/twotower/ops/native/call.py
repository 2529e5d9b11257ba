"""How the wrappers call C. Letters as in each op."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twotower.ops.native.build import library

POINTER, LONG, INT, FLOAT, DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_float,
    ctypes.c_double,
)
# One letter per argument: p pointer, l long, i int, f float, d double.
_TYPES = {"p": POINTER, "l": LONG, "i": INT, "f": FLOAT, "d": DOUBLE}


@functools.cache
def function(name: str, signature: str) -> Callable[..., Any]:
    """The C function `name`, whose arguments have the types that the letters of `signature` name."""
    opened = library()
    if opened is None:
        raise RuntimeError("the C kernels need a C compiler (cc, gcc or clang); install one or use 'reference'")
    found = getattr(opened, name)
    found.argtypes = [_TYPES[letter] for letter in signature.replace(" ", "")]
    found.restype = None if signature else ctypes.c_int  # constants of this CPU
    return found


def dense(x: Tensor) -> Tensor:
    """x with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def threads() -> int:
    return torch.get_num_threads()
