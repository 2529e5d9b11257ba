"""Turning chat messages into a prompt with a checkpoint's own jinja template."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """A checkpoint's jinja template. It is run in a sandbox, since it is code by whoever made the checkpoint."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        # Templates are written for the settings, filters and functions of transformers' apply_chat_template.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template: Template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the checkpoint's chat template is broken: {error}; correct it, or remove it") from error

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """The template of a checkpoint directory, from chat_template.jinja or else tokenizer_config.json; None if there
        is none. Raises ValueError for a broken file.
        """
        config_file = directory / TOKENIZER_CONFIG_FILE
        config: dict[str, Any] = {}
        if config_file.is_file():
            try:
                config = json.loads(config_file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{config_file} is not JSON ({error}); download it again") from error
        source = config.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if (directory / TEMPLATE_FILE).is_file():
            source = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
        if source is None:
            return None
        special = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
        return cls(source, {k: v for k, v in special.items() if isinstance(v, str)})

    def render(self, turns: Sequence[Turn], continue_last: bool = False) -> str:
        """The prompt after which the model writes the next assistant message or, with `continue_last`, goes on with the
        last message of `turns`. Raises ValueError where the template refuses the messages."""
        try:
            prompt = self._template.render(
                messages=[{"role": turn.role, "content": turn.content} for turn in turns],
                add_generation_prompt=not continue_last,
                tools=None,
                **self._special_tokens,
            )
        except (TemplateError, TypeError) as error:  # TypeError: the template uses a value that is missing
            raise ValueError(f"the checkpoint's chat template refuses these messages: {error}") from error
        return _cut_behind(prompt, turns[-1].content) if continue_last else prompt


def _cut_behind(prompt: str, message: str) -> str:
    """The prompt up to the end of the last message. The template may have trimmed the message's outer spaces."""
    start = prompt.rfind(message.strip())
    if start < 0:
        raise ValueError(f"the checkpoint's chat template changes the message {message!r}, so it can't be continued")
    whole = message.lstrip()
    return prompt[: start + len(whole if prompt.startswith(whole, start) else whole.rstrip())]


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
