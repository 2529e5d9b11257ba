"""What was said in a chat, and files of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twotower.cli.conversation.answering import Said


class Conversation:
    """A system prompt, "" for none, and turns of user and assistant; the last may still have no answer."""

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.turns: list[Said] = []

    @property
    def messages(self) -> list[Said]:
        """All that the model gets."""
        return [*([Said("system", self.system)] if self.system else []), *self.turns]

    @property
    def is_unanswered(self) -> bool:
        return bool(self.turns) and self.turns[-1].role == "user"

    def ask(self, text: str) -> None:
        """Adds a message of the user's, in the place of one that got no answer."""
        if self.is_unanswered:
            self.turns.pop()
        self.turns.append(Said("user", text))

    def answer(self, text: str) -> None:
        """Adds the answer to the last message."""
        assert self.is_unanswered
        self.turns.append(Said("assistant", text))

    def take_back(self) -> str | None:
        """Removes the last answer and returns it; None where the last message has none."""
        return self.turns.pop().content if self.turns and not self.is_unanswered else None

    def undo(self) -> bool:
        """Removes the user's last message and its answer. False if there is nothing to remove."""
        self.take_back()
        return bool(self.turns) and bool(self.turns.pop())

    def save(self, file: Path) -> None:
        """Writes {"messages": [...]}, as OpenAI's API has messages."""
        messages = [message._asdict() for message in self.messages]
        file.write_text(json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> "Conversation":
        """Reads what `save` or the server's page wrote. Raises ValueError, naming the file and what is wrong."""
        try:
            raw = json.loads(file.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        made = cls()
        for message in _messages(raw, file):
            if message.role in ("system", "developer") and not made.turns:
                made.system = "\n\n".join(part for part in (made.system, message.content) if part)
            elif message.role == ("assistant" if made.is_unanswered else "user"):
                made.turns.append(message)
            else:
                number = len(made.messages) + 1
                raise ValueError(
                    f"{file} has message {number} by {message.role!r}; after the system's, a chat has messages of "
                    "user and assistant in turn, from the user on"
                )
        return made


def _messages(raw: Any, file: Path) -> Iterator[Said]:
    conversations = raw.get("conversations") if isinstance(raw, dict) else None
    if isinstance(conversations, list):
        if len(conversations) != 1:
            raise ValueError(f"{file} holds {len(conversations)} conversations; export one of them alone")
        [raw] = conversations
    listed = raw.get("messages") if isinstance(raw, dict) else raw
    if not isinstance(listed, list):
        raise ValueError(f'{file} has no list of messages; write {{"messages": [{{"role": "user", "content": "…"}}]}}')
    for number, message in enumerate(listed, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{file} has message {number} without a role and a text as content")
        yield Said(role, content)
