"""What the texts of parameters mean, by the schema of their function."""

import json

import pytest

from twotower.server.tools.answer import Answer, Marks
from twotower.server.tools.xml import FunctionXml

LIST = {"type": "array"}


@pytest.mark.parametrize(
    ("written", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("null", {"type": "string"}, "null"),
        ("5", {"type": "integer"}, 5),
        (" 5 ", {"type": "integer"}, 5),
        ("five", {"type": "integer"}, "five"),
        ("5.5", {"type": "integer"}, "5.5"),
        ("5", {"type": "number"}, 5),
        ("1e999", {"type": "number"}, "1e999"),
        ("NaN", {"type": "number"}, "NaN"),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("true", {"type": "string"}, "true"),
        ("null", {"type": ["integer", "null"]}, None),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("5", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 5),
        ('["a", {"b": 1}]', LIST, ["a", {"b": 1}]),
        ("[1,", LIST, "[1,"),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ('{"a": 1}', {"type": "string"}, '{"a": 1}'),
        ('"a"', {"type": "string"}, '"a"'),
        ("2", {"enum": [1, 2]}, 2),
        ("K", {"enum": ["K"]}, "K"),
        ("[1]", {"$ref": "#/$defs/List"}, [1]),
        ("[1]", {"allOf": [{"$ref": "#/$defs/List"}]}, [1]),
        ("[1]", {"$ref": "#/$defs/Loop"}, "[1]"),
        ("[1]", {"$ref": "#/nowhere"}, "[1]"),
        ("[1]", {}, "[1]"),
        ("[1]", 3, "[1]"),
        ("[1]", {"type": 3, "anyOf": 3, "enum": 3}, "[1]"),
        (" a\n\n b ", {"type": "string"}, " a\n\n b "),
    ],
)
def test_a_parameter_means_what_its_schema_says(written, schema, value):
    definitions = {"List": LIST, "Loop": {"$ref": "#/$defs/Loop"}}
    functions = {"f": {"type": "object", "properties": {"x": schema}, "$defs": definitions}}
    answer = Answer(Marks(FunctionXml()), functions)
    text = f"<tool_call>\n<function=f>\n<parameter=x>\n{written}\n</parameter>\n</function>\n</tool_call>"
    [call] = answer.push(text)
    assert json.loads(call.arguments) == {"x": value}
