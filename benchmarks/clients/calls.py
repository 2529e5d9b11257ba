"""What the scripts of this folder share: where the server is, what they ask for, and how they report.

A script runs in its client's own environment as `python -P use_NAME.py URL MODEL`, and prints one line of JSON for each
call: its name, and what came back or the first line of the error.
"""

import json
import sys
from collections.abc import Callable, Mapping

QUESTION = "Tell me a story about a dog."
# What the model can't leave open-ended, since a small one would write until its context is full.
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"type": "string", "enum": ["cat", "dog", "bird"]}, "brave": {"type": "boolean"}},
    "required": ["kind", "brave"],
    "additionalProperties": False,
}


def given() -> tuple[str, str]:
    """The server's address without /v1, and the model's name, as the command line has them."""
    url, model = sys.argv[1:3]
    return url, model


class NoText(Exception):
    """An answer is empty, which a small model's may be by chance."""


def shown(text: str) -> str:
    """A text of a model, cut and on one line. Raises NoText for none."""
    if not text.strip():
        raise NoText("the answer has no text")
    line = " ".join(text.split())
    return f"“{line[:32]}…”" if len(line) > 32 else f"“{line}”"


def named(*calls: Callable[[], str]) -> dict[str, Callable[[], str]]:
    """The calls under their functions' names, in words."""
    return {call.__name__.replace("_", " ").strip(): call for call in calls}


def report(calls: Mapping[str, Callable[[], str]]) -> None:
    """Runs each call, up to three times until there is a text, and prints its result."""
    for name, call in calls.items():
        for _ in range(3):
            line = {"call": name}
            try:
                line["result"] = call()
            except Exception as error:  # whatever a client raises is the result of its call
                line["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                if isinstance(error, NoText):
                    continue
            break
        print(json.dumps(line), flush=True)
