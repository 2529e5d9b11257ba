"""What a text must match, in every spelling that clients have for it."""

import json
import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from twotower.errors import SettingError
from twotower.server.errors import ApiError, in_json
from twotower.server.fields import Body, Many, Strict, shown
from twotower.server.schemas import closed

_Text = Annotated[str, shown(minLength=1)]
_Regex = Annotated[str, shown(minLength=1, format="regex")]
_Grammar = Annotated[str, shown(minLength=1, format="lark")]
_Choices = Annotated[Many[str], Field(min_length=1)]
_AnySchema = dict[str, Any] | _Text

# Each spelling -> the setting of `SamplingParams` that it becomes.
_KINDS = {
    "json": "json_schema",
    "json_object": "json_schema",
    "schema": "json_schema",
    "regex": "regex",
    "choice": "regex",
    "grammar": "grammar",
}
_ANY_OBJECT = '{"type": "object"}'


class JsonSchema(Strict):
    """A JSON schema with a name. It is always followed strictly, whatever `strict` says."""

    name: str
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object, or with llama.cpp's `schema` the JSON that it describes."""

    type: Literal["json_object"]
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class SchemaFormat(Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuredOutputs(Strict):
    """vLLM's spelling; exactly one of the fields that describe a text is given.

    The other two of its fields change nothing: there is one way to follow a constraint, and JSON has one spacing.
    """

    model_config = ConfigDict(json_schema_extra={"maxProperties": 1})

    json_schema: Annotated[_AnySchema | None, Field(alias="json")] = None
    regex: _Regex | None = None
    choice: _Choices | None = None
    grammar: _Grammar | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None


class Structure(NamedTuple):
    """The `kind` of constraint and its `text`, as `SamplingParams` takes them, and the request's `field` that asks for
    it, with the value `given` there."""

    kind: str
    text: str
    field: str
    given: Any

    def refused(self, error: SettingError) -> Exception:
        """An error of the library that names the request's field where it names the constraint."""
        if error.name == self.kind:
            return ApiError(400, in_json(self.field, self.given, error), param=self.field, code="invalid_value")
        rule = error.rule.replace(f"where {self.kind} is given", f"where {self.field} is given")
        return SettingError(error.name, error.value, rule, error.fix)


class Structured(Body):
    """The fields that say what a text must match. At most one of them may be given."""

    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    structured_outputs: StructuredOutputs | None = None
    regex: _Regex | None = None
    grammar: _Grammar | None = None
    guided_json: _AnySchema | None = None
    guided_regex: _Regex | None = None
    guided_choice: _Choices | None = None
    guided_grammar: _Grammar | None = None

    def structure(self) -> Structure | None:
        """What the text must match, None for any text. Raises ApiError where several fields say it."""
        found = [(field, kind, value) for field, kind, value in self._given_structures() if value is not None]
        if len(found) > 1:
            (first, *_), (second, *_) = found[:2]
            message = f"{second} can't be given beside {first}: a text can follow only one of them; leave one out"
            raise ApiError(400, message, param=second, code="invalid_value")
        return _structure(*found[0]) if found else None

    def _given_structures(self) -> list[tuple[str, str, Any]]:
        """Each field that may say it, with its spelling and its value."""
        wanted, given = self.structured_outputs or StructuredOutputs(), self.response_format
        nested = [
            ("json", wanted.json_schema),
            ("regex", wanted.regex or None),
            ("choice", wanted.choice),
            ("grammar", wanted.grammar or None),
            ("json_object", wanted.json_object or None),
        ]
        found = [(f"structured_outputs.{name}", name, value) for name, value in nested]
        if isinstance(given, SchemaFormat):
            found.append(("response_format", "schema", given.json_schema.json_schema))
        elif isinstance(given, ObjectFormat) and given.json_schema is not None:
            found.append(("response_format", "schema", given.json_schema))
        elif isinstance(given, ObjectFormat):
            found.append(("response_format", "json_object", True))
        own = [("regex", self.regex), ("grammar", self.grammar)]
        older = [("json", self.guided_json), ("regex", self.guided_regex), ("choice", self.guided_choice)]
        found += [(name, name, value) for name, value in own]
        found += [(f"guided_{name}", name, value) for name, value in (*older, ("grammar", self.guided_grammar))]
        return found


def _structure(field: str, spelling: str, value: Any) -> Structure:
    if spelling == "json_object":
        text = _ANY_OBJECT
    elif spelling == "choice":
        text = "|".join(map(re.escape, value)) or "()"  # an empty text alone is a choice too
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = _closed(text) if _KINDS[spelling] == "json_schema" else text
    return Structure(_KINDS[spelling], text, field, value)


def _closed(text: str) -> str:
    """The text of a JSON schema with its objects closed; what is none stays as it is, for the library to refuse."""
    try:
        schema = json.loads(text)
        return json.dumps(closed(schema), ensure_ascii=False) if isinstance(schema, dict) else text
    except (ValueError, RecursionError):
        return text
