"""openai for Python."""

from typing import Literal

import openai
import pydantic
from calls import QUESTION, given, named, report, shown

url, model = given()
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
messages = [{"role": "user", "content": QUESTION}]


class Animal(pydantic.BaseModel):
    kind: Literal["cat", "dog", "bird"]
    brave: bool


class Greet(pydantic.BaseModel):
    """Greets an animal."""

    kind: Literal["cat", "dog", "bird"]


def models() -> str:
    return ", ".join(one.id for one in client.models.list())


def completion() -> str:
    return shown(client.completions.create(model=model, prompt="Once upon a time").choices[0].text)


def chat() -> str:
    answer = client.chat.completions.create(model=model, messages=messages)
    assert answer.usage is not None
    return shown(answer.choices[0].message.content or "")


def chat_stream() -> str:
    chunks = client.chat.completions.create(model=model, messages=messages, stream=True)
    return shown("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def chat_stream_helper() -> str:
    # The helper wants a text that has ended by itself, and a small model's story may end with its context.
    with client.chat.completions.stream(model=model, messages=messages, stop=".") as stream:
        return shown(stream.get_final_completion().choices[0].message.content or "")


def second_turn() -> str:
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=16).choices[0].message
    more = [*messages, answer, {"role": "user", "content": "And then?"}]
    return shown(client.chat.completions.create(model=model, messages=more, max_tokens=16).choices[0].message.content)


def parse() -> str:
    answer = client.chat.completions.parse(model=model, messages=messages, response_format=Animal)
    assert answer.choices[0].message.parsed is not None
    return repr(answer.choices[0].message.parsed)


def tools() -> str:
    tools = [openai.pydantic_function_tool(Greet)]
    answer = client.chat.completions.create(model=model, messages=messages, tools=tools, tool_choice="required")
    call, *_ = answer.choices[0].message.tool_calls
    message = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    more = [*messages, answer.choices[0].message, message]
    client.chat.completions.create(model=model, messages=more, tools=tools)
    return repr(Greet.model_validate_json(call.function.arguments))


def tools_in_a_stream() -> str:
    tools = [openai.pydantic_function_tool(Greet)]
    choice = {"type": "function", "function": {"name": "Greet"}}
    asked = {"model": model, "messages": messages, "tools": tools, "tool_choice": choice}
    with client.chat.completions.stream(**asked) as stream:
        call, *_ = stream.get_final_completion().choices[0].message.tool_calls
    return repr(call.function.parsed_arguments)


def tools_left_to_the_model() -> str:
    tools = [openai.pydantic_function_tool(Greet)]
    answer = client.chat.completions.create(model=model, messages=messages, tools=tools)
    return answer.choices[0].finish_reason


def responses() -> str:
    return shown(client.responses.create(model=model, input=QUESTION).output_text)


def responses_stream() -> str:
    with client.responses.stream(model=model, input=QUESTION) as stream:
        return shown(stream.get_final_response().output_text)


def responses_parse() -> str:
    return repr(client.responses.parse(model=model, input=QUESTION, text_format=Animal).output_parsed)


def responses_second_turn() -> str:
    first = client.responses.create(model=model, input=QUESTION, max_output_tokens=16)
    given = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "And then?"}]
    return shown(client.responses.create(model=model, input=given, max_output_tokens=16).output_text)


def responses_tools() -> str:
    tool = {"type": "function", "name": "Greet", "parameters": Greet.model_json_schema()}
    answer = client.responses.create(model=model, input=QUESTION, tools=[tool], tool_choice="required")
    call, *_ = [item for item in answer.output if item.type == "function_call"]
    return repr(Greet.model_validate_json(call.arguments))


def embeddings() -> str:
    try:
        client.embeddings.create(model=model, input="a")
    except openai.NotFoundError as error:
        return f"404: {error.body['message']}"
    raise AssertionError("no error")


report(
    named(
        *(models, completion, chat, chat_stream, chat_stream_helper, second_turn, parse),
        *(tools, tools_in_a_stream, tools_left_to_the_model),
        *(responses, responses_stream, responses_parse, responses_second_turn, responses_tools, embeddings),
    )
)
