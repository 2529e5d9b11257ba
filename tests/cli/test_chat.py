"""`twotower chat` with a model in this process: messages, commands, files, and a terminal."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest

import twotower
from twotower.cli.conversation.answering import Said, plain_form
from twotower.cli.conversation.assigning import with_setting
from twotower.cli.conversation.history import Conversation
from twotower.decoding.params import SamplingParams
from twotower.errors import SettingError

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
LENGTH = 12


@pytest.fixture(scope="module")
def chatty(checkpoint, tmp_path_factory):
    """The tiny checkpoint with a chat template."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("chatty") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def written(checkpoint):
    """written(prompt, **settings) is what the library writes after a prompt."""
    model = twotower.load(checkpoint)

    def write(prompt, **settings):
        params = SamplingParams(max_new_tokens=LENGTH, **settings)
        return twotower.generate(model, [prompt], params)[0].text

    return write


@pytest.fixture
def chat(run, chatty):
    """chat(lines, *options) is the result of a chat in which these lines come from stdin."""

    def call(lines, *options, model=chatty):
        result = run("chat", model, "--max-new-tokens", LENGTH, *options, input="\n".join(lines) + "\n")
        assert result.exit_code == 0, result.output
        return result

    return call


def test_every_turn_gets_all_that_was_said(chat, written):
    first = written("<system>be<user>ab<assistant>")
    second = written(f"<system>be<user>ab<assistant>{first}<user>cd<assistant>")
    assert chat(["ab", "cd"], "--system", "be").stdout == f"{first}\n{second}\n"


@pytest.mark.parametrize("mode", ["ar", "verified", "diffusion"])
def test_a_mode_is_chosen_between_answers(chat, written, mode):
    result = chat([f"/mode {mode}", "ab"])
    assert result.stdout == written("<user>ab<assistant>", mode=mode) + "\n"
    assert f"{mode}: " in result.stderr
    assert "tokens/s" in result.stderr


def test_auto_is_a_mode_as_well(chat, written):
    assert chat(["/mode auto", "ab"]).stdout == written("<user>ab<assistant>", mode="ar") + "\n"


def test_without_a_template_the_plain_form_is_used_and_said_once(chat, checkpoint, written):
    result = chat(["ab", "cd"], model=checkpoint)
    first = written(plain_form([Said("user", "ab")]), stop=("\nUser:",))
    assert result.stdout.startswith(first + "\n")
    assert result.stderr.count("no chat template") == 1


def test_lines_with_a_backslash_or_in_quotes_are_one_message(chat, written):
    whole = written("<user>ab\ncd<assistant>")
    assert chat(["ab\\", "cd"]).stdout == whole + "\n"
    assert chat(['"""ab', 'cd"""']).stdout == whole + "\n"
    assert chat(['"""', "ab", "cd", '"""']).stdout == whole + "\n"
    assert chat([" /ab"]).stdout == written("<user>/ab<assistant>") + "\n"


def test_retry_writes_the_answer_anew_and_undo_takes_back_both(chat, written):
    first = written("<user>ab<assistant>")
    other = written("<user>ab<assistant>", mode="ar")
    assert chat(["ab", "/mode ar", "/retry"]).stdout == f"{first}\n{other}\n"
    assert chat(["ab", "/undo", "ab"]).stdout == f"{first}\n{first}\n"
    assert "no message to answer" in chat(["/retry"]).stderr
    assert "nothing to take back" in chat(["/undo"]).stderr
    assert chat(["ab", "/clear", "ab"]).stdout == f"{first}\n{first}\n"


def test_the_system_prompt_can_change(chat, written):
    changed = written("<system>be<user>ab<assistant>")
    plain = written("<user>ab<assistant>")
    assert chat(["/system be", "ab", "/clear", "/system off", "ab"]).stdout == f"{changed}\n{plain}\n"


