"""Answers by a server with OpenAI's API; one of ours also shows its steps."""

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from twotower.cli.conversation.answering import (
    PLAIN_STOP,
    AnswerEnd,
    AnswerFailed,
    AnswerSettings,
    Moment,
    Said,
    plain_form,
)
from twotower.cli.live import FixedPlace

# The longest wait for a byte: a large prompt may take a while before the first token.
_SECONDS = 600.0
_BROKEN = (OSError, http.client.HTTPException)


class RemoteModel:
    """A model behind the address of an OpenAI API, such as http://host:8000/v1.

    A `name` of None takes the server's first one. Raises AnswerFailed if that needs a server that can't be reached or
    refuses the key, ValueError for a bad address.
    """

    def __init__(self, url: str, name: str | None, api_key: str | None) -> None:
        parts = urllib.parse.urlsplit(url.rstrip("/"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url is {url!r}, must be an address such as http://127.0.0.1:8000/v1")
        self._api = parts.geturl() if parts.path else f"{parts.geturl()}/v1"
        self._own = self._api.removesuffix("/v1") + "/twotower"
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.name = name or self._first_name()
        # None where the server isn't ours
        self._about = self._ask_about()
        self.is_plain = self._about is not None and not self._about["has_chat_template"]

    @property
    def about(self) -> str:
        return f"{self.name} at {self._api}"

    def moments(self, messages: Sequence[Said], settings: AnswerSettings) -> Generator[Moment, None, None]:
        body = _fields(settings)
        if self.is_plain:
            asked: dict[str, Any] = {"prompt": plain_form(messages), "stop": [*body.pop("stop", ()), PLAIN_STOP]}
        else:
            asked = {"messages": [message._asdict() for message in messages]}
        if self._about is not None:
            yield from self._watched(asked | body)
            return
        path = "completions" if self.is_plain else "chat/completions"
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        try:
            yield from self._streamed(f"{self._api}/{path}", {"model": self.name} | asked | usage | body)
        except _NoTemplate:
            self.is_plain = True
            yield from self.moments(messages, settings)

    def _first_name(self) -> str:
        listed = self._get(f"{self._api}/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        names = [entry["id"] for entry in entries or [] if isinstance(entry, dict) and "id" in entry]
        if not names:
            raise AnswerFailed(f"{self._api}/models lists no model; name one beside --url")
        return str(names[0])

    def _ask_about(self) -> dict[str, Any] | None:
        try:
            about = self._get(f"{self._own}/about")
        except AnswerFailed:
            return None
        is_ours = isinstance(about, dict) and "has_chat_template" in about
        return about if is_ours and about["model"] == self.name else None

    def _get(self, url: str) -> Any:
        with self._open(url) as answer:
            try:
                return json.load(answer)
            except (*_BROKEN, ValueError) as error:
                raise AnswerFailed(f"{url} answers with something else than JSON; correct --url") from error

    def _open(self, url: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, self._headers)
        try:
            opened: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_SECONDS)
        except urllib.error.HTTPError as error:
            raise _refusal(error) from error
        except _BROKEN as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise AnswerFailed(f"{url} can't be reached: {reason}") from error
        return opened

    def _events(self, url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The objects of a stream of server-sent events. Raises AnswerFailed for an error among them."""
        with self._open(url, body) as answer:
            try:
                for line in answer:
                    data = line.removeprefix(b"data:").strip()
                    if line.startswith(b"data:") and data and data != b"[DONE]":
                        event = json.loads(data)
                        if event.get("error"):
                            raise AnswerFailed(_message(event) or "the server failed")
                        yield event
            except (*_BROKEN, json.JSONDecodeError) as error:
                raise AnswerFailed(f"the connection broke: {error!r}") from error

    def _watched(self, body: dict[str, Any]) -> Iterator[Moment]:
        assert self._about is not None
        for step in self._events(f"{self._own}/watch", body):
            places = () if step["block"] is None else tuple(map(_place, step["block"]["places"]))
            end, result = None, step.get("result")
            if result is not None:
                counts = (result["num_tokens"], result["denoiser_calls"], result["context_calls"])
                whole = result["prompt_tokens"] + result["num_tokens"]
                end = AnswerEnd(result["finish_reason"], *counts, whole, self._about["max_context"])
            yield Moment(step["text"], places, end)
            if end is not None:
                return
        raise AnswerFailed("the connection broke before the answer was finished")

    def _streamed(self, url: str, body: dict[str, Any]) -> Iterator[Moment]:
        reason, usage = None, None
        for chunk in self._events(url, body):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or []:
                reason = choice.get("finish_reason") or reason
                text = choice.get("text") or (choice.get("delta") or {}).get("content")
                if text:
                    yield Moment(text)
        if reason is None:
            raise AnswerFailed("the connection broke before the answer was finished")
        counts = usage or {}
        yield Moment(
            "",
            (),
            AnswerEnd(
                reason,
                counts.get("completion_tokens"),
                counts.get("denoiser_calls"),
                counts.get("context_calls"),
                counts.get("total_tokens"),
            ),
        )


class _NoTemplate(AnswerFailed):
    """The server's model has no chat template."""


def _refusal(error: urllib.error.HTTPError) -> AnswerFailed:
    """The error for a response that refuses the request, in the server's words."""
    try:
        body = json.loads(error.read())
    except (*_BROKEN, ValueError):
        body = None
    detail = _message(body) or f"{error.geturl()} answers {error.code} {error.reason}"
    found = body.get("error") if isinstance(body, dict) else None
    code = found.get("code") if isinstance(found, dict) else None
    if error.code == 401:
        return AnswerFailed(f"{detail}; --api-key gives one")
    if code == "no_chat_template":
        return _NoTemplate(detail)
    if code == "context_length_exceeded":
        return AnswerFailed(f"{detail}; here /undo takes back the last message, and /clear begins anew")
    return AnswerFailed(detail)


def _message(body: Any) -> str | None:
    """The message of an error object; servers have it as error.message, error, message or detail."""
    if not isinstance(body, dict):
        return None
    found = body.get("error") or body.get("message") or body.get("detail")
    message = found.get("message") if isinstance(found, dict) else found
    return None if message is None else str(message)


def _place(place: dict[str, Any] | None) -> FixedPlace | None:
    # the server gives no text for control tokens and parts of characters
    return None if place is None else FixedPlace(place["text"] or "·", place["confidence"])


def _fields(settings: AnswerSettings) -> dict[str, Any]:
    """The fields of a request for what the user has set; servers may not know the others."""
    names = {"max_new_tokens": "max_tokens"}
    fields = {names.get(name, name): getattr(settings.params, name) for name in sorted(settings.chosen)}
    schema = fields.pop("json_schema", None)
    if schema is not None:
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": json.loads(schema)},
        }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
