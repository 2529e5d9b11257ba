"""`twotower serve` before it serves: the port that it takes first, and what it answers while the model loads."""

import contextlib
import errno
import os
import signal
import socket

import httpx
import pytest

from twotower.errors import SettingError
from twotower.server import startup
from twotower.server.config import ServerConfig

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
ASK = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}


@contextlib.contextmanager
def loading(process, folder, *options):
    """A server that loads until the function is called that is given with it: its template is a pipe."""
    pipe = folder / "chat.jinja"
    os.mkfifo(pipe)
    with process("--port", "0", "--chat-template", pipe, *options, until="loading") as started:
        yield started, lambda: pipe.write_text(TEMPLATE)


@pytest.mark.slow
def test_clients_are_told_to_come_again_and_are_served_on_the_same_connection(process, tmp_path):
    with loading(process, tmp_path) as (started, finish), httpx.Client(base_url=started.url, timeout=30) as http:
        for path in ("/health", "/ping", "/llm/health"):
            answer = http.get(path)
            assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
            assert int(answer.headers["retry-after"]) > 0
        assert http.head("/health").status_code == 503
        for path in ("/v1/chat/completions", "/v1/messages", "/nowhere"):
            answer = http.post(path, json=ASK | {"user": "u" * 1_000_000})
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            error = answer.json()["error"]
            assert "loading" in error["message"]
            assert ("code" in error) == (path != "/v1/messages")
            assert answer.json().get("type") == ("error" if path == "/v1/messages" else None)
        used = answer.extensions["network_stream"].get_extra_info("client_addr")
        finish()
        started.wait_for("serving")
        answer = http.get("/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
        assert answer.extensions["network_stream"].get_extra_info("client_addr") == used
        assert http.post("/v1/chat/completions", json=ASK).status_code == 200
        assert http.post("/v1/messages", json=ASK).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_model_loads_ends_at_once_without_a_traceback(process, tmp_path, number):
    with loading(process, tmp_path) as (started, _):
        started.running.send_signal(number)
        assert started.running.wait(3) == -number
        assert "Traceback" not in started.log.read_text()


def test_what_stops_the_loading_ends_the_process_with_its_error(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = run("serve", tmp_path, "--port", "0")
    assert result.exit_code == 2
    assert str(tmp_path) in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "/nowhere/at/all", "--port", port)
    assert result.exit_code == 2
    told = f"--port is {port}, must be a free port of 127.0.0.1; another program listens there: stop it, or choose"
    assert told in " ".join(result.stderr.split())


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid", "2001:db8::1", "ä..b"])
def test_a_host_that_is_not_this_machine_is_told_before_anything_is_loaded(run, host):
    result = run("serve", "/nowhere/at/all", "--host", host, "--port", "0")
    assert result.exit_code == 2
    told = " ".join(result.stderr.split())
    assert f"--host is '{host}', must be a" in told
    assert "address of this machine; 127.0.0.1 is for this machine alone" in told


def test_a_port_that_is_not_allowed_is_told(monkeypatch):
    def forbidden(one, address):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(startup, "_bind", forbidden)
    with pytest.raises(SettingError, match="port is 443, must be a port on which this user may listen; those below"):
        startup.listen(ServerConfig(port=443))


def test_two_servers_that_start_at_once_do_not_take_one_port():
    [first] = startup.listen(ServerConfig(port=0))
    with first, pytest.raises(SettingError, match="another program listens there"):
        startup.listen(ServerConfig(port=first.getsockname()[1]))


def test_all_addresses_of_a_name_have_the_same_port():
    listening = startup.listen(ServerConfig(host="localhost", port=0))
    assert len({one.getsockname()[1] for one in listening}) == 1
    for one in listening:
        with socket.create_connection(one.getsockname()[:2], 5):
            pass
        one.close()
