"""litellm."""

import json

import litellm
from calls import QUESTION, SCHEMA, given, named, report, shown

url, name = given()
model = f"openai/{name}"
vllm = f"hosted_vllm/{name}"
common = {"api_base": f"{url}/v1", "api_key": "none"}
messages = [{"role": "user", "content": QUESTION}]
tool = {"type": "function", "function": {"name": "greet", "description": "Greets.", "parameters": SCHEMA}}
litellm.suppress_debug_info = True


def completion() -> str:
    answer = litellm.text_completion(model=f"text-completion-openai/{name}", prompt="Once upon a time", **common)
    return shown(answer.choices[0].text)


def chat() -> str:
    return shown(litellm.completion(model=model, messages=messages, **common).choices[0].message.content)


def chat_as_vLLM() -> str:
    return shown(litellm.completion(model=vllm, messages=messages, **common).choices[0].message.content)


def chat_stream() -> str:
    chunks = litellm.completion(model=model, messages=messages, stream=True, **common)
    return shown("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def response_format() -> str:
    wanted = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    answer = litellm.completion(model=model, messages=messages, response_format=wanted, **common)
    return str(json.loads(answer.choices[0].message.content))


def tools() -> str:
    answer = litellm.completion(model=model, messages=messages, tools=[tool], tool_choice="required", **common)
    call, *_ = answer.choices[0].message.tool_calls
    return str(json.loads(call.function.arguments))


def tools_in_a_stream() -> str:
    asked = {"model": model, "messages": messages, "tools": [tool], "tool_choice": "required", "stream": True}
    answer = litellm.stream_chunk_builder(list(litellm.completion(**asked, **common)))
    call, *_ = answer.choices[0].message.tool_calls
    return str(json.loads(call.function.arguments))


def responses() -> str:
    return _text(litellm.responses(model=model, input=QUESTION, **common))


def responses_stream() -> str:
    *_, last = litellm.responses(model=model, input=QUESTION, stream=True, **common)
    return _text(last.response)


def responses_by_chat() -> str:
    return _text(litellm.responses(model=vllm, input=QUESTION, use_chat_completions_api=True, **common))


def chat_by_responses() -> str:
    answer = litellm.completion(model=f"openai/responses/{name}", messages=messages, **common)
    return shown(answer.choices[0].message.content)


def messages_of_Anthropic() -> str:
    import asyncio

    asked = {"model": f"anthropic/{name}", "messages": messages, "max_tokens": 32, "api_base": url, "api_key": "none"}
    answer = asyncio.run(litellm.anthropic.messages.acreate(**asked))
    return shown(answer["content"][0]["text"])


def _text(response) -> str:
    return shown("".join(part.text for item in response.output if item.type == "message" for part in item.content))


report(
    named(
        *(completion, chat, chat_as_vLLM, chat_stream, response_format, tools, tools_in_a_stream),
        *(responses, responses_stream, responses_by_chat, chat_by_responses, messages_of_Anthropic),
    )
)
