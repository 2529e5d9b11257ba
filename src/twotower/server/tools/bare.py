"""Calls in JSON without a mark before them, which may be JSON of any other meaning."""

import re

_KEYS = ("name", "type", "function", "arguments", "parameters", "id")
_BEGINNINGS = tuple(f'{bracket}"{key}"' for bracket in ("{", "[{") for key in _KEYS)
_LOOKED_AT = 60


def may_be_call(text: str) -> bool:
    """Whether JSON that begins like this may be a call or a list of calls, by its first key."""
    compact = re.sub(r"\s", "", text[:_LOOKED_AT])
    return any(compact.startswith(one) or one.startswith(compact) for one in _BEGINNINGS)
