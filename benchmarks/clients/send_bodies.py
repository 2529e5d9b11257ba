"""Bodies as programs send them that can't be installed or run here: chat pages, editors, benchmarks.

bodies.json has what each program puts together with its defaults, as its source code and its users' reports show it,
for a short text and without `model`.
"""

import functools
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from calls import given, report, shown

url, model = given()


def post(path: str, body: dict[str, Any]) -> str:
    """What is answered. Raises RuntimeError with the message of an error."""
    data = json.dumps({"model": model, **body}).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=300) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error.code} {json.loads(error.read())['error']['message']}") from error


def send(path: str, body: dict[str, Any]) -> str:
    """The answer's text, cut."""
    received = post(path, body)
    if not body.get("stream"):
        return shown(_text(json.loads(received)["choices"][0]))
    *events, end = [line.removeprefix("data: ") for line in received.splitlines() if line.startswith("data: ")]
    assert end == "[DONE]", end
    chunks = [json.loads(event) for event in events]
    if "stream_options" in body:
        assert chunks[-1]["usage"]["completion_tokens"] > 0
    return shown("".join(_text(choice) for chunk in chunks for choice in chunk["choices"]))


def loglikelihood() -> str:
    """Reads the answer as lm-eval's local-completions does."""
    tokens = json.loads(post("/tokenize", {"prompt": "Once upon a time"}))["tokens"]
    body = {"prompt": [tokens], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    [choice] = json.loads(post("/v1/completions", body))["choices"]
    logprobs = choice["logprobs"]["token_logprobs"][1:-1]
    best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:-1]]
    assert len(logprobs) == len(tokens) - 1
    assert all(one <= most for one, most in zip(logprobs, best, strict=True))
    return f"{sum(logprobs):.3f} for {len(logprobs)} tokens"


def _text(choice: dict[str, Any]) -> str:
    return choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""


def _calls() -> dict[str, functools.partial[str]]:
    bodies = json.loads(Path(__file__).with_name("bodies.json").read_text())
    calls = {name: functools.partial(send, asked["path"], asked["body"]) for name, asked in bodies.items()}
    return calls | {"lm-eval, loglikelihood": functools.partial(loglikelihood)}


report(_calls())
