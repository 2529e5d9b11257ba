"""`twotower chat --url` with a small server that speaks OpenAI's API, and its misfortunes."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

WORDS = ["Hel", "lo", " wörld"]


class FakeApi(BaseHTTPRequestHandler):
    """Answers with WORDS as `misfortune` of its server lets it."""

    def do_GET(self):
        listed = {"/v1/models": {"data": [{"id": "fake"}]}}.get(self.path)
        self.reply(404 if listed is None else 200, listed or {"error": {"message": "not here"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        misfortune = self.server.misfortune
        if isinstance(misfortune, tuple):
            self.reply(*misfortune)
        elif misfortune == "no template" and "chat" in self.path:
            self.reply(400, {"error": {"message": "it has no chat template", "code": "no_chat_template"}})
        else:
            self.stream("chat" in self.path, misfortune)

    def stream(self, is_chat, misfortune):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in WORDS:
            self.event({"choices": [{"delta": {"content": word}} if is_chat else {"text": word}]})
            if misfortune == "breaks":
                return
            if misfortune == "fails":
                self.event({"error": {"message": "the engine failed"}})
                return
        self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.event({"choices": [], "usage": {"completion_tokens": 3, "total_tokens": 9}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value):
        self.wfile.write(b": a comment\n\ndata: " + json.dumps(value).encode() + b"\n\n")

    def reply(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def api():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeApi)
    server.misfortune, server.asked = None, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def chat(run, api):
    def call(lines, *options):
        result = run("chat", "--url", api.url, *options, input="\n".join(lines) + "\n")
        assert result.exit_code == 0, result.output
        return result

    return call


def test_answers_stream_and_only_chosen_settings_are_sent(chat, api):
    result = chat(["a", "/set temperature 0.5", "b"], "--max-new-tokens", 7, "--api-key", "k")
    assert result.stdout == "Hello wörld\nHello wörld\n"
    assert "fake at http://127.0.0.1" in result.stderr
    assert "3 tokens" in result.stderr
    assert "9 tokens of context" in result.stderr
    (path, first, key), (_, second, _) = api.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    said = [{"role": "user", "content": "a"}]
    sent = {"model": "fake", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 7}
    assert first == {**sent, "messages": said}
    said += [{"role": "assistant", "content": "Hello wörld"}, {"role": "user", "content": "b"}]
    assert second == {**sent, "messages": said, "temperature": 0.5}


def test_a_model_by_name_needs_no_list(run, api):
    assert run("chat", "other", "--url", f"{api.url}/v1/", input="a\n").stdout == "Hello wörld\n"
    assert api.asked[0][1]["model"] == "other"


def test_a_server_without_a_template_gets_the_plain_form(chat, api):
    api.misfortune = "no template"
    result = chat(["a", "b"])
    assert result.stdout == "Hello wörld\nHello wörld\n"
    assert result.stderr.count("no chat template") == 1
    path, body, _ = api.asked[-1]
    assert path == "/v1/completions"
    assert body["prompt"] == "User: a\n\nAssistant: Hello wörld\n\nUser: b\n\nAssistant:"
    assert body["stop"] == ["\nUser:"]


@pytest.mark.parametrize(
    ("misfortune", "message"), [("breaks", "the connection broke"), ("fails", "the engine failed")]
)
def test_an_answer_that_breaks_off_is_kept_and_can_be_retried(chat, api, misfortune, message):
    api.misfortune = misfortune
    result = chat(["a", "/retry"])
    assert result.stdout == "Hel\nHel\n"
    assert result.stderr.count(message) == 2
    assert "what came of the answer is kept" in result.stderr
    assert api.asked[0][1] == api.asked[1][1]


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, {"message": "wrong key", "code": "invalid_api_key"}, "wrong key; --api-key gives one"),
        (429, {"message": "the server is full"}, "the server is full"),
        (400, {"message": "too long", "code": "context_length_exceeded"}, "/clear begins anew"),
        (500, "an error that is a text", "an error that is a text"),
        (502, None, "answers 502 Bad Gateway"),
    ],
)
def test_a_refusal_is_told_and_the_chat_goes_on(chat, api, status, error, message):
    api.misfortune = (status, {"error": error})
    result = chat(["a", "b", "/retry"])
    assert result.stderr.count(message) == 3
    assert [body["messages"] for _, body, _ in api.asked[1:]] == [[{"role": "user", "content": "b"}]] * 2


@pytest.mark.parametrize(
    ("url", "message"),
    [("http://127.0.0.1:9", "can't be reached"), ("ftp://a", "must be an address"), ("nonsense", "must be an address")],
)
def test_a_server_that_is_not_there_is_one_line(run, url, message):
    result = run("chat", "--url", url, input="a\n")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
