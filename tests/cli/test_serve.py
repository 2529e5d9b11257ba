"""`twotower serve` as a process: it answers, it is killed under load and comes back, and it stops cleanly."""

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import threading
import time

import httpx
import openai
import pytest


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.mark.slow
def test_killed_under_load_clients_see_clean_errors_and_it_comes_back(checkpoint, tmp_path, process):
    outcomes = []
    settings = {"model": "tiny", "prompt": "a", "max_tokens": 3000, "extra_body": {"mode": "ar", "ignore_eos": True}}

    def ask(url, stream):
        try:
            answer = client(url).completions.create(**settings, stream=stream)
            if stream:
                for _ in answer:
                    begun.release()
            outcomes.append("finished")
        except (openai.APIConnectionError, httpx.RemoteProtocolError, httpx.ReadError) as error:
            outcomes.append(type(error).__name__)

    begun = threading.Semaphore(0)
    with process("--port", "0") as (running, url, _):
        # half of them run, the others wait; some stream and some do not
        clients = [threading.Thread(target=ask, args=(url, i % 2 == 0)) for i in range(8)]
        clients[0].start()
        assert begun.acquire(timeout=30)  # it has a slot and its text comes
        for one in clients[1:]:
            one.start()
        time.sleep(0.3)
        os.kill(running.pid, signal.SIGKILL)
        began = time.monotonic()
        for one in clients:
            one.join(20)
        assert time.monotonic() - began < 15
    assert len(outcomes) == 8
    assert "finished" not in outcomes
    port = url.rsplit(":", 1)[1]
    with process("--port", port) as (running, again, log):
        assert again == url
        assert httpx.get(f"{url}/health").json() == {"status": "ready"}
        done = client(url).completions.create(model="tiny", prompt="a", max_tokens=4)
        assert done.usage.completion_tokens == 4
        # SIGTERM lets what runs finish
        stream = client(url).completions.create(**settings | {"max_tokens": 200}, stream=True)
        first = next(stream)
        running.terminate()
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert first.id == rest[-1].id
        running.wait(20)
        assert '"status": 200' in log.read_text()


@pytest.mark.slow
def test_options_reach_the_server(checkpoint, tmp_path, process):
    options = ("--mode", "ar", "--max-context", "50", "--api-key", "k", "--max-waiting", "0")
    with process("--port", "0", *options) as (_, url, log):
        headers = {"Authorization": "Bearer k"}
        about = httpx.get(f"{url}/twotower/about", headers=headers).json()
        assert (about["default_mode"], about["max_context"], about["model"]) == ("ar", 50, "tiny")
        assert httpx.get(f"{url}/twotower/about").status_code == 401
        lines = list(map(json.loads, log.read_text().splitlines()))
        [memory] = [line for line in lines if line["message"] == "memory"]
        assert (memory["max_context"], memory["tokens_of_each"], memory["device"]) == (50, 50, "cpu")
        [line] = [line for line in lines if line["message"] == "serving"]
        assert (line["url"], line["mode"]) == (url, "ar")
        for tower in ("context_tower", "denoiser_tower"):
            assert re.fullmatch(r"(native|reference) \(.+\)", line[tower])
        ask = {"model": "tiny", "prompt": "a", "n": 3}
        assert httpx.post(f"{url}/v1/completions", json=ask, headers=headers).status_code == 400
        assert httpx.post(f"{url}/v1/completions", json=ask | {"n": 2}, headers=headers).status_code == 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate; install it")
    folder = tmp_path_factory.mktemp("tls")
    files = [folder / "cert.pem", folder / "key.pem"]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True)
    return files


