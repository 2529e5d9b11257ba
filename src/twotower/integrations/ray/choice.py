"""Which replica gets a request: the one that has the prompt's beginning in its cache, unless it has too much to do.

Every key orders the replicas in its own way (rendezvous hashing, Thaler and Ravishankar 1998), and the first of them
that has room gets the request, where room is a bounded share of all requests (consistent hashing with bounded loads,
Mirrokni, Thorup and Zadimoghaddam 2018). Keys whose first replica ends spread over the others, and no other key moves.
"""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from pydantic_core import from_json

# The header by which Ray Serve, too, knows a session.
SESSION_HEADER = "x-session-id"
# Characters of a prompt, or token ids, by which it is known: the first pages of the cache.
_BEGINNING = 512
# How much more than its share of all requests a replica takes for the sake of its cache.
_BOUND = 1.25


class Member(NamedTuple):
    """A replica that answers at `url` and takes at most `room` requests, running and waiting."""

    name: str
    url: str
    room: int


class Fleet:
    """The replicas that answer, each with the number of requests that it has from here."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._running: Counter[str] = Counter()
        self._last_use: Counter[str] = Counter()
        self._uses = itertools.count(1)

    @property
    def members(self) -> list[Member]:
        """The replicas, by name."""
        return [self._members[name] for name in sorted(self._members)]

    @property
    def num_running(self) -> int:
        """The requests that all replicas have."""
        return self._running.total()

    def running(self, member: Member) -> int:
        """The requests that a replica has."""
        return self._running[member.name]

    def update(self, members: list[Member]) -> None:
        """Takes these replicas in the place of those known until now, whose requests go on."""
        self._members = {member.name: member for member in members}

    def lose(self, member: Member) -> None:
        """Forgets a replica that doesn't answer, until an update has it again."""
        self._members.pop(member.name, None)

    def order(self, key: bytes | None) -> list[Member]:
        """The replicas that have room, in the order in which a request with that key should try them.

        Without a key it is the one with the fewest requests first, and of several the one that waited longest.
        """
        free = [member for member in self._members.values() if self.running(member) < member.room]
        free.sort(key=lambda member: (self.running(member), self._last_use[member.name]))
        if key is None or not free:
            return free
        # with the request that is to come
        total = sum(self.running(member) for member in self._members.values()) + 1
        bound = math.ceil(_BOUND * total / len(self._members))
        ranked = sorted(free, key=lambda member: _rank(key, member))
        near = [member for member in ranked if self.running(member) < bound]
        return near + [member for member in free if member not in near]

    @contextmanager
    def carry(self, member: Member) -> Iterator[None]:
        """Counts a request as the replica's until the context ends."""
        self._running[member.name] += 1
        self._last_use[member.name] = next(self._uses)
        try:
            yield
        finally:
            self._running[member.name] -= 1
            if not self._running[member.name] and member.name not in self._members:
                del self._running[member.name], self._last_use[member.name]


def _rank(key: bytes, member: Member) -> bytes:
    return hashlib.blake2b(member.name.encode(), key=key, digest_size=8).digest()


def affinity(headers: Mapping[str, str], body: bytes) -> bytes | None:
    """What requests have in common that one replica should answer, None if a request can be anyone's.

    It is the session that the header `X-Session-Id` names, or the body's `prompt_cache_key`, or the prompt's beginning:
    of a chat everything up to its first message of a user, which all its turns begin with, and of another prompt its
    first 512 characters or token ids.
    """
    session = headers.get(SESSION_HEADER)
    if session:
        return _digest(["session", session])
    try:
        sent = from_json(body)
    except ValueError:
        return None
    if not isinstance(sent, dict):
        return None
    if isinstance(sent.get("prompt_cache_key"), str):
        return _digest(["key", sent["prompt_cache_key"]])
    beginning = _of_chat(sent) or _of_prompt(sent.get("prompt"))
    return None if beginning is None else _digest(["prompt", beginning])


def _of_chat(sent: dict[str, Any]) -> list[Any] | None:
    turns = sent.get("messages", sent.get("input"))
    if not turns:
        return None
    if isinstance(turns, list):
        users = (i for i, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user")
        turns = turns[: next(users, len(turns) - 1) + 1]
    return [sent.get("system") or sent.get("instructions"), turns]


def _of_prompt(prompt: Any) -> Any:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    return prompt[:_BEGINNING] if isinstance(prompt, str | list) and prompt else None


def _digest(parts: list[Any]) -> bytes:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).digest()
