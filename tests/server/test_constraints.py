"""What a text must match, as requests ask for it."""

import json
import re

import httpx
import openai
import pytest

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.decoding.modes import MODES
from twotower.engine.aio import AsyncEngine
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "word": {"type": "string", "maxLength": 5}},
    "required": ["ok", "word"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def url(tiny, byte_tokenizer, serve):
    """A server of a model that can end its texts; its default mode is diffusion."""
    model = tiny("M*-E", vocab_size=260, eos_token_id=2, block_size=8)
    model.tokenizer = byte_tokenizer
    engine = AsyncEngine(model).start()
    with serve(
        make_app(
            engine, ServerConfig(model_names=("tiny",), max_context=500), ChatTemplate("{{ messages[0].content }}", {})
        )
    ) as s:
        yield s.url
    engine.close()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def complete(client, extra, **settings):
    return client.completions.create(model="tiny", prompt="ab", max_tokens=100, seed=1, extra_body=extra, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MODES, "auto", None])
def test_a_chat_follows_the_schema_of_its_response_format(client, mode):
    extra = {} if mode is None else {"mode": mode}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "n": 3, "seed": 5}
    answer = client.chat.completions.create(**asked, response_format=FORMAT, extra_body=extra)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content)
        assert isinstance(found["ok"], bool)
        assert len(found["word"]) <= 5
        assert found.keys() == {"ok", "word"}


def test_a_stream_is_what_comes_at_once(client):
    whole = complete(client, {"regex": "(🎉|é…){3,6}", "mode": "verified"}).choices[0].text
    assert re.fullmatch("(🎉|é…){3,6}", whole)
    pieces = complete(client, {"regex": "(🎉|é…){3,6}", "mode": "verified"}, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole


def test_a_grammar_and_any_object(client):
    assert complete(client, {"grammar": 'start: "x" | "yy"'}).choices[0].text in ("x", "yy")
    # any object may be long: its beginning must be one
    assert complete(client, {"response_format": {"type": "json_object"}}).choices[0].text.startswith("{")


@pytest.mark.parametrize(
    ("field", "value"),
    [("response_format", FORMAT), ("regex", "a"), ("grammar", 'start: "a"'), ("guided_choice", ["a"])],
)
def test_a_rule_that_masks_again_is_a_400_that_names_both_fields(client, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, {field: value, "commit_rule": "remask"})
    assert caught.value.param == "commit_rule"
    assert f'commit_rule is "remask", must be another rule where {field} is given' in caught.value.message


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"regex": "("}, "regex"),
        ({"regex": 3}, "regex"),
        ({"grammar": "nonsense"}, "grammar"),
        ({"regex": "a", "grammar": 'start: "a"'}, "grammar"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "text", "more": 1}}, None),
    ],
)
def test_what_can_not_be_followed_is_a_400(client, extra, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, extra)
    assert caught.value.param == param if param else caught.value.param.startswith("response_format.")


RECURSIVE = {
    "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "additionalProperties": False}},
    "$ref": "#/$defs/n",
}


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"structured_outputs": {"choice": ["x.y", "\n#", "é…"]}}, "x\\.y|\n#|é…"),
        ({"guided_choice": [f"number {i}" for i in range(10_000)]}, r"number \d{1,4}"),
        ({"guided_choice": ["", "x"]}, "x?"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | b\nb ::= [0-9] "!"'}}, r"a|\d!"),
        ({"guided_json": RECURSIVE}, r'(\{|"n"|: |\})*'),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
        ({"response_format": {"type": "json_object", "schema": {"const": 7}}}, "7"),
        ({"guided_regex": "(a*)*b{2}"}, "a*b{0,2}"),
    ],
)
def test_other_spellings_hold_the_text_in_the_default_mode(client, asked, pattern):
    assert re.fullmatch(pattern, complete(client, asked).choices[0].text)


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        (
            {"structured_outputs": {"regex": "("}},
            "structured_outputs.regex",
            'structured_outputs.regex is "(", must be',
        ),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "is not supported"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "must be of type"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "is [], must be a list of at least 1"),
        ({"guided_choice": []}, "guided_choice", "is [], must be a list of at least 1"),
        ({"guided_choice": ["a", 1]}, "guided_choice.1", "is 1, must be a text"),
        ({"guided_json": "{"}, "guided_json", 'guided_json is "{", must be JSON, which it is not'),
        ({"guided_json": '{"not": ' * 300 + "{}" + "}" * 300}, "guided_json", "recursion limit exceeded"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "no text matches it"),
        ({"guided_json": {"$ref": "#/none"}}, "guided_json", "Pointer '/none' does not exist"),
        ({"guided_json": {"not": {}}}, "guided_json", 'Unimplemented keys: ["not"]'),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar", "Expected token ')'"),
        ({"guided_grammar": "root ::= nope"}, "guided_grammar", 'Rule "nope" not found'),
        ({"structured_outputs": {"choice": ["a"]}, "ignore_eos": True}, "ignore_eos", "structured_outputs.choice"),
        ({"structured_outputs": "a"}, "structured_outputs", 'is "a", must be an object'),
    ],
)
def test_the_error_names_the_spelling_once_in_one_sentence(client, asked, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, asked)
    message = caught.value.body["message"]
    assert caught.value.param == param
    assert words in message
    assert "\n" not in message
    assert len(message) < 800
    assert message.count(f"{param} is") == 1


def test_the_watched_text_follows_too(url):
    body = {"prompt": "ab", "max_tokens": 50, "mode": "verified", "regex": "(ab){4}c"}
    with httpx.stream("POST", f"{url}/twotower/watch", json=body) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert events[-1]["result"]
    assert "".join(token["text"] or "" for event in events for token in event["tokens"]) == "ababababc"
