"""Which way of writing calls a model knows."""

from typing import Literal

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.server.tools.calls import ToolFormat
from twotower.server.tools.hermes import Hermes

ToolParser = Literal["auto", "hermes"]


def tool_format(parser: ToolParser, template: ChatTemplate | None) -> ToolFormat:
    """The format of a name; for "auto" the one that the chat template teaches, by the marks that it writes."""
    return Hermes()
