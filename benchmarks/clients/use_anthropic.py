"""anthropic for Python."""

import anthropic
from calls import QUESTION, SCHEMA, given, named, report, shown

url, model = given()
client = anthropic.Anthropic(base_url=url, api_key="none")
common = {"model": model, "max_tokens": 64}
messages = [{"role": "user", "content": QUESTION}]
tool = {"name": "greet", "description": "Greets.", "input_schema": SCHEMA}


def models() -> str:
    return ", ".join(one.id for one in client.models.list())


def chat() -> str:
    answer = client.messages.create(system="Be kind.", messages=messages, **common)
    return shown(answer.content[0].text)


def chat_stream() -> str:
    with client.messages.stream(messages=messages, **common) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().usage.output_tokens > 0
    return shown(text)


def second_turn() -> str:
    first = client.messages.create(messages=messages, **common)
    more = [*messages, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And then?"}]
    return shown(client.messages.create(messages=more, **common).content[0].text)


def stop_sequences() -> str:
    answer = client.messages.create(messages=messages, stop_sequences=["."], **common)
    assert answer.stop_reason == "stop_sequence", answer.stop_reason
    return repr(answer.stop_sequence)


def count_tokens() -> str:
    return f"{client.messages.count_tokens(model=model, messages=messages).input_tokens} tokens"


def tools() -> str:
    first = client.messages.create(messages=messages, tools=[tool], tool_choice={"type": "any"}, **common)
    call, *_ = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
    more = [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    client.messages.create(messages=[*messages, *more], tools=[tool], **common)
    return str(call.input)


def tools_in_a_stream() -> str:
    choice = {"type": "tool", "name": "greet"}
    with client.messages.stream(messages=messages, tools=[tool], tool_choice=choice, **common) as stream:
        call, *_ = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    return str(call.input)


def wrong_model() -> str:
    try:
        client.messages.create(model="none", max_tokens=8, messages=messages)
    except anthropic.NotFoundError as error:
        return f"404: {error.body['error']['message']}"
    raise AssertionError("no error")


report(
    named(models, chat, chat_stream, second_turn, stop_sequences, count_tokens, tools, tools_in_a_stream, wrong_model)
)
