r"""Schemathesis against the server's own OpenAPI schema: no 5xx for anything, and alive after.

Some cases run here. For 10,000 against a running server:

    twotower serve & schemathesis run http://127.0.0.1:8000/openapi.json \
        --checks not_a_server_error --phases coverage,fuzzing -n 2500
"""

import hypothesis
import pytest

from twotower.server.app import make_app
from twotower.server.chat_template import ChatTemplate
from twotower.server.config import ServerConfig

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis makes the cases; pip install 'twotower[dev]'")

SETTINGS = hypothesis.settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def test_nothing_is_a_5xx(engine):
    # short: a chat without a limit goes on to the end of the context
    app = make_app(engine, ServerConfig(model_name="tiny", max_context=40), ChatTemplate("{{ messages }}", {}))
    operations = [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    assert {"/v1/completions", "/v1/chat/completions", "/twotower/watch"} <= {o.path for o in operations}
    statuses = set()
    for operation in operations:
        # without a body nothing can be wrong with it
        for mode in schemathesis.GenerationMode if operation.body else [schemathesis.GenerationMode.POSITIVE]:

            @SETTINGS
            @hypothesis.given(operation.as_strategy(generation_mode=mode))
            def check(case):
                response = case.call()
                assert response.status_code < 500, response.text
                statuses.add(response.status_code)

            check()
    assert engine.is_running
    assert {200, 400, 404} <= statuses
