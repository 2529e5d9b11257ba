from collections.abc import Callable
from typing import Any

import pytest

from twotower.checkpoints.denoiser_layers import chosen_layers
from twotower.errors import SettingError


@pytest.mark.parametrize(
    ("pattern", "wanted", "expected"),
    [
        ("*-*-*-*-", "first:1", (0, 1)),
        ("*-*-*-*-", "last:3", (2, 3, 4, 5, 6, 7)),
        ("*-*-*-*-", "spread:1", (4, 5)),
        ("*-*-*-*-", "spread:2", (0, 1, 6, 7)),
        ("*-*-*-*-", "spread:3", (0, 1, 4, 5, 6, 7)),
        ("*-*-*-*-", "spread:4", None),
        ("*-*-*-*-", "0,3,7", (0, 3, 7)),
        ("*-*-*-*-", (2, 5), (2, 5)),
        ("*-*-", "0,1,2,3", None),
        ("*-*-", "all", None),
        ("MEM*EM-", "first:2", (0, 1, 2)),  # one layer that reads the context, with what is behind it
        ("MEM*EM-", "last:2", (3, 4, 5, 6)),
        ("-E*M-", "first:1", (0, 1, 2)),
        ("SRG", "spread:2", (0, 2)),
        ("--", "first:1", None),
    ],
)
def test_groups_and_layers_are_chosen(pattern: str, wanted: Any, expected: Any, tiny: Callable) -> None:
    assert chosen_layers(tiny(pattern).config, wanted) == expected


def test_a_denoiser_that_was_cut_is_cut_further(tiny: Callable) -> None:
    config = tiny("*-*-*-*-", denoiser_layers=(0, 1, 4, 7)).config
    assert chosen_layers(config, "first:1") == (0, 1)
    assert chosen_layers(config, "last:1") == (4, 7)
    assert chosen_layers(config, "all") == (0, 1, 4, 7)
    with pytest.raises(SettingError, match=r"in \[1, 2\].* of the 4 from 0 to 7"):
        chosen_layers(config, "2,3")


@pytest.mark.parametrize(
    "wanted",
    ["", "first", "first:0", "spread:3", "last:-1", "middle:1", "0,4", "1,0", "0,0", "0,", "a", (), (0, 9), (-1, 0)],
)
def test_what_is_not_there_is_refused(wanted: Any, tiny: Callable) -> None:
    with pytest.raises(SettingError, match=r"denoiser_layers is .*spread:K or last:K with K in \[1, 2\]"):
        chosen_layers(tiny("*-*-").config, wanted)
