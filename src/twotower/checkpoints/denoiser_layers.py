"""Which layers a denoiser is to have, by name or by number."""

import re
from collections.abc import Sequence

from twotower.config import TwoTowerConfig
from twotower.config_rules import SEEDED_KINDS
from twotower.errors import SettingError

_BY_COUNT = re.compile(r"(first|spread|last):(\d{1,9})")
_BY_INDEX = re.compile(r"\d{1,9}(,\d{1,9})*")


def chosen_layers(config: TwoTowerConfig, wanted: str | Sequence[int]) -> tuple[int, ...] | None:
    """The `denoiser_layers` of a config that `wanted` asks for, of those that `config` has; None where these are all.

    "first:K", "spread:K" and "last:K" count groups: a layer that reads the context, with the layers behind it that
    don't. In a transformer these are pairs of attention and MLP. "spread:K" takes the first group, the last and K − 2
    evenly between, and for K = 1 the middle one. "all" keeps every layer; "0,1,10,11" or (0, 1, 10, 11) names layers.
    Raises SettingError for anything else.
    """
    own = config.denoiser_indices
    groups = _groups(config.pattern, own)
    by_count = _BY_COUNT.fullmatch(wanted) if isinstance(wanted, str) else None
    if wanted == "all":
        found = own
    elif by_count is not None and 1 <= int(by_count[2]) <= len(groups):
        places = _places(by_count[1], int(by_count[2]), len(groups))
        found = tuple(i for place in places for i in groups[place])
    elif not isinstance(wanted, str) or _BY_INDEX.fullmatch(wanted):
        found = tuple(map(int, wanted.split(","))) if isinstance(wanted, str) else tuple(wanted)
        if not found or list(found) != sorted(set(found)) or not set(found) <= set(own):
            raise _refused(wanted, own, len(groups))
    else:
        raise _refused(wanted, own, len(groups))
    return None if found == tuple(range(config.num_layers)) else found


def _groups(pattern: str, own: Sequence[int]) -> list[list[int]]:
    """The layers `own` of a pattern in groups, each from a layer that reads the context to before the next; what comes
    before the first of them is in its group."""
    groups: list[list[int]] = [[]]
    for i in own:
        if pattern[i] in SEEDED_KINDS and any(pattern[j] in SEEDED_KINDS for j in groups[-1]):
            groups.append([])
        groups[-1].append(i)
    return groups


def _places(where: str, count: int, total: int) -> list[int]:
    """`count` of the numbers below `total`, ascending."""
    if where == "first":
        return list(range(count))
    if where == "last":
        return list(range(total - count, total))
    if count == 1:
        return [total // 2]
    return [(2 * j * (total - 1) + count - 1) // (2 * (count - 1)) for j in range(count)]  # rounded


def _refused(wanted: str | Sequence[int], own: Sequence[int], num_groups: int) -> SettingError:
    rule = (
        f"all, first:K, spread:K or last:K with K in [1, {num_groups}], or ascending, different layers such as 0,1,4,5 "
        f"of the {len(own)} from {own[0]} to {own[-1]}"
    )
    return SettingError("denoiser_layers", wanted, rule, "twotower inspect shows a checkpoint's layers")