def test_a_saved_conversation_goes_on_where_it_was(chat, written, tmp_path):
    file = tmp_path / "chat.json"
    first = written("<system>be<user>ab<assistant>")
    chat(["ab", f"/save {file}"], "--system", "be")
    assert [m["role"] for m in json.loads(file.read_text())["messages"]] == ["system", "user", "assistant"]
    expected = written(f"<system>be<user>ab<assistant>{first}<user>cd<assistant>") + "\n"
    assert chat([f"/load {file}", "cd"]).stdout == expected
    assert chat(["cd"], "--load", file).stdout == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"a": 1}', "no list of messages"),
        ('[{"role": "user"}]', "message 1 without a role and a text"),
        ('[{"role": "assistant", "content": "a"}]', "message 1 by 'assistant'"),
        ('[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]', "message 2 by 'user'"),
        ('{"conversations": []}', "holds 0 conversations"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused_and_the_chat_goes_on(chat, tmp_path, written, content, message):
    file = tmp_path / "chat.json"
    file.write_text(content)
    result = chat([f"/load {file}", "ab"])
    assert message in result.stderr
    assert str(file) in result.stderr
    assert result.stdout == written("<user>ab<assistant>") + "\n"


def test_what_the_page_exports_can_be_loaded(tmp_path):
    file = tmp_path / "chat.json"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "stats": {}}]
    file.write_text(json.dumps({"conversations": [{"title": "a", "system": "", "messages": messages}]}))
    assert Conversation.load(file).turns == [Said("user", "a"), Said("assistant", "b")]


def test_wrong_commands_are_explained_and_the_chat_goes_on(chat, written, tmp_path):
    lines = ["/nonsense", "/set top_k 0", "/set top_p x", "/set foo 1", "/mode fast", "/save", f"/load {tmp_path}/no"]
    result = chat([*lines, "ab"])
    for part in (
        "no command /nonsense",
        "top_k is 0, must be an integer of at least 1",
        "top_p is 'x', must be a number",
        "no setting 'foo'",
        "mode is 'fast', must be one of ar",
        "name of a file is missing",
        "No such file",
    ):
        assert part in result.stderr
    assert result.stdout == written("<user>ab<assistant>") + "\n"


def test_help_and_set_tell_all_there_is(chat):
    told = chat(["/help", "/set", "/set confidence_threshold"]).stderr
    for field in dataclasses.fields(SamplingParams):
        assert f"{field.name} = " in told
    assert "confidence_threshold = 0.8\n  A token whose probability" in told
    for name in ("/mode", "/set", "/system", "/retry", "/undo", "/clear", "/save", "/load", "/help", "/exit"):
        assert f"\n{name} " in told


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("mode", "ar", "ar"),
        ("max_new_tokens", "7", 7),
        ("temperature", "0.5", 0.5),
        ("ignore_eos", "on", True),
        ("stop_token_ids", "5,17", (5, 17)),
        ("allowed_token_ids", "5", (5,)),
        ("bad_words", "no", ("no",)),
        ("logit_bias", "5=2.5", ((5, 2.5),)),
        ("stop", "the end", ("the end",)),
        ("stop", '["a\\n", "b"]', ("a\n", "b")),
        ("stop", '"\\n\\n"', ("\n\n",)),
    ],
)
def test_settings_are_read_from_text_and_set_back(name, text, value):
    changed = with_setting(SamplingParams(), name, text)
    assert getattr(changed, name) == value
    assert with_setting(changed, name, "default") == SamplingParams()


@pytest.mark.parametrize(
    ("name", "text"), [("ignore_eos", "2"), ("stop", "[1"), ("stop", "[1]"), ("seed", "1.5"), ("stop_token_ids", "a")]
)
def test_a_text_that_is_no_value_is_refused(name, text):
    with pytest.raises(SettingError, match=name):
        with_setting(SamplingParams(), name, text)


def test_a_full_context_drops_nothing_and_says_so(run):
    long = "Tom had a red kite. " * 60
    result = run("chat", "stories", "--max-new-tokens", 8, input=f"a\n{long}\n/clear\na\n")
    assert result.exit_code == 0
    assert "this model reads at most 256" in result.stderr
    assert "/clear" in result.stderr
    first, second = result.stdout.split("\n\n")
    assert first == second.strip("\n")


