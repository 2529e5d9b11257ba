"""instructor."""

from typing import Literal

import instructor
import openai
import pydantic
from calls import QUESTION, given, named, report

url, model = given()
server = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
messages = [{"role": "user", "content": QUESTION}]


class Animal(pydantic.BaseModel):
    kind: Literal["cat", "dog", "bird"]
    brave: bool


def TOOLS() -> str:
    client = instructor.from_openai(server)
    return repr(client.chat.completions.create(model=model, messages=messages, response_model=Animal))


def TOOLS_in_a_stream() -> str:
    client = instructor.from_openai(server)
    partial = client.chat.completions.create_partial(model=model, messages=messages, response_model=Animal)
    return repr(list(partial)[-1])


def JSON_SCHEMA() -> str:
    client = instructor.from_openai(server, mode=instructor.Mode.JSON_SCHEMA)
    return repr(client.chat.completions.create(model=model, messages=messages, response_model=Animal))


report(named(TOOLS, TOOLS_in_a_stream, JSON_SCHEMA))
