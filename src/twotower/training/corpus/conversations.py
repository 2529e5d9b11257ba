"""Conversations as documents: lists of messages, rendered by a checkpoint's chat template."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.training.corpus.documents import Document, SourceRecord, check_text

if TYPE_CHECKING:
    from twotower.checkpoints.chat_template import ChatTemplate, Turn

# Fields in which records have their messages, the second with the keys `from` and `value`, as ShareGPT wrote them.
_FIELDS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}


def messages_field(record: SourceRecord, text_field: str) -> str | None:
    """The field of a record's messages: `text_field` if a list is there, or without it one that commonly holds them."""
    if text_field in record.fields:
        return text_field if isinstance(record.fields[text_field], list) else None
    return next((field for field in _FIELDS if field in record.fields), None)


class Conversations:
    """What renders messages, with the chat template of the checkpoint in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._template: ChatTemplate | None = None

    def documents(self, record: SourceRecord, field: str) -> Iterator[Document]:
        """A document for each message of the assistant's: what is before it is the prompt, and it is learnt, up to and
        with what the template writes behind it. One with the key `weight` 0 is not learnt.

        Raises ValueError, naming the record, for messages that can't be rendered or hold nothing to learn.
        """
        turns = self._turns(record, field)
        last = [i for i, turn in enumerate(turns) if i and turn.role == "assistant" and turn.more.get("weight") != 0]
        if not last:
            raise ValueError(f"{record.where} has no message of the role 'assistant' behind another; leave it out")
        for i in last:
            prompt = self._render(record, turns[:i], complete=False)
            whole = self._render(record, turns[: i + 1], complete=True)
            # A prompt may go on, as with <think>, where a message that is complete does not.
            same = next((n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
            prompt, text = whole[:same], whole[same:]
            content = turns[i].content
            if isinstance(content, str) and content.strip() not in text:
                raise ValueError(
                    f"{record.where}: the chat template does not write message {i + 1} behind the prompt for it, so it "
                    "can't be learnt; give the record a prompt and a text instead"
                )
            yield Document(prompt, text, rendered=True)

    def prompt(self, record: SourceRecord, field: str) -> str:
        """The prompt for the next message, or for the last one where that is the assistant's. Raises ValueError, naming
        the record."""
        turns = self._turns(record, field)
        if turns[-1].role == "assistant":
            turns.pop()
        if not turns:
            raise ValueError(f"{record.where} must have messages to answer; add one")
        return self._render(record, turns, complete=False)

    def _turns(self, record: SourceRecord, field: str) -> "list[Turn]":
        from twotower.checkpoints.chat_template import Turn

        messages = record.fields[field]
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{record.where} has no list of messages in {field!r}; correct the record")
        try:
            return [Turn.read(_with_role(message)) for message in messages]
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}; correct the record") from error

    def _render(self, record: SourceRecord, turns: "list[Turn]", *, complete: bool) -> str:
        template = self._template = self._template or _load(self._folder, record.where)
        render = template.complete if complete else template.render
        try:
            text = render(turns, tools=record.fields.get("tools"), documents=record.fields.get("documents"))
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from error
        return check_text(text, record.where)


def _with_role(message: Any) -> Any:
    """A message with `role` and `content` in place of `from` and `value`."""
    if not isinstance(message, dict) or "role" in message or not isinstance(message.get("from"), str):
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": _ROLES.get(message["from"], message["from"]), "content": message.get("value"), **rest}


def _load(folder: Path, where: str) -> "ChatTemplate":
    try:
        from twotower.checkpoints.chat_template import ChatTemplate
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where} has messages, which need the package {error.name}; pip install 'twotower[data]'"
        ) from error
    template = ChatTemplate.load(folder)
    if template is None:
        raise ValueError(
            f"{where} has messages, and {folder} no chat template for them; add a chat_template.jinja, or give each "
            "record a text, or a prompt and a text, instead"
        )
    return template
