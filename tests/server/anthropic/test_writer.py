"""Calls and reasoning in messages, as Anthropic's client sees them: a regular expression says what the model writes."""

import re

import pytest

pytest.importorskip("llguidance")
anthropic = pytest.importorskip("anthropic", reason="its client is the one tested; pip install 'twotower[dev]'")

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS = [{"name": "add", "description": "Adds.", "input_schema": SCHEMA}, {"name": "find", "input_schema": {}}]
USER = {"role": "user", "content": "hi"}
ADD = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": "é🎉"}}\n</tool_call>'
FIND = '<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>'
ADDED = ("tool_use", "add", {"x": 1, "y": "é🎉"})
FOUND = ("tool_use", "find", {})

# A random model would reason where it may.
PLAIN = {"mode": "ar", "seed": 0, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def claude(obedient_url):
    return anthropic.Anthropic(base_url=obedient_url, api_key="none", max_retries=0)


def asked(text, **settings):
    """A request whose answer is a text, its reasoning included."""
    extra = {"regex": re.escape(text), **PLAIN}
    return {"model": "tiny", "max_tokens": 500, "messages": [USER], "extra_body": extra, **settings}


def prompt_tokens(usage):
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens


def blocks(message):
    told = {"text": lambda b: ("text", b.text), "thinking": lambda b: ("thinking", b.thinking)}
    return [told.get(b.type, lambda b: (b.type, b.name, b.input))(b) for b in message.content]


@pytest.mark.parametrize(
    ("text", "tools", "found", "reason"),
    [
        ("hello", TOOLS, [("text", "hello")], "end_turn"),
        (ADD, TOOLS, [ADDED], "tool_use"),
        (f"I add.\n{ADD}\n{FIND}", TOOLS, [("text", "I add."), ADDED, FOUND], "tool_use"),
        (ADD, [], [("text", ADD)], "end_turn"),
        ("<think>\nhm\n</think>\n\nhi", [], [("thinking", "hm"), ("text", "hi")], "end_turn"),
        (f"<think>hm</think>{FIND}", TOOLS, [("thinking", "hm"), FOUND], "tool_use"),
    ],
)
def test_whole_and_streamed_are_one_message(claude, text, tools, found, reason):
    request = asked(text, tools=tools)
    whole = claude.messages.create(**request)
    with claude.messages.stream(**request) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert (blocks(message), message.stop_reason) == (found, reason)
        ids = [block.id for block in message.content if block.type == "tool_use"]
        assert all(one.startswith("toolu_") for one in ids)
        assert len({*ids}) == len(ids)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"tool_choice": {"type": "none"}}, [("text", f"{ADD}{FIND}")]),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, [ADDED]),
        ({"tool_choice": {"type": "auto"}}, [ADDED, FOUND]),
    ],
)
def test_a_choice_says_what_may_be_called(claude, settings, found):
    assert blocks(claude.messages.create(**asked(f"{ADD}{FIND}", tools=TOOLS, **settings))) == found


SHORT = {"type": "object", "properties": {"unit": {"enum": ["°C", "K"]}}, "required": ["unit"]}
NAMED = {"type": "tool", "name": "measure"}


@pytest.mark.parametrize("choice", [{"type": "any"}, NAMED, {"type": "any", "disable_parallel_tool_use": True}])
def test_a_call_may_be_demanded(claude, choice):
    tools = [{"name": "measure", "input_schema": SHORT}]
    request = {"model": "tiny", "max_tokens": 500, "messages": [USER], "tools": tools, "tool_choice": choice}
    message = claude.messages.create(**request, extra_body=PLAIN)
    assert message.content[0].name == "measure"
    assert message.content[0].input["unit"] in ("°C", "K")
    if choice != {"type": "any"}:  # where several calls may come, a random model makes them until it is cut
        assert (len(message.content), message.stop_reason) == (1, "tool_use")


def test_a_schema_that_no_call_can_follow_is_named(claude):
    tools = [{"name": "measure", "input_schema": {"type": "object", "properties": {"x": {"type": "no"}}}}]
    with pytest.raises(anthropic.BadRequestError, match=r"'tools\.0\.input_schema is"):
        claude.messages.create(model="tiny", max_tokens=9, messages=[USER], tools=tools, tool_choice={"type": "any"})


def test_an_answer_cut_in_a_call_ends_with_max_tokens(claude):
    message = claude.messages.create(**asked(ADD, tools=TOOLS) | {"max_tokens": 20})
    assert (blocks(message), message.stop_reason) == ([("text", ADD[:20])], "max_tokens")


def test_an_answer_and_the_results_of_its_calls_are_sent_back(claude):
    answer = claude.messages.create(**asked(f"<think>hm</think>ok{ADD}", tools=TOOLS))
    called = answer.content[-1]
    result = {"type": "tool_result", "tool_use_id": called.id, "content": [{"type": "text", "text": "2"}]}
    said = [USER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    call = {"id": called.id, "type": "function", "function": {"name": "add", "arguments": called.input}}
    rendered = f"[user]hi[assistant]okhm{[call]}[tool]2"
    assert claude.messages.count_tokens(model="tiny", messages=said).input_tokens == len(rendered.encode())
    assert blocks(claude.messages.create(**asked("3", messages=said, tools=TOOLS))) == [("text", "3")]


def test_the_clients_loop_over_tools_sends_everything_again(claude):
    """It wants the server to hold the conversation, and replays it where none is held."""

    @anthropic.beta_tool
    def add(x: bool) -> str:
        """Adds."""
        return str(x)

    asking = asked("") | {"tools": [add], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    runner = claude.beta.messages.tool_runner(**asking | {"extra_body": PLAIN, "max_iterations": 2})
    first, second = runner
    assert [block.name for block in first.content] == ["add"]
    assert prompt_tokens(second.usage) > prompt_tokens(first.usage)


def test_a_thread_that_is_not_held_is_told_as_anthropics_clients_expect(http):
    thread = {"type": "continue", "previous_message_id": "msg_1"}
    answer = http.post("/v1/messages", json={"max_tokens": 1, "messages": [USER], "thread": thread})
    assert answer.status_code == 404
    assert answer.json()["error"]["details"] == {"error_code": "thread_not_found"}


def test_thinking_may_be_asked_for_where_the_model_reasons(claude):
    asking = asked("<think>hm</think>ok", thinking={"type": "enabled", "budget_tokens": 1024})
    assert blocks(claude.messages.create(**asking)) == [("thinking", "hm"), ("text", "ok")]


def test_thinking_is_refused_where_the_model_does_not_reason(http):
    asking = {"max_tokens": 1, "messages": [USER], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    answer = http.post("/v1/messages", json=asking)
    assert answer.status_code == 400
    assert "this model marks no reasoning" in answer.json()["error"]["message"]
