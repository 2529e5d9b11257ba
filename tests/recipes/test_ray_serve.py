"""A replica of the Ray Serve recipe serves the whole API; Ray itself is a stand-in that keeps what it is given."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
from starlette.testclient import TestClient

FILE = Path(__file__).parents[2] / "recipes" / "ray_serve" / "replicas.py"


class Deployed:
    """What serve.deployment makes of a class."""

    def __init__(self, made):
        self.made = made

    def options(self, **options):
        self.asked = options
        return self

    def bind(self, *arguments):
        return self.made, arguments, self.asked


@pytest.fixture
def replicas(monkeypatch):
    serve = types.SimpleNamespace(
        Application=object, ingress=lambda: lambda made: made, deployment=lambda **options: Deployed
    )
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(serve=serve))
    spec = importlib.util.spec_from_file_location("replicas", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_replica_answers_and_says_when_its_engine_has_stopped(replicas):
    made, arguments, asked = replicas.app({"least": "2", "most": "3", "name": "mine"})
    assert (asked["autoscaling_config"]["min_replicas"], asked["autoscaling_config"]["max_replicas"]) == (2, 3)
    replica = made(*arguments)
    client = TestClient(replica.__serve_build_asgi_app__())
    body = {"model": "mine", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == ", there was a"
    replica.check_health()
    replica.engine.close()
    with pytest.raises(RuntimeError, match="does not run"):
        replica.check_health()
