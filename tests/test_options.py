"""Ranges of options in words and in checks."""

import dataclasses
import math
from typing import Any, Literal

import pytest

from twotower.errors import SettingError
from twotower.options import check_options, option, options_of


@dataclasses.dataclass(frozen=True)
class Settings:
    count: int = option(1, "How many.", least=1)
    share: float = option(0.5, "A share.", least=0, below=1)
    rate: float = option(1.0, "A rate.", above=0)
    limit: int | None = option(None, "A limit.", least=1, most=9)
    kind: Literal["a", "b"] = option("a", "A kind.")
    name: str = option("x", "A name.")
    heats: tuple[float, ...] = option((0.0, 1.0), "Heats.", least=0, most=100)
    plain: int = 3


def test_ranges_are_told_in_words() -> None:
    ranges = {name: what.range for name, (_, what) in options_of(Settings).items()}
    assert ranges == {
        "count": "at least 1",
        "share": "in [0, 1)",
        "rate": "above 0",
        "limit": "in [1, 9]",
        "kind": "",
        "name": "",
        "heats": "in [0, 100]",
    }


@pytest.mark.parametrize("changed", [{}, {"limit": 9}, {"rate": 3}, {"heats": ()}, {"share": 0}])
def test_values_in_range_pass(changed: dict[str, Any]) -> None:
    check_options(Settings(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 0}, "count is 0, must be an integer of at least 1"),
        ({"count": True}, "count is True, must be an integer of at least 1"),
        ({"count": 1.0}, "count is 1.0, must be an integer of at least 1"),
        ({"count": None}, "count is None, must be an integer of at least 1"),
        ({"share": 1.0}, "share is 1.0, must be a number in [0, 1)"),
        ({"rate": 0}, "rate is 0, must be a number above 0"),
        ({"rate": math.inf}, "rate is inf, must be a number above 0"),
        ({"limit": 10}, "limit is 10, must be an integer in [1, 9]"),
        ({"kind": "c"}, "kind is 'c', must be one of a, b"),
        ({"name": 3}, "name is 3, must be a text"),
        ({"heats": (0.5, -1.0)}, "heats is (0.5, -1.0), must be numbers in [0, 100]"),
        ({"heats": 0.5}, "heats is 0.5, must be a tuple"),
    ],
)
def test_other_values_raise(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as raised:
        check_options(Settings(**changed))
    assert str(raised.value) == message
