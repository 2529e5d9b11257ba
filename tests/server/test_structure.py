"""Every spelling of what a text must match becomes one setting of `SamplingParams`."""

import re

import pytest

from twotower.server.errors import ApiError
from twotower.server.structure import Structured

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
TEXT = '{"type": "object", "properties": {"ok": {"type": "boolean"}}}'
HELD = TEXT[:-1] + ', "additionalProperties": false}'
ANY_OBJECT = '{"type": "object"}'


@pytest.mark.parametrize(
    ("asked", "field", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "json_schema", ANY_OBJECT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format", "json_schema", HELD),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            "response_format",
            "json_schema",
            HELD,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", "json_schema", HELD),
        ({"structured_outputs": {"json": TEXT}}, "structured_outputs.json", "json_schema", HELD),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object", "json_schema", ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex", "regex", "a+"),
        ({"structured_outputs": {"choice": ["a.b", "c"]}}, "structured_outputs.choice", "regex", r"a\.b|c"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice", "regex", "()"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "structured_outputs.grammar", "grammar", 'start: "a"'),
        ({"guided_json": SCHEMA}, "guided_json", "json_schema", HELD),
        ({"guided_json": TEXT}, "guided_json", "json_schema", HELD),
        ({"guided_json": {}}, "guided_json", "json_schema", "{}"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs.json", "json_schema", "{}"),
        ({"guided_regex": "a+"}, "guided_regex", "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "guided_choice", "regex", "a|b"),
        ({"guided_grammar": 'start: "a"'}, "guided_grammar", "grammar", 'start: "a"'),
        ({"regex": "a+"}, "regex", "regex", "a+"),
        ({"grammar": 'start: "a"'}, "grammar", "grammar", 'start: "a"'),
    ],
)
def test_every_spelling_becomes_one_setting(asked, field, kind, text):
    found = Structured.model_validate(asked).structure()
    assert (found.field, found.kind, found.text) == (field, kind, text)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "regex": "", "structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False, "disable_fallback": True}},
        {"structured_outputs": {"regex": "", "grammar": "", "structural_tag": None}},
        {"guided_decoding_backend": "xgrammar"},
    ],
)
def test_what_asks_for_nothing_is_any_text(asked):
    assert Structured.model_validate(asked).structure() is None


@pytest.mark.parametrize(
    ("asked", "first", "second"),
    [
        ({"regex": "a", "grammar": 'start: "a"'}, "regex", "grammar"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs.regex",
            "structured_outputs.choice",
        ),
        ({"response_format": {"type": "json_object"}, "guided_json": SCHEMA}, "response_format", "guided_json"),
    ],
)
def test_of_two_the_second_is_refused(asked, first, second):
    with pytest.raises(ApiError, match=f"^400: {second} can't be given beside {first}: ") as caught:
        Structured.model_validate(asked).structure()
    assert caught.value.param == second


def test_a_choice_of_any_texts_matches_just_them():
    texts = ["a b", "c-d", "e\nf", "#~&", "[x]", "^$", "|", "\\", "🎉", "\x00"]
    pattern = Structured.model_validate({"guided_choice": texts}).structure().text
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert not any(re.fullmatch(pattern, text) for text in ("a", "", "x", "a b|c-d"))
