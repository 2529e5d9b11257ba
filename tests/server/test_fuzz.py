"""Schemathesis against the server's own OpenAPI schema: no 5xx for anything, and alive after.

Some cases run here. `python tests/server/test_fuzz.py 10000` runs so many on the shipped checkpoint, and prints how
many of each answer came.
"""

import collections
import json
import sys

import hypothesis
import pytest
from fastapi import FastAPI
from hypothesis import strategies as st

import twotower
from twotower.checkpoints.chat_template import ChatTemplate
from twotower.engine.aio import AsyncEngine
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis makes the cases; pip install 'twotower[dev]'")

GRAMMARS = ['start: "a" | "bc"', "start: /[a-c]{1,4}/", 'start: word " " word\nword: /[a-z]+/', "start: start"]
WRITING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/twotower/watch")
# Short: a chat without a limit goes on to the end of the context. Few: each of n texts takes its time.
LIMITS = {"max_context": 40, "max_choices": 4}
SETTINGS = hypothesis.settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def fuzz(app: FastAPI, num_cases: int) -> "collections.Counter[tuple[str, int]]":
    """Sends so many requests to the endpoints that write, and some to the others; counts answers by path and status.

    Half of them are what the schema allows. Most of those have few fields at a time, for many exclude each other.
    """
    schemathesis.openapi.format("lark", st.sampled_from(GRAMMARS))
    operations = [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    writing = [operation for operation in operations if operation.body]
    assert {*WRITING, "/v1/messages/count_tokens", "/tokenize", "/detokenize"} == {o.path for o in writing}
    reading = [operation for operation in operations if not operation.body]
    valid, wrong = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    plan = [(operation, mode, -(-num_cases // 6)) for operation in writing for mode in (valid, wrong)]
    plan += [(operation, valid, num_cases // 60) for operation in reading]
    for operation, mode, share in plan:
        send(operation.as_strategy(generation_mode=mode), mode is valid, share, counts)
    return counts


def send(cases: st.SearchStrategy, valid: bool, count: int, counts: "collections.Counter[tuple[str, int]]") -> None:
    @hypothesis.settings(SETTINGS, max_examples=count)
    @hypothesis.given(cases, st.data())
    def check(case, data):
        if valid and isinstance(case.body, dict):
            case.body = thinned(case.body, data)
        response = case.call()
        assert response.status_code < 500, response.text
        counts[case.operation.path, response.status_code] += 1

    check()


def thinned(body: dict, data: st.DataObject) -> dict:
    """What the request needs, and at most three of its other fields; or all of it."""
    optional = sorted(body.keys() - {"model", "prompt", "messages", "input", "tokens"})
    kept = data.draw(st.none() | st.sets(st.sampled_from(optional), max_size=3) if optional else st.none())
    return {k: v for k, v in body.items() if kept is None or k not in optional or k in kept}


@pytest.mark.slow
def test_nothing_is_a_5xx(tiny, byte_tokenizer):
    model = tiny("M*-E", vocab_size=260, eos_token_id=2, block_size=8)  # its texts can end where a grammar wants it
    model.tokenizer = byte_tokenizer
    engine = AsyncEngine(model).start()
    template = ChatTemplate("{{ messages[0].content }}", {})
    counts = fuzz(make_app(engine, ServerConfig(model_names=("tiny",), **LIMITS), template), 240)
    assert engine.is_running
    engine.close()
    for path in WRITING:
        assert counts[path, 200] >= 5  # of 40 that the schema allows; many settings exclude each other
        assert counts[path, 400] > 0
    assert counts["/v1/models/{name}", 404] > 0


if __name__ == "__main__":
    engine = AsyncEngine(twotower.load()).start()
    found = fuzz(
        make_app(
            engine, ServerConfig(model_names=("stories",), **LIMITS), ChatTemplate("{{ messages[0].content }}", {})
        ),
        int(sys.argv[1]),
    )
    by_path: dict[str, dict[int, int]] = {}
    for (path, status), count in sorted(found.items()):
        by_path.setdefault(path, {})[status] = count
    assert engine.is_running
    engine.close()
    json.dump({"cases": found.total(), **by_path}, sys.stdout, indent=1)
