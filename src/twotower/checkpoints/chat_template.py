"""Turning chat messages into a prompt with a checkpoint's own jinja templates, as transformers renders them."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twotower.checkpoints.hf.config_file import read_object
from twotower.checkpoints.hf.special_tokens import TOKENIZER_CONFIG_FILE, read_special_tokens

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
# Where the processors of models that also read images keep it
PROCESSOR_TEMPLATE_FILE = "chat_template.json"

_DEFAULT, _WITH_TOOLS = "default", "tool_use"
# Under which names messages have the model's reasoning; templates read the first, those of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# What a template that can't take the messages raises, beside its own refusals
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)


class Turn(NamedTuple):
    """One message of a conversation. `more` are further keys that templates read, such as `name` or `tool_calls`."""

    role: str
    content: Any
    more: Mapping[str, Any] = {}

    @classmethod
    def read(cls, message: Any) -> Self:
        """A message of a file. Raises ValueError for what is no object with a role and, unless null, a content."""
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"the message {message!r:.80} is no object with role and content")
        return cls(message["role"], message.get("content"), {k: v for k, v in message.items() if k not in cls._fields})

    @property
    def message(self) -> dict[str, Any]:
        """The message as templates see it: without keys that are None, and with its reasoning under all its names."""
        given = {"role": self.role, "content": self.content} | dict(self.more)
        found = {key: value for key, value in given.items() if value is not None}
        reasoning = next((found[key] for key in _REASONING if key in found), None)
        return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


class ChatTemplate:
    """A checkpoint's jinja templates, name -> source, of which "tool_use" is for messages with tools and "default" for
    all others. They are run in a sandbox, since they are code by whoever made the checkpoint."""

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        sources = {_DEFAULT: source} if isinstance(source, str) else dict(source)
        self.source = sources.get(_DEFAULT, "")
        self._sources = sources
        self._special_tokens = special_tokens
        # Templates are written for the settings, tags, filters and functions of transformers' apply_chat_template.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        self._templates: dict[str, Template] = {}
        for name, text in sources.items():
            try:
                self._templates[name] = environment.from_string(text)
            except TemplateError as error:
                which = "" if name == _DEFAULT else f" {name!r}"
                raise ValueError(f"the chat template{which} is broken: {error}; correct it, or remove it") from error

    @classmethod
    def load(cls, directory: Path, file: Path | None = None) -> Self | None:
        """The templates of a checkpoint directory, None if there is none; the one in `file`, if given, in their place.

        As in transformers, chat_template.jinja and the files in additional_chat_templates win over
        tokenizer_config.json, and that over a processor's chat_template.json. The names of special tokens come from
        tokenizer_config.json and special_tokens_map.json. Raises ValueError for a broken file.
        """
        if file is not None:
            try:
                return cls(file.read_text(encoding="utf-8"), read_special_tokens(directory))
            except ValueError as error:
                raise ValueError(f"{file} can't be used: {error}") from error
        config = read_object(directory / TOKENIZER_CONFIG_FILE)
        files = {_DEFAULT: directory / TEMPLATE_FILE}
        files |= {file.stem: file for file in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
        sources = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
        for place in (config, read_object(directory / PROCESSOR_TEMPLATE_FILE)):
            sources = sources or _named(place.get("chat_template"))
        return cls(sources, read_special_tokens(directory)) if sources else None

    def render(
        self,
        turns: Sequence[Turn],
        continue_last: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt after which the model writes the next assistant message or, with `continue_last`, goes on with the
        last message of `turns`. Without `generation_prompt` it ends behind the messages.

        `tools` are JSON schemas of functions and `documents` texts to answer from, which the template may write into
        the prompt, and `variables` are further variables that it may read. Raises ValueError where the template refuses
        the messages.
        """
        begins = generation_prompt and not continue_last
        prompt = self._rendered(turns, tools, documents, add_generation_prompt=begins, variables=variables or {})
        return _cut_behind(prompt, turns[-1].content) if continue_last else prompt

    def complete(
        self,
        turns: Sequence[Turn],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The messages as a text to learn: up to and with what the template writes behind the last of `turns`. Raises
        ValueError where the template refuses the messages."""
        return self._rendered(turns, tools, documents, add_generation_prompt=False, variables={})

    def reads(self, word: str) -> bool:
        """Whether a template mentions a word, such as the name of a role."""
        return any(word in source for source in self._sources.values())

    def _rendered(
        self,
        turns: Sequence[Turn],
        tools: Any,
        documents: Any,
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        name = _WITH_TOOLS if tools is not None and _WITH_TOOLS in self._templates else _DEFAULT
        if name not in self._templates:
            raise ValueError(f"the chat templates are {sorted(self._templates)}, and none is {_DEFAULT!r}")
        try:
            return self._templates[name].render(
                **{
                    **self._special_tokens,
                    **variables,
                    "messages": [turn.message for turn in turns],
                    "add_generation_prompt": add_generation_prompt,
                    "tools": tools,
                    "documents": documents,
                }
            )
        except _FAILURES as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error


class _GenerationTag(Extension):
    """`{% generation %}` … `{% endgeneration %}`, with which templates mark what the model writes. What is between is
    rendered as it is; as in transformers, variables that are set there aren't seen outside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

    def _between(self, caller: Callable[[], str]) -> str:
        return caller()


def _named(source: Any) -> dict[str, str]:
    """Name -> source of what a JSON file has as `chat_template`: one, a list of named ones, an object, or nothing."""
    if isinstance(source, str):
        return {_DEFAULT: source}
    if isinstance(source, list):
        return {entry["name"]: entry["template"] for entry in source}
    return dict(source or {})


def _cut_behind(prompt: str, message: str) -> str:
    """The prompt up to the end of the last message. The template may have trimmed the message's outer spaces."""
    start = prompt.rfind(message.strip())
    if start < 0:
        raise ValueError(f"the chat template changes the message {message!r}, so it can't be continued")
    whole = message.lstrip()
    return prompt[: start + len(whole if prompt.startswith(whole, start) else whole.rstrip())]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