@pytest.mark.slow
def test_a_file_has_the_options_under_other_servers_names(checkpoint, tmp_path, certificate, process):
    (tmp_path / "keys").write_text("one\n\n  two\n")
    (tmp_path / "chat.jinja").write_text("{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}")
    (tmp_path / "serve.yaml").write_text(
        "served-model-name: [large, small]\n"
        "max-model-len: 60\n"
        "allowed-origins: ['https://a.example']\n"
        "root_path: /llm\n"
        f"api-key-file: {tmp_path / 'keys'}\n"
        f"chat_template: {tmp_path / 'chat.jinja'}\n"
        f"ssl-certfile: {certificate[0]}\n"
        f"ssl_keyfile: {certificate[1]}\n"
    )
    with process("--port", "0", "--config", str(tmp_path / "serve.yaml"), named=False) as (_, url, log):
        assert url.startswith("https://")
        trust = ssl.create_default_context(cafile=certificate[0])
        with httpx.Client(base_url=url, verify=trust, headers={"Authorization": "Bearer two"}) as http:
            cards = http.get("/v1/models").json()["data"]
            assert [(card["id"], card["root"], card["max_model_len"]) for card in cards] == [
                ("large", "large", 60),
                ("small", "large", 60),
            ]
            messages = [{"role": "user", "content": "a"}]
            ids = http.post("/llm/tokenize", json={"model": "small", "messages": messages}).json()["tokens"]
            assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith("<a>")
            assert http.get("/llm/page/chat.js").status_code == 200
            assert http.get("/health", headers={"Origin": "https://a.example"}).headers["access-control-allow-origin"]
            assert http.get("/v1/models", headers={"Authorization": "Bearer three"}).status_code == 401
        [line] = [line for line in map(json.loads, log.read_text().splitlines()) if line["message"] == "serving"]
        assert line["url"] == url


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"--api-key-file": "one\nwört"}, "line 2 of"),
        ({"--api-key-file": "\n\n"}, "has no API key"),
        ({"--chat-template": "{% for"}, "chat-template can't be used: the chat template is broken"),
        ({"--ssl-certfile": "nothing"}, "ssl-certfile can't be used"),
        ({"--ssl-keyfile": "nothing"}, "give --ssl-certfile too"),
        ({"--config": "max-model-len: 9\nmax_context: 8"}, "says max_context twice"),
        ({"--config": "api-key: [one, [two]]"}, "must be one value, or a list of them"),
        ({"--config": "port: [1, 2]"}, "must be one value;"),
    ],
)
def test_what_a_file_lacks_is_said(run, checkpoint, tmp_path, files, message):
    options = []
    for option, text in files.items():
        file = tmp_path / option.removeprefix("--")
        file.write_text(text)
        options += [option, file]
    result = run("serve", "--model", checkpoint, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-context", "1"], "max-context"),
        (["stories"], "--model is "),
        (["--api-key", ""], "printable ASCII"),
        (["--mode", "fast"], "fast"),
        (["--cors-origin", "https://a.example/"], "--cors-origin is"),
        (["--root-path", "llm/"], "--root-path is 'llm/', must be a path such as /llm"),
        (["--context-device", "cuda:97"], "cuda:97"),
        (["--denoiser-device", "cuda:98"], "cuda:98"),
        (["--state-mib", "1", "--memory-fraction", "0.5"], "--memory-fraction is 0.5, must be left out"),
        (["--memory-fraction", "1e-9"], "raise memory_fraction"),
    ],
)
def test_a_bad_option_is_named(run, checkpoint, options, message):
    result = run("serve", "--model", checkpoint, *options)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("spelling", [[], ["--model"]])
def test_the_model_of_a_file_gives_way_to_the_one_of_the_command_line(run, checkpoint, tmp_path, spelling):
    (tmp_path / "serve.yaml").write_text("model: nowhere")
    refused = ["--memory-fraction", "1e-9"]  # by the engine, when the model is open
    result = run("serve", *spelling, checkpoint, "--config", tmp_path / "serve.yaml", *refused)
    assert result.exit_code == 2
    assert "raise memory_fraction" in result.stderr


def test_a_model_without_tokenizer_cannot_be_served(run, model, tmp_path):
    from twotower.checkpoints import save

    save(model, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    result = run("serve", tmp_path)
    assert result.exit_code == 2
    assert "no tokenizer.json" in result.stderr
