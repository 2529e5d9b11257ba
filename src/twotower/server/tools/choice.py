"""Which way of writing calls a model knows."""

from typing import TYPE_CHECKING, Literal

from twotower.server.tools.calls import ToolFormat
from twotower.server.tools.hermes import OPEN, Hermes
from twotower.server.tools.json_list import PAIRS, JsonList
from twotower.server.tools.llama3 import Llama3
from twotower.server.tools.mistral import ARGS, Mistral
from twotower.server.tools.xml import FunctionXml

if TYPE_CHECKING:
    from twotower.checkpoints.chat_template import ChatTemplate

# "auto" goes by the template; the others are called as in vLLM.
ToolParser = Literal["auto", "hermes", "llama3_json", "mistral", "qwen3_coder", "json"]

# What templates write -> the format that they teach; the first that a template has counts.
_TEACHES: tuple[tuple[str, ToolParser], ...] = (
    ("[TOOL_CALLS]", "mistral"),
    ("<function=", "qwen3_coder"),
    (OPEN, "hermes"),
    *((mark, "json") for mark in PAIRS),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary', "llama3_json"),
    ("tools", "json"),
)


def tool_format(parser: ToolParser, template: "ChatTemplate | None") -> ToolFormat:
    """The format of a name; for "auto" the one that the chat template teaches, by the marks that it writes. A model
    whose template knows no tools is told of Hermes' format."""

    def has(word: str) -> bool:
        return template is not None and template.reads(word)

    if parser == "auto":
        parser = next((name for word, name in _TEACHES if has(word)), "hermes")
    if parser == "mistral":
        return Mistral(named=has(ARGS))
    if parser == "json":
        return JsonList(next((mark for mark in PAIRS if has(mark)), ""))
    if parser == "llama3_json":
        return Llama3()
    return FunctionXml() if parser == "qwen3_coder" else Hermes()
