"""outlines, its back end for vLLM and for OpenAI."""

from typing import Literal

import openai
import outlines
import pydantic
from calls import QUESTION, given, named, report, shown
from outlines.types import CFG, Regex

url, name = given()
server = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
model = outlines.from_vllm(server, name)


class Animal(pydantic.BaseModel):
    kind: Literal["cat", "dog", "bird"]
    brave: bool


def chat() -> str:
    return shown(model(QUESTION))


def chat_stream() -> str:
    return shown("".join(model.stream(QUESTION)))


def class_() -> str:
    return repr(Animal.model_validate_json(model(QUESTION, Animal)))


def choice() -> str:
    return repr(model(QUESTION, Literal["yes", "no"]))


def number() -> str:
    return str(int(model(QUESTION, Regex("[1-9][0-9]"))))


def grammar() -> str:
    return repr(model(QUESTION, CFG('start: "yes" | "no"')))


def class_in_a_stream() -> str:
    return repr(Animal.model_validate_json("".join(model.stream(QUESTION, Animal))))


def class_by_OpenAI() -> str:
    return repr(Animal.model_validate_json(outlines.from_openai(server, name)(QUESTION, Animal)))


report(named(chat, chat_stream, class_, choice, number, grammar, class_in_a_stream, class_by_OpenAI))
