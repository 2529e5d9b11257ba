"""pydantic-ai."""

import asyncio
from typing import Literal

import pydantic
from calls import QUESTION, given, named, report, shown
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

url, name = given()
provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
model = OpenAIChatModel(name, provider=provider)


class Animal(pydantic.BaseModel):
    kind: Literal["cat", "dog", "bird"]
    brave: bool


def chat() -> str:
    return shown(Agent(model, instructions="Be kind.").run_sync(QUESTION).output)


def chat_stream() -> str:
    async def read() -> str:
        async with Agent(model).run_stream(QUESTION) as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    return shown(asyncio.run(read()))


def output_by_default() -> str:
    return repr(Agent(model, output_type=Animal).run_sync(QUESTION).output)


def output_by_default_in_a_stream() -> str:
    async def read() -> Animal:
        async with Agent(model, output_type=Animal).run_stream(QUESTION) as result:
            return await result.get_output()

    return repr(asyncio.run(read()))


def NativeOutput_() -> str:
    return repr(Agent(model, output_type=NativeOutput(Animal)).run_sync(QUESTION).output)


def tools_left_to_the_model() -> str:
    agent = Agent(model)

    @agent.tool_plain
    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    return shown(agent.run_sync(QUESTION).output)


def responses() -> str:
    return shown(Agent(OpenAIResponsesModel(name, provider=provider)).run_sync(QUESTION).output)


report(
    named(
        *(chat, chat_stream, output_by_default, output_by_default_in_a_stream, NativeOutput_),
        *(tools_left_to_the_model, responses),
    )
)
