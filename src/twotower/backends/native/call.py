"""How Python calls C. Structures and argument lists are read from c/calls.h, so that no type is repeated here."""

import ctypes
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from twotower.backends.native.build import kernels
from twotower.backends.native.compile import SOURCES

_TYPES: dict[str, Any] = {
    "long": ctypes.c_long,
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_STRUCTURE = re.compile(r"typedef struct \{(.*?)\} (\w+);", re.DOTALL)
_FUNCTION = re.compile(r"API (\w+) (\w+)\((.*?)\);", re.DOTALL)
_DECLARATION = re.compile(r"(?:const\s+)?(\w+)\b(.*)", re.DOTALL)


class CHeader(NamedTuple):
    """The structures by name, and each function's result and argument types."""

    structures: dict[str, type[ctypes.Structure]]
    functions: dict[str, tuple[Any, list[Any]]]


def read_header(text: str) -> CHeader:
    """Reads what a header declares as `typedef struct {…} Name;` and `API result name(…);`, of numbers, pointers and
    structures declared before. Raises KeyError for any other type."""
    text = _COMMENT.sub("", text)
    structures: dict[str, type[ctypes.Structure]] = {}
    for body, name in _STRUCTURE.findall(text):
        fields = [field for line in body.split(";") if line.strip() for field in _declared(line, structures)]
        structures[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    functions: dict[str, tuple[Any, list[Any]]] = {}
    for result, name, arguments in _FUNCTION.findall(text):
        parts = [] if arguments == "void" else arguments.split(",")
        types = [kind for part in parts for _, kind in _declared(part, structures)]
        functions[name] = (None if result == "void" else _TYPES[result], types)
    return CHeader(structures, functions)


def _declared(line: str, structures: dict[str, type[ctypes.Structure]]) -> list[tuple[str, Any]]:
    """Names and types of one declaration: "const float *x, *y" or "long b, s"."""
    found = _DECLARATION.fullmatch(line.strip())
    assert found is not None, line
    base, names = found.groups()
    fields: list[tuple[str, Any]] = []
    for declarator in names.split(","):
        name = declarator.replace("const", "").strip(" *\n")
        kind = ctypes.c_void_p if "*" in declarator else (_TYPES | structures)[base]
        fields.append((name, kind))
    return fields


@functools.cache
def _header() -> CHeader:
    return read_header((SOURCES / "calls.h").read_text())


@functools.cache
def structure(name: str) -> type[ctypes.Structure]:
    """The C structure `name` as a class."""
    return _header().structures[name]


def filled(name: str, **fields: Any) -> ctypes.Structure:
    """The C structure `name` with some of its fields set and zeros in the others."""
    unknown = fields.keys() - _field_names(name)
    assert not unknown, f"{name} has no {', '.join(sorted(unknown))}"
    return structure(name)(**fields)


@functools.cache
def _field_names(name: str) -> frozenset[str]:
    return frozenset(field[0] for field in structure(name)._fields_)


@functools.cache
def function(name: str) -> Callable[..., Any]:
    """The C function `name`. One that returns an int raises MemoryError where that is not 0: it found no memory."""
    opened = kernels()
    if opened.library is None:
        raise RuntimeError(f"the C kernels can't run here: {opened.problem}; {opened.remedy}")
    found = getattr(opened.library, name)
    found.restype, found.argtypes = _header().functions[name]
    if found.restype is ctypes.c_int:
        found.errcheck = _check
    return found


def _check(status: int, called: Any, arguments: tuple[Any, ...]) -> None:
    if status:
        raise MemoryError(
            f"{called.__name__}: the C kernels got no memory for this pass; use smaller batches or chunks"
        )


def threads() -> int:
    return torch.get_num_threads()