def test_help_of_the_command(run):
    told = run("chat", "--help").stdout
    for option in ("--url", "--api-key", "--system", "--load", "--mode", "--temperature"):
        assert option in told


class Terminal:
    """`twotower chat` in a terminal of its own."""

    def __init__(self, *options, **environment):
        program = "from twotower.cli.main import app; app(prog_name='twotower')"
        self.main, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "chat", *options],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=self._take_terminal,
            env={**os.environ, "TERM": "xterm-256color", **environment},
        )
        os.close(child)
        self.seen = ""

    @staticmethod
    def _take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # Tests that a shell runs in the background ignore Ctrl-C, and so would their children.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def expect(self, text, seconds=60):
        """Reads until a text has come; what came up to there is returned and forgotten."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come: {self.seen[-800:]!r}"
            if select.select([self.main], [], [], 0.1)[0]:
                self.seen += os.read(self.main, 1 << 16).decode(errors="replace")
        before, found, self.seen = self.seen.partition(text)
        return before + found

    def send(self, text):
        os.write(self.main, text.encode())

    def interrupt(self, text):
        """Presses Ctrl-C until a text has come: Python's line editing looks for signals only while it waits for keys,
        so that one which comes just before is not seen until the next. Ten seconds apart, so that a busy machine does
        not take two for one."""
        for _ in range(6):
            self.send("\x03")
            with contextlib.suppress(AssertionError):
                self.expect(text, seconds=10)
                return
        raise AssertionError(f"{text!r} did not come")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.main)


@pytest.fixture
def terminal():
    opened = []

    def start(*options, **environment):
        opened.append(Terminal(*options, **environment))
        opened[-1].expect("\r\n> ")
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.mark.slow
def test_in_a_terminal_blocks_are_drawn_and_ctrl_c_ends_an_answer_but_not_the_chat(terminal):
    shown = terminal("stories", "--max-new-tokens", "40")
    shown.send("Once upon\\\na time\n")
    drawn = shown.expect("tokens of context")
    assert "▒▒▒" in drawn
    assert "places masked" in drawn
    assert "\x1b[7" in drawn or "1;7" in drawn  # what is new is reversed
    shown.expect("> ")
    shown.send("/set past_positions on\n/set max_new_tokens 9000\n/mode ar\n/set ignore_eos on\n")
    shown.expect("ignore_eos = True")
    shown.send("Go on\n")
    shown.expect(" s\x1b[0m")  # the time under the answer
    shown.send("\x03")
    assert "Stopped" in shown.expect("/retry asks again)")
    shown.expect("> ")
    shown.interrupt("Ctrl-D or /exit leaves")
    shown.expect("> ")
    shown.send("/mo\tver\t\n")
    shown.expect("mode = verified")
    shown.expect("> ")  # before the prompt, Ctrl-D would be one for the terminal, which forgets it with the next prompt
    shown.send("\x04")
    assert shown.process.wait(20) == 0


@pytest.mark.slow
def test_no_color_is_heard(terminal):
    shown = terminal("stories", "--max-new-tokens", "30", NO_COLOR="1")
    shown.send("Once upon a time\n")
    drawn = shown.expect("tokens of context")
    assert "▒▒▒" in drawn
    assert not any(f"\x1b[{colour}m" in drawn or f";{colour}m" in drawn for colour in range(30, 38))


@pytest.mark.slow
def test_pipes_get_plain_text():
    program = "from twotower.cli.main import app; app(prog_name='twotower')"
    done = subprocess.run(
        [sys.executable, "-c", program, "chat", "--max-new-tokens", "20"],
        input="Once upon a time\n",
        capture_output=True,
        text=True,
        env={**os.environ, "FORCE_COLOR": "", "TERM": "xterm-256color"},
    )
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "\x1b" not in done.stdout + done.stderr
    assert ">" not in done.stdout
