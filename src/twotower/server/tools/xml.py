"""`<tool_call><function=name><parameter=x>…</parameter></function></tool_call>`: Qwen 3 Coder and Nemotron 3.

What is between the marks of a parameter is its text, not JSON: the function's schema says whether it means more. With a
JSON object in the place of the parameters it is the format of functionary 3.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from twotower.server.tools.calls import (
    Brackets,
    Call,
    Found,
    Functions,
    Mark,
    behind,
    calls_in,
    dump,
    load,
    skip_blanks,
)
from twotower.server.tools.grammar import arguments_schema, distinct, literal, repeated, schema_rule
from twotower.server.tools.hermes import CLOSE, OPEN

_FUNCTION, _END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_LINE = "\n"
_NEWLINE = literal(_LINE)
_MOST_REFERENCES = 8
_LONGEST_NAME = 300
# The JSON types of Python's.
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


class FunctionXml:
    """A function between marks with its parameters between others; a `ToolFormat`."""

    starts, line_starts = (OPEN, _FUNCTION), ()
    marks = frozenset((OPEN, CLOSE, _END, _PARAMETER_END))

    def read(self, text: str, functions: Functions, brackets: Brackets, *, final: bool) -> Found | None:
        opening = OPEN if text.startswith(OPEN) else _FUNCTION
        no_call = Found((), len(opening))
        start = skip_blanks(text, len(OPEN)) if opening == OPEN else 0
        if start == len(text):
            return None
        if text[start] == "{":
            found = _json_body(text, start, brackets, "")
        elif text.startswith(_FUNCTION, start):
            found = _function(text, start + len(_FUNCTION), functions, brackets)
        else:
            return None if _FUNCTION.startswith(text[start:]) else no_call
        if found is None:
            return None
        if not found.calls:
            return no_call
        last = behind(text, found.end, CLOSE, final=final)
        return None if last is None else Found(found.calls, last)

    def grammar(self, functions: Functions, mark: Mark, *, many: bool) -> str:
        bodies, rules = distinct("body", functions, lambda rule, own: _body_rules(rule, arguments_schema(own)))
        calls = " | ".join(f"{literal(f'{_FUNCTION}{name}>')} {body}" for name, body in bodies.items())
        start = f"calls: {repeated('marked', _LINE, many=many)}\n"
        marked = f"marked: {mark(OPEN)} {_NEWLINE} ({calls}) {_NEWLINE} {mark(CLOSE)}\n"
        text = f"text[suffix={literal(_LINE + _PARAMETER_END)}]: /(?s:.*)/\n"
        return start + marked + text + rules

    def write(self, calls: Sequence[Call]) -> str:
        return "\n".join(f"{OPEN}\n{_written(call)}\n{CLOSE}" for call in calls)


def _written(call: Call) -> str:
    values = load(call.arguments)
    if not isinstance(values, dict):
        return f"{_FUNCTION}{call.name}>{call.arguments}{_END}"
    texts = {key: value if isinstance(value, str) else dump(value) for key, value in values.items()}
    parameters = "".join(f"{_PARAMETER}{key}>\n{text}\n{_PARAMETER_END}\n" for key, text in texts.items())
    return f"{_FUNCTION}{call.name}>\n{parameters}{_END}"


def _function(text: str, at: int, functions: Functions, brackets: Brackets) -> Found | None:
    """The call whose function's name stands at `at`."""
    name_end = text.find(">", at, at + _LONGEST_NAME)
    if name_end < 0:
        return None if len(text) < at + _LONGEST_NAME else Found((), at)
    name = text[at:name_end].strip()
    at = skip_blanks(text, name_end + 1)
    if text[at : at + 1] == "{":
        return _json_body(text, at, brackets, name)
    schema = functions.get(name, {})
    values: dict[str, Any] = {}
    while not text.startswith(_END, at):
        if not text.startswith(_PARAMETER, at):
            may_come = any(mark.startswith(text[at:]) for mark in (_END, _PARAMETER))
            return None if may_come else Found((), at)
        key_end = text.find(">", at)
        value_end = text.find(_PARAMETER_END, key_end + 1)
        if key_end < 0 or value_end < 0:
            return None
        key = text[at + len(_PARAMETER) : key_end].strip()
        if not key or "\n" in key:
            return Found((), at)
        written = text[key_end + 1 : value_end].removeprefix("\n").removesuffix("\n")
        values[key] = _value(written, _types(schema, key))
        at = skip_blanks(text, value_end + len(_PARAMETER_END))
    arguments = dump(values)
    calls = (Call(name, arguments),) if name and arguments is not None else ()
    return Found(calls, at + len(_END))


