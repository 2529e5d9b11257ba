"""Functions that a request lets the model call."""

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, field_validator

from twotower.server.errors import ApiError
from twotower.server.fields import Body, Many
from twotower.server.messages import Open
from twotower.server.tools.calls import Functions

# Names that every way of writing calls can say. OpenAI allows fewer; the names of some tool servers have these.
_NAME = re.compile(r"[\w.:/-]{1,128}")
_NO_PARAMETERS = {"type": "object", "properties": {}}


class _Lenient(Open):
    """Keys that are not known change nothing."""

    model_config = ConfigDict(extra="ignore")


class FunctionName(_Lenient):
    """A function, named."""

    name: str


class Function(FunctionName):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    description: str | None = None
    parameters: dict[str, Any] | None = None

    @field_validator("name")
    @classmethod
    def _speakable(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("1 to 128 letters, digits and _ . : / -")
        return name

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema and schema.get("type", "object") != "object":
            raise ValueError('a JSON schema of type "object"')
        return schema


class Tool(_Lenient):
    """Something that the model may use; functions are all that it can."""

    type: Literal["function"]
    function: Function

    @property
    def shown(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        about = {} if self.function.description is None else {"description": self.function.description}
        parameters = self.function.parameters or _NO_PARAMETERS
        return {"type": self.type, "function": {"name": self.function.name, **about, "parameters": parameters}}


class NamedTool(_Lenient):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(_Lenient):
    """Those of the tools that may be used, or if `mode` is "required" must."""

    mode: Literal["auto", "required"]
    tools: Annotated[Many[NamedTool], Field(min_length=1)]


class ToolSubset(_Lenient):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Annotated[NamedTool | ToolSubset, Field(discriminator="type")]


class ToolUse(NamedTuple):
    """What an answer may call: `functions`, at least one of them if `must`, and at most one if `one_call`."""

    functions: Functions
    must: bool
    one_call: bool


class ToolSettings(Body):
    """Which functions an answer may call. `tool_choice` says whether it must, and `parallel_tool_calls` whether it may
    have several calls."""

    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def tool_use(self) -> ToolUse | None:
        """What the answer may call, None if nothing. Raises ApiError for a choice of a function that isn't given."""
        choice = self.tool_choice
        if choice == "none":
            return None
        names, must = _chosen(choice)
        functions = {tool.function.name: tool.function.parameters or _NO_PARAMETERS for tool in self.tools or ()}
        missing = next((name for name in names if name not in functions), None)
        if missing is not None:
            message = f"tool_choice names the function {missing[:128]!r}, and tools has no such function"
            raise ApiError(400, message, param="tool_choice", code="invalid_value")
        if not functions and must:
            message = "tool_choice is required, and tools is missing; give the functions to choose from"
            raise ApiError(400, message, param="tool_choice", code="invalid_value")
        chosen = {name: functions[name] for name in names} or functions
        one_call = isinstance(choice, NamedTool) or self.parallel_tool_calls is False
        return ToolUse(chosen, must, one_call) if chosen else None


def _chosen(choice: str | NamedTool | ToolSubset | None) -> tuple[list[str], bool]:
    """The names of the functions that are chosen, none if all are, and whether one of them must be called."""
    if isinstance(choice, NamedTool):
        return [choice.function.name], True
    if isinstance(choice, ToolSubset):
        return [one.function.name for one in choice.allowed_tools.tools], choice.allowed_tools.mode == "required"
    return [], choice == "required"
