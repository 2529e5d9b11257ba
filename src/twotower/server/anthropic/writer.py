"""Answers as Anthropic's protocol has them: a message of blocks, and the events of its stream."""

import json
import secrets
from typing import Any

from twotower.decoding.output import Generation
from twotower.server.dialect import Event
from twotower.server.errors import Failure, anthropic_body
from twotower.server.reasoning import Thought
from twotower.server.reply import Counts
from twotower.server.tools.calls import Call


class MessageWriter:
    """Writes the message that answers a prompt of `num_prompt` tokens; an `AnswerWriter`."""

    def __init__(self, model: str, num_prompt: int) -> None:
        self.id = f"msg_{secrets.token_hex(12)}"
        self._model = model
        self._num_prompt = num_prompt
        self._content: list[dict[str, Any]] = []
        self._is_open = False  # whether the last block may grow
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._counts = Counts()

    @property
    def whole(self) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self._model}
        return head | {"content": [*self._content]} | self._stop | {"usage": self._usage()}

    def begin(self) -> list[Event]:
        return [{"type": "message_start", "message": self.whole}, {"type": "ping"}]

    def push(self, part: Thought | str | Call) -> list[Event]:
        if isinstance(part, Call):
            return self._call(part)
        kind, text = ("thinking", part.text) if isinstance(part, Thought) else ("text", part)
        events = []
        if not self._is_open or self._content[-1]["type"] != kind:
            # nobody but Anthropic signs what a model thinks
            empty = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            events = [*self._close(), *self._open(empty)]
        self._content[-1][kind] += text
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def end(self, result: Generation) -> list[Event]:
        self._counts = Counts.of(result)
        self._stop = {"stop_reason": self._reason(result), "stop_sequence": result.stop_string}
        told = {"type": "message_delta", "delta": self._stop, "usage": self._usage()}
        return [*self._close(), told, {"type": "message_stop"}]

    def failed(self, failure: Failure) -> list[Event]:
        return [anthropic_body(failure.status, failure.message, failure.code)]

    def _call(self, call: Call) -> list[Event]:
        block = {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": call.name, "input": {}}
        events = [*self._close(), *self._open(block)]
        self._content[-1]["input"] = json.loads(call.arguments)
        return [*events, self._delta({"type": "input_json_delta", "partial_json": call.arguments}), *self._close()]

    def _open(self, block: dict[str, Any]) -> list[Event]:
        self._content.append(block)
        self._is_open = True
        return [{"type": "content_block_start", "index": len(self._content) - 1, "content_block": {**block}}]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _close(self) -> list[Event]:
        was_open, self._is_open = self._is_open, False
        return [{"type": "content_block_stop", "index": len(self._content) - 1}] if was_open else []

    def _reason(self, result: Generation) -> str:
        if result.finish_reason == "length":
            return "max_tokens"
        if any(block["type"] == "tool_use" for block in self._content):
            return "tool_use"
        return "end_turn" if result.stop_string is None else "stop_sequence"

    def _usage(self) -> dict[str, Any]:
        """Tokens and calls; unlike OpenAI's, the tokens of the input are without those that were cached."""
        return {
            "input_tokens": self._num_prompt - self._counts.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._counts.cached,
            "output_tokens": self._counts.tokens,
            **self._counts.calls,
        }
