"""langchain-openai."""

from typing import Literal

import pydantic
from calls import QUESTION, given, named, report, shown
from langchain_openai import ChatOpenAI, OpenAI

url, model = given()
client = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model)


class Animal(pydantic.BaseModel):
    """An animal of the story."""

    kind: Literal["cat", "dog", "bird"]
    brave: bool


def completion() -> str:
    return shown(OpenAI(base_url=f"{url}/v1", api_key="none", model=model).invoke("Once upon a time"))


def chat() -> str:
    answer = client.invoke(QUESTION)
    assert answer.usage_metadata is not None
    return shown(answer.content)


def chat_stream() -> str:
    return shown("".join(chunk.content for chunk in client.stream(QUESTION)))


def with_structured_output() -> str:
    return repr(client.with_structured_output(Animal).invoke(QUESTION))


def with_structured_output_by_tools() -> str:
    return repr(client.with_structured_output(Animal, method="function_calling").invoke(QUESTION))


def bind_tools() -> str:
    call, *_ = client.bind_tools([Animal], tool_choice="any").invoke(QUESTION).tool_calls
    return repr(Animal.model_validate(call["args"]))


def bind_tools_stream() -> str:
    chunks = list(client.bind_tools([Animal], tool_choice="Animal").stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    call, *_ = whole.tool_calls
    return repr(Animal.model_validate(call["args"]))


def bind_tools_left_to_the_model() -> str:
    return client.bind_tools([Animal]).invoke(QUESTION).response_metadata["finish_reason"]


def responses() -> str:
    other = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, use_responses_api=True)
    return shown(other.invoke(QUESTION).text)


report(
    named(
        *(completion, chat, chat_stream, with_structured_output, with_structured_output_by_tools),
        *(bind_tools, bind_tools_stream, bind_tools_left_to_the_model, responses),
    )
)
