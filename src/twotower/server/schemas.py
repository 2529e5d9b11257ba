"""JSON schemas as clients write them, of objects that have what they name."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

# Keys of a schema -> what has schemas there.
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")
# Where one of these is, what a part of a schema takes depends on other parts.
_JOINS = ("allOf", "if", "not", "contains", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems")
# Formats of texts that a grammar holds. To JSON Schema any other is a remark.
_FORMATS = frozenset(
    ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
_ELSEWHERE, _OF_OBJECTS = ("$ref", "$dynamicRef", "anyOf", "oneOf"), ("properties", "required", "minProperties")


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with objects that have no other properties than it names, unless it says that they may, and without
    keys that demand nothing, some of which llguidance refuses.

    To JSON Schema an object may have any others, but hardly any client means that, and vLLM, llama.cpp and SGLang
    read them in this way: a model that isn't sure would go on with properties of its own. What matches the new schema
    matches the old one. Where several parts of a schema describe one object together, its objects stay as they are.
    """
    copy = json.loads(json.dumps(schema))
    parts = list(_parts(copy))
    joined = any(map(_is_joined, parts))
    for part in parts:
        for key in [key for key in part if _demands_nothing(key, part[key])]:
            del part[key]
        if not joined and _names_all(part):
            part["additionalProperties"] = False
    return copy


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and all inside it; without recursion, because clients' schemas may be deep."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for key in _MAPS:
            if isinstance(part.get(key), dict):
                waiting += part[key].values()
        for key in _LISTS:
            if isinstance(part.get(key), list):
                waiting += part[key]
        waiting += [part[key] for key in _SINGLE if key in part]


def _demands_nothing(key: str, value: Any) -> bool:
    if key == "format":
        return isinstance(value, str) and value not in _FORMATS
    if key == "uniqueItems":
        return value is False
    # the names of properties are always texts
    return key == "propertyNames" and value in (True, {}, {"type": "string"})


def _is_joined(part: Mapping[str, Any]) -> bool:
    if any(key in part for key in _JOINS):
        return True
    # "exactly one of": with objects that are told apart by a property it is "any of"
    if "oneOf" in part and "discriminator" not in part:
        return True
    return any(key in part for key in _OF_OBJECTS) and any(key in part for key in _ELSEWHERE)


def _names_all(part: Mapping[str, Any]) -> bool:
    """Whether a part names properties, and no key of it asks for others."""
    properties, required = part.get("properties"), part.get("required", [])
    if not isinstance(properties, dict) or not properties or not isinstance(required, list):
        return False
    opened = any(key in part for key in ("additionalProperties", "patternProperties", "minProperties"))
    return not opened and {*map(str, required)} <= properties.keys()
