"""Grammars in llguidance's Lark that hold an answer to calls of given functions."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from twotower.server.schemas import closed
from twotower.server.tools.calls import Functions

# One spacing, as models write it: an unsure one would fill its answer with the optional blanks of JSON.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Keys of a schema by which it has other arguments than those of its properties.
_OPENED = frozenset(
    ("additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "allOf", "$ref", "if")
)


def literal(text: str) -> str:
    """Lark for a text; its strings are JSON's."""
    return json.dumps(text)


def schema_rule(name: str, schema: Mapping[str, Any]) -> str:
    """A rule for JSON of a schema."""
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': _STYLE})}\n"


def arguments_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; it takes no others than it names, unless it says so."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    named = (
        isinstance(properties, Mapping) and isinstance(required, list) and {*map(str, required)} <= properties.keys()
    )
    others = {"additionalProperties": False} if named and not _OPENED & schema.keys() else {}
    return dict(closed({**schema, "type": "object", **others}))


def grammar(calls: str, schema: Mapping[str, Any] | None) -> str:
    """The grammar of an answer that is calls, for which these are the rules, or if there is a schema its JSON."""
    if schema is None:
        return f"start: calls\n{calls}"
    return f"start: calls | answer\n{calls}{schema_rule('answer', schema)}"


def json_call(functions: Functions, key: str) -> str:
    """The rule `call`, a JSON object with a function's name and, under `key`, its arguments."""
    arguments, rules = distinct("arguments", functions, lambda rule, own: schema_rule(rule, arguments_schema(own)))
    calls = []
    for name, rule in arguments.items():
        opening = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '
        calls.append(f"{literal(opening)} {rule} {literal('}')}")
    return f"call: {' | '.join(calls)}\n{rules}"


def distinct(
    rule: str, functions: Functions, make: Callable[[str, Mapping[str, Any]], str]
) -> tuple[dict[str, str], str]:
    """The name of each function's rule and the rules, which `make` makes of a name and a schema: one for all functions
    of the same schema, because a grammar has room for some thousand."""
    texts = {name: json.dumps(schema) for name, schema in functions.items()}
    rules = {text: f"{rule}{i}" for i, text in enumerate(dict.fromkeys(texts.values()))}
    made = {rules[text]: make(rules[text], functions[name]) for name, text in texts.items()}
    return {name: rules[text] for name, text in texts.items()}, "".join(made.values())


def repeated(call: str, between: str, *, many: bool) -> str:
    """Lark for one call or, if `many`, any number of them with a text between them."""
    return f"{call} ({literal(between)} {call})*" if many else call
