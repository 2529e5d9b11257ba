"""Answers as /v1/responses has them: a list of items, and the events of its stream."""

import copy
import itertools
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from twotower.decoding.output import Generation
from twotower.server.dialect import Event
from twotower.server.errors import Failure, body
from twotower.server.reasoning import Thought
from twotower.server.reply import Counts
from twotower.server.tools.calls import Call


class ResponseWriter:
    """Writes the response to a prompt of `num_prompt` tokens; an `AnswerWriter`.

    `echo` are the keys of a response that say what was asked for, `count` says how many tokens a text has.
    """

    def __init__(self, echo: Mapping[str, Any], num_prompt: int, count: Callable[[str], int]) -> None:
        self.id = f"resp_{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._echo = echo
        self._num_prompt = num_prompt
        self._count = count
        self._output: list[dict[str, Any]] = []
        self._is_open = False  # whether the last item may grow
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._counts: Counts | None = None
        self._numbers = itertools.count()

    @property
    def whole(self) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        head = {"id": self.id, "object": "response", "created_at": self._created, "status": self._status}
        head |= {"error": self._error, "incomplete_details": cut, "output": copy.deepcopy(self._output)}
        return head | {"usage": None if self._counts is None else self._usage(self._counts), **self._echo}

    def begin(self) -> list[Event]:
        return [self._event(kind, response=self.whole) for kind in ("created", "in_progress")]

    def push(self, part: Thought | str | Call) -> list[Event]:
        if isinstance(part, Call):
            return self._call(part)
        kind, text = ("reasoning", part.text) if isinstance(part, Thought) else ("message", part)
        events = [] if self._is_open and self._output[-1]["type"] == kind else [*self._close(), *self._open(kind)]
        [content] = self._output[-1]["content"]
        content["text"] += text
        return [*events, self._part_event(f"{content['type']}.delta", delta=text, **_no_logprobs(content))]

    def end(self, result: Generation) -> list[Event]:
        self._counts = Counts.of(result)
        last = "incomplete" if result.finish_reason == "length" else "completed"
        # clients look for a message, also where it says nothing
        events = [] if self._output else self._open("message")
        events += self._close(last)
        self._status = last
        return [*events, self._event(last, response=self.whole)]

    def failed(self, failure: Failure) -> list[Event]:
        self._status, self._error = "failed", {"code": "server_error", "message": failure.message}
        ended = self._event("failed", response=self.whole)
        # as OpenAI documents it, and with the `error` on which its client raises
        told = {"type": "error", "code": failure.code, "message": failure.message, "param": None}
        made = body(failure.status, failure.message, code=failure.code)
        return [ended, told | {"sequence_number": next(self._numbers)} | made]

    def _open(self, kind: str) -> list[Event]:
        """Begins an item of text."""
        self._is_open = True
        item: dict[str, Any] = {"id": "", "type": kind, "status": "in_progress", "content": []}
        if kind == "message":
            item |= {"id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}
            content: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item |= {"id": f"rs_{secrets.token_hex(12)}", "summary": []}
            content = {"type": "reasoning_text", "text": ""}
        self._output.append(item)
        added = self._item_event("added")
        item["content"].append(content)
        return [added, self._part_event("content_part.added", part={**content})]

    def _close(self, status: str = "completed") -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self._output[-1]
        item["status"] = status
        [content] = item["content"]
        done = self._part_event(f"{content['type']}.done", text=content["text"], **_no_logprobs(content))
        return [done, self._part_event("content_part.done", part={**content}), self._item_event("done")]

    def _call(self, call: Call) -> list[Event]:
        events = self._close()
        item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "in_progress"}
        item |= {"call_id": f"call_{secrets.token_hex(12)}", "name": call.name, "arguments": ""}
        self._output.append(item)
        events.append(self._item_event("added"))
        item |= {"status": "completed", "arguments": call.arguments}
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        kind = "function_call_arguments"
        events.append(self._event(f"{kind}.delta", **place, delta=call.arguments))
        events.append(self._event(f"{kind}.done", **place, name=call.name, arguments=call.arguments))
        return [*events, self._item_event("done")]

    def _item_event(self, kind: str) -> Event:
        index = len(self._output) - 1
        return self._event(f"output_item.{kind}", output_index=index, item=copy.deepcopy(self._output[-1]))

    def _part_event(self, kind: str, **fields: Any) -> Event:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": f"response.{kind}", "sequence_number": next(self._numbers), **fields}

    def _usage(self, counts: Counts) -> dict[str, Any]:
        """Tokens and calls. What is reasoning is known of the text, so its tokens are counted there."""
        thoughts = [item["content"][0]["text"] for item in self._output if item["type"] == "reasoning"]
        return {
            "input_tokens": self._num_prompt,
            "input_tokens_details": {"cached_tokens": counts.cached},
            "output_tokens": counts.tokens,
            "output_tokens_details": {"reasoning_tokens": sum(map(self._count, thoughts))},
            "total_tokens": self._num_prompt + counts.tokens,
            **counts.calls,
        }


def _no_logprobs(content: Mapping[str, Any]) -> dict[str, Any]:
    """What events of a part of a message have besides."""
    return {"logprobs": []} if "logprobs" in content else {}
