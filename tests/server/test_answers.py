"""Answers of reasoning, content and calls: read in pieces, and as clients get them."""

import random
import re

import openai
import pytest

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.engine.aio import AsyncEngine
from twotower.server.answers import AnswerFormat, ControlTokens
from twotower.server.app import make_app
from twotower.server.config import ServerConfig
from twotower.server.reasoning import Thought, ThoughtFormat
from twotower.server.tool_request import ToolUse
from twotower.server.tools.answer import Marks
from twotower.server.tools.calls import Call
from twotower.server.tools.hermes import Hermes

THINK = ThoughtFormat("<think>", "</think>")
ADD = Call("add", '{"x": 1}')
ADD_TEXT = '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
USE = ToolUse({"add": {"type": "object"}}, must=False, one_call=False)
# As Qwen 3's: thinking is closed where it is switched off, and here opened where `opened` says so.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}{{ m.reasoning_content }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}a{% if opened %}<think>{% endif %}"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def cuts(text):
    """The text in single characters, in two pieces at every place, and in random ones."""
    yield list(text)
    yield from ([text[:i], text[i:]] for i in range(len(text) + 1))
    for seed in range(50):
        places = sorted(random.Random(seed).choices(range(len(text) + 1), k=6))
        yield [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def read(pieces, format):
    reading = format.reading()
    parts = [part for piece in pieces for part in reading.push(piece)] + reading.end()
    thoughts = "".join(part.text for part in parts if isinstance(part, Thought))
    content = "".join(part for part in parts if isinstance(part, str))
    return thoughts, content, [part for part in parts if isinstance(part, Call)]


@pytest.mark.parametrize(
    ("control", "tools", "thoughts", "text", "parts"),
    [
        ((), USE, THINK, f"<think>a {ADD_TEXT}</think>\n\nb\n{ADD_TEXT}", (f"a {ADD_TEXT}", "b", [ADD])),
        ((), USE, THINK, f"<think>a</think>{ADD_TEXT}", ("a", "", [ADD])),
        ((), USE, None, f"<think>a</think>{ADD_TEXT}", ("", "<think>a</think>", [ADD])),
        ((), None, THINK, f"<think>a</think>{ADD_TEXT}", ("a", ADD_TEXT, [])),
        ((), None, None, "<think>a", ("", "<think>a", [])),
        # marks that are control tokens stay, and others are left out
        (("<think>", "</think>", "<|end|>"), None, THINK, "<think>a<|end|></think>b<|end|>", ("a", "b", [])),
        (("<think>", "</think>", "<|end|>"), USE, THINK, f"<think>a<|end|>{ADD_TEXT}<|end|>", (f"a{ADD_TEXT}", "", [])),
        (("<tool_call>", "</tool_call>", "<|end|>"), USE, None, f"a<|end|>{ADD_TEXT}<|end|>", ("", "a", [ADD])),
        (("<tool_call>", "</tool_call>", "<|end|>"), None, None, "a<|end|>", ("", "a<|end|>", [])),  # only spelled so
    ],
)
def test_an_answer_is_reasoning_content_and_calls_in_whatever_pieces_it_comes(control, tools, thoughts, text, parts):
    format = AnswerFormat(frozenset(control), Marks(Hermes()), tools, thoughts, begins_in_thought=False)
    for pieces in cuts(text):
        assert read(pieces, format) == parts, pieces


@pytest.mark.parametrize(
    ("text", "left"),
    [("a<s>b", "ab"), ("a<s><s>", "a"), ("<s", "<s"), ("<<s>", "<"), ("a<s>>b", "ab"), ("<s<s>", "<s"), ("", "")],
)
def test_control_tokens_are_left_out_the_longest_first(text, left):
    for pieces in cuts(text):
        reader = ControlTokens(("<s>", "<s>>", "</s>"))
        assert "".join(map(reader.push, pieces)) + reader.push("", final=True) == left


@pytest.fixture(scope="module")
def client(tiny, byte_tokenizer, serve):
    """A client of a server of a model that can end its texts."""
    pytest.importorskip("llguidance")
    model = tiny("M*-E", vocab_size=260, eos_token_id=2, block_size=8)
    model.tokenizer = byte_tokenizer
    engine = AsyncEngine(model).start()
    config = ServerConfig(model_names=("tiny",), max_context=500)
    with serve(make_app(engine, config, ChatTemplate(TEMPLATE, {}))) as served:
        yield openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    engine.close()


def ask(client, stream=False, **settings):
    """The reasoning, the content and the reason of the end of an answer."""
    messages = settings.pop("messages", [{"role": "user", "content": "hi"}])
    settings.setdefault("max_tokens", 60)
    answer = client.chat.completions.create(
        model="tiny", messages=messages, stream=stream, seed=1, extra_body={"mode": "ar", **settings}
    )
    if not stream:
        [choice] = answer.choices
        thought = getattr(choice.message, "reasoning_content", None)
        assert getattr(choice.message, "reasoning", None) == thought
        return thought, choice.message.content, choice.finish_reason
    choices = [chunk.choices[0] for chunk in answer]
    thought = "".join((c.delta.model_extra or {}).get("reasoning_content") or "" for c in choices)
    return thought or None, "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "thought", "content"),
    [
        ("<think>\nwhy é…\n</think>\n\nhello", "why é…", "hello"),
        ("hello <think>", None, "hello <think>"),
        ("<think>\n\n</think>\n\nhello", None, "hello"),
    ],
)
def test_reasoning_is_apart_whole_and_streamed(client, stream, text, thought, content):
    assert ask(client, stream, regex=re.escape(text)) == (thought, content, "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("settings", "content"),
    [({"include_reasoning": False}, "hello"), ({"separate_reasoning": False}, "<think>why</think>\n\nhello")],
)
def test_reasoning_is_left_out_or_left_in_on_request(client, stream, settings, content):
    assert ask(client, stream, regex="<think>why</think>\n\nhello", **settings) == (None, content, "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_that_the_prompt_opened_goes_on_to_the_end(client, stream):
    opened = {"chat_template_kwargs": {"opened": True}, "allowed_token_ids": [100, 101], "max_tokens": 5}
    thought, content, reason = ask(client, stream, **opened)
    assert (len(thought), content, reason) == (5, "", "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("variables", [{"enable_thinking": False}, {"opened": True, "enable_thinking": False}])
def test_reasoning_that_is_switched_off_is_content(client, stream, variables):
    off = {"chat_template_kwargs": variables, "allowed_token_ids": [100, 101], "max_tokens": 5}
    thought, content, reason = ask(client, stream, **off)
    assert (thought, len(content), reason) == (None, 5, "length")


CHAIN = "</think>7"
# What makes a model write CHAIN behind ">": no other pairs of its letters, and < where both that and 7 may come.
CHAINED = {
    "allowed_token_ids": [2, *(ord(c) + 4 for c in sorted(set(CHAIN)))],
    "bad_words": sorted({a + b for a in CHAIN for b in CHAIN if a + b != "><" and a + b not in CHAIN}),
    "logit_bias": {str(ord("<") + 4): 100},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["ar", "verified"])
def test_what_an_answer_must_match_comes_behind_the_reasoning_that_the_prompt_opened(client, mode, stream):
    opened = {"chat_template_kwargs": {"opened": True}, "mode": mode, **CHAINED}
    assert ask(client, stream, guided_json={"const": 7}, **opened) == (None, "7", "stop")


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
@pytest.mark.parametrize("variables", [{"enable_thinking": False}, {}])
def test_an_answer_that_must_match_has_no_reasoning_where_it_is_off_or_not_begun(client, variables, mode):
    sevens = {"allowed_token_ids": [2, ord("7") + 4], "chat_template_kwargs": variables, "mode": mode}
    for asked in ({"guided_regex": "7{3}"}, {"guided_choice": ["777"]}, {"guided_grammar": 'start: "777"'}):
        assert ask(client, **asked, **sevens) == (None, "777", "stop")


def test_a_structure_behind_reasoning_is_named_where_it_is_wrong(client):
    for opened in (True, False):
        with pytest.raises(openai.BadRequestError, match=r'guided_json is "{", must be JSON') as caught:
            ask(client, guided_json="{", chat_template_kwargs={"opened": opened})
        assert caught.value.param == "guided_json"
        with pytest.raises(
            openai.BadRequestError, match='guided_grammar is "start: x", must be a constraint'
        ) as caught:
            ask(client, guided_grammar="start: x", chat_template_kwargs={"opened": opened})
        assert caught.value.param == "guided_grammar"


@pytest.mark.parametrize(("begun", "thought"), [("<think>Hm", "ddddd"), ("<think>Hm</think>", None), ("Hm", None)])
def test_a_message_that_goes_on_is_where_it_was(client, begun, thought):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": begun}]
    found = ask(client, messages=messages, continue_final_message=True, allowed_token_ids=[104], max_tokens=5)
    assert found == (thought, "" if thought else "ddddd", "length")


def test_reasoning_that_is_sent_back_reaches_the_template(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        extra_body={"regex": "<think>why</think>b", "mode": "ar"},
    )
    back = answer.choices[0].message.model_dump()
    post = {"messages": [{"role": "user", "content": "hi"}, back], "return_token_strs": True}
    tokens = client.post(f"{str(client.base_url).removesuffix('/v1/')}/tokenize", cast_to=dict, body=post)
    assert "[assistantwhy]b" in "".join(tokens["token_strs"])
