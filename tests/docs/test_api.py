"""Every public name says what it is: a docstring and type hints, down to methods, properties and fields."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import twotower

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
NAMES = [name for name in twotower.__all__ if name != "__version__"]


def own_members(owner: type) -> dict[str, Any]:
    """Public methods and properties that the class itself, or a class of ours that it derives from, defines."""
    ours = [c for c in reversed(owner.__mro__) if c.__module__.startswith("twotower")]
    found = {name: value for c in ours for name, value in vars(c).items() if not name.startswith("_")}
    return {
        name: value.__func__ if isinstance(value, classmethod | staticmethod) else value
        for name, value in found.items()
        if isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value)
    }


def functions() -> dict[str, Any]:
    """Name -> public function, method or the getter of a property."""
    found: dict[str, Any] = {}
    for name in NAMES:
        value = getattr(twotower, name)
        if inspect.isfunction(value):
            found[name] = value
        elif inspect.isclass(value):
            members = own_members(value)
            found |= {f"{name}.{m}": v.fget if isinstance(v, property) else v for m, v in members.items()}
    return found


def field_names(owner: type) -> list[str]:
    fields = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    return [*fields, *getattr(owner, "_fields", ())]


CLASSES = {name: getattr(twotower, name) for name in NAMES if inspect.isclass(getattr(twotower, name))}
FUNCTIONS = functions()


def test_the_page_shows_every_public_name() -> None:
    assert sorted(re.findall(r"^::: twotower\.(\w+)$", PAGE, re.MULTILINE)) == sorted(NAMES)


@pytest.mark.parametrize("name", [*CLASSES, *FUNCTIONS])
def test_has_a_docstring(name: str) -> None:
    value = CLASSES.get(name) or FUNCTIONS[name]
    assert value.__doc__
    # dataclasses and NamedTuples write their signature there
    assert not value.__doc__.startswith(f"{name}(")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_has_type_hints(name: str) -> None:
    signature = inspect.signature(FUNCTIONS[name])
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")]
    assert not bare
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", [name for name, owner in CLASSES.items() if field_names(owner)])
def test_every_field_is_explained(name: str) -> None:
    """By its name in the docstring of the class, by a docstring of its own, or by the help of its option."""
    owner = CLASSES[name]
    text = f"{owner.__doc__}\n{inspect.getsource(owner)}"
    helped = {f.name for f in dataclasses.fields(owner) if f.metadata} if dataclasses.is_dataclass(owner) else set()
    fields = [field for field in field_names(owner) if field not in helped]
    assert not [f for f in fields if not re.search(rf'`{f}`|^    +{f}: [^\n=]+\n    """', text, re.MULTILINE)]