def _json_body(text: str, at: int, brackets: Brackets, name: str) -> Found | None:
    """The arguments of a function, or without a name a whole call, as a JSON object."""
    end = brackets.end(text, at)
    if end is None:
        return None
    value = load(text[at:end])
    if not name:
        return Found(calls_in(value), end)
    last = behind(text, end, _END, final=False)
    arguments = dump(value) if isinstance(value, dict) else None
    if last is None or arguments is None:
        return None if arguments is not None else Found((), end)
    return Found((Call(name, arguments),), last)


def _types(root: Mapping[str, Any], key: str) -> frozenset[str]:
    """The JSON types that a parameter of a function may have, none if its schema doesn't say."""
    properties = root.get("properties")
    own = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types_of(own, root, _MOST_REFERENCES))


def _types_of(schema: Any, root: Mapping[str, Any], most: int) -> set[str]:
    """The types of a schema, whose references are into `root` and followed so many times at most."""
    if not isinstance(schema, Mapping) or most < 0:
        return set()
    given = schema.get("type", [])
    found = {one for one in (given if isinstance(given, list) else [given]) if isinstance(one, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    found |= {_TYPES.get(type(one), "null") for one in (values if isinstance(values, list) else [])}
    for key in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else []:
            found |= _types_of(branch, root, most - 1)
    if isinstance(schema.get("$ref"), str):
        place: Any = root
        for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
            place = place.get(part) if isinstance(place, Mapping) else None
        found |= _types_of(place, root, most - 1)
    return found


def _value(written: str, types: frozenset[str]) -> Any:
    """What a parameter's text means where it may have these types: JSON of one of them, or else the text."""
    if written.strip() == "null" and ("null" in types or not types):
        return None
    if written.strip().lower() in ("true", "false") and "boolean" in types:
        return written.strip().lower() == "true"
    value = load(written) if types - {"string"} else None
    kind = _TYPES.get(type(value))
    fits = kind in types or (kind == "integer" and "number" in types)
    return value if fits and kind != "string" and dump(value) is not None else written


def _body_rules(rule: str, schema: Mapping[str, Any]) -> str:
    """Rules for what is behind a function's name: its parameters in the schema's order, or a JSON object where marks
    can't say them."""
    if not _fits_marks(schema):
        return f"{rule}: {rule}j {literal(_END)}\n{schema_rule(f'{rule}j', schema)}"
    properties, required = schema.get("properties", {}), schema.get("required")
    parts, rules = [], []
    for i, (key, own) in enumerate(properties.items()):
        part = f"{rule}p{i}"
        rules.append(f"{part}: {literal(f'{_PARAMETER}{key}>')} {_NEWLINE} {part}v {_NEWLINE}\n")
        rules.append(_value_rule(f"{part}v", own, schema))
        parts.append(part if isinstance(required, list) and key in required else f"{part}?")
    return f"{rule}: {' '.join((_NEWLINE, *parts, literal(_END)))}\n{''.join(rules)}"


def _fits_marks(schema: Mapping[str, Any]) -> bool:
    """Whether a schema names the arguments, and so that the names can stand in marks."""
    properties = schema.get("properties", {})
    takes_others = schema.get("additionalProperties") is not False or "patternProperties" in schema
    if not isinstance(properties, Mapping) or (takes_others and not properties):
        return False
    return all(key and key == key.strip() and not {">", "\n"} & {*key} for key in properties)


def _value_rule(rule: str, schema: Any, root: Mapping[str, Any]) -> str:
    """A rule for a parameter's value with the mark behind it. A text is written as it is, anything else as JSON."""
    types = _types_of(schema, root, _MOST_REFERENCES)
    texts = schema.get("enum", [schema.get("const")]) if isinstance(schema, Mapping) else []
    if isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts):
        return f"{rule}: ({' | '.join(map(literal, texts))}) {_NEWLINE} {literal(_PARAMETER_END)}\n"
    if "string" in types or not types:
        return f"{rule}: text\n"
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return f"{rule}: {rule}j {_NEWLINE} {literal(_PARAMETER_END)}\n{schema_rule(f'{rule}j', {**schema, **shared})}"
