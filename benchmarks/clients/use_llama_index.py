"""llama-index-llms-openai-like."""

from typing import Literal

import pydantic
from calls import QUESTION, given, named, report, shown
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

url, model = given()
common = {"model": model, "api_base": f"{url}/v1", "api_key": "none"}
client = OpenAILike(**common, is_chat_model=True, is_function_calling_model=True)
messages = [ChatMessage(role="user", content=QUESTION)]


class Animal(pydantic.BaseModel):
    """An animal of the story."""

    kind: Literal["cat", "dog", "bird"]
    brave: bool


def completion() -> str:
    return shown(OpenAILike(**common).complete("Once upon a time").text)


def completion_stream() -> str:
    return shown("".join(piece.delta for piece in OpenAILike(**common).stream_complete("Once upon a time")))


def chat() -> str:
    return shown(client.chat(messages).message.content)


def chat_stream() -> str:
    return shown("".join(piece.delta for piece in client.stream_chat(messages)))


def structured_llm() -> str:
    return repr(client.as_structured_llm(Animal).complete(QUESTION).raw)


def tools() -> str:
    def greet(kind: Literal["cat", "dog", "bird"]) -> str:
        """Greets an animal."""
        return f"hello, {kind}"

    tool = FunctionTool.from_defaults(greet)
    answer = client.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    call, *_ = client.get_tool_calls_from_response(answer)
    return str(call.tool_kwargs)


report(named(completion, completion_stream, chat, chat_stream, structured_llm, tools))
