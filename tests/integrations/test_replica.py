"""A replica without Ray: a whole server that answers its router alone."""

import httpx
import pytest

from twotower.engine.config import EngineConfig
from twotower.integrations.ray.config import Launch
from twotower.integrations.ray.replica import ReplicaServer
from twotower.server.config import ServerConfig

BODY = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def launch():
    limits = EngineConfig(max_num_requests=3, max_num_waiting=2)
    return Launch(server=ServerConfig(model_names=("mine",), shutdown_seconds=2), limits=limits)


@pytest.fixture(scope="module")
def replica(launch):
    made = ReplicaServer(launch, "127.0.0.1")
    yield made
    made.close()


def test_it_answers_who_knows_the_secret_under_the_id_that_it_is_given(launch, replica):
    member = replica.member("r")
    assert (member.name, member.room, replica.is_running) == ("r", 5, True)
    headers = {"X-Twotower-Secret": launch.secret, "X-Request-Id": "given"}
    answer = httpx.post(f"{member.url}/v1/completions", json=BODY, headers=headers, timeout=60)
    assert answer.json()["choices"][0]["text"] == ", there was a"
    # the router tells the client
    assert "x-request-id" not in answer.headers
    for wrong in ({}, {"X-Twotower-Secret": "guessed"}, {"X-Twotower-Secret": "ü".encode("latin-1")}):
        refused = httpx.get(f"{member.url}/health", headers=wrong)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_the_router")


def test_closed_it_takes_no_more_requests(launch):
    replica = ReplicaServer(launch, "127.0.0.1")
    url = replica.member("r").url
    replica.close()
    assert not replica.is_running
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
