"""The loop of the terminal chat and its commands."""

import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from twotower.cli.conversation.answering import Answering, AnswerSettings
from twotower.cli.conversation.assigning import described, listed, setting_names, with_setting
from twotower.cli.conversation.display import AnswerView, draw_answer
from twotower.cli.conversation.entry import complete, read_message
from twotower.cli.conversation.history import Conversation
from twotower.decoding.modes import MODES

# Command -> what takes it, what it does
_HELP = {
    "/mode": ("[NAME]", "show or choose the mode: " + ", ".join([*MODES, "auto"])),
    "/set": ("[NAME [VALUE]]", "show all settings, or show or change one; the value default sets it back"),
    "/system": ("[TEXT]", "show or change the system prompt; off removes it"),
    "/retry": ("", "write the last answer anew"),
    "/undo": ("", "take back your last message and its answer"),
    "/clear": ("", "begin a new conversation; the system prompt stays"),
    "/save": ("FILE", "write the conversation as JSON"),
    "/load": ("FILE", "go on with the conversation of a file"),
    "/help": ("", "show this"),
    "/exit": ("", "leave, as Ctrl-D does"),
}
_ENTRY_HELP = (
    'Ctrl-C ends an answer. A line that ends with \\ goes on in the next one, lines between """ belong together, and '
    "a message that begins with / is written with a space before it."
)


class ChatSession:
    """One chat: answers go to `out`, all else that it says to `notes`."""

    def __init__(
        self, model: Answering, conversation: Conversation, settings: AnswerSettings, out: Console, notes: Console
    ) -> None:
        self.model = model
        self.conversation = conversation
        self.settings = settings
        self.out = out
        self.notes = notes
        self.told_plain = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/mode": self.choose_mode,
            "/set": self.change_setting,
            "/system": self.change_system,
            "/retry": self.retry,
            "/undo": self.undo,
            "/clear": self.clear,
            "/save": self.save,
            "/load": self.load,
            "/help": self.help,
        }

    def run(self) -> None:
        """Reads messages and commands until the input ends or /exit."""
        complete([*_HELP, *setting_names(), *MODES, "auto"])
        self.say(f"{self.model.about}. /help lists the commands, Ctrl-D leaves.")
        self.tell_plain()
        leaves = False
        while not leaves:
            try:
                leaves = self.take(read_message())
            except KeyboardInterrupt:  # at the prompt, or a second one while "Stopped" is said
                self.say("\nCtrl-D or /exit leaves.")

    def take(self, message: str | None) -> bool:
        """Answers a message or obeys a command; whether it was the last."""
        if message is None or message.strip() == "/exit":
            return True
        if message.startswith("/"):
            self.obey(message)
        elif message.strip():
            self.conversation.ask(message.strip())
            self.answer()
        return False

    def obey(self, line: str) -> None:
        """Runs a command; what is wrong with it is said, and the chat goes on."""
        name, _, rest = line.strip().partition(" ")
        if name not in self.commands:
            self.say(f"There is no command {name}; /help lists them.")
            return
        try:
            self.commands[name](rest.strip())
        except (ValueError, OSError) as error:
            self.complain(str(error))

    def answer(self) -> bool:
        """Answers the last message; says what it cost, or why there is no whole answer. Whether anything was added."""
        view = AnswerView()
        failure = None
        try:
            draw_answer(self.model.moments(self.conversation.messages, self.settings), view, self.out)
        except KeyboardInterrupt:
            failure = "Stopped"
        except ValueError as error:
            failure = str(error)
        if view.text:
            self.conversation.answer(view.text)
        if failure is not None:
            kept = "what came of the answer is kept" if view.text else "the message has no answer and waits"
            self.complain(f"{failure}. ({kept}; /retry asks again)")
        else:
            self.say_end(view)
        self.tell_plain()
        return bool(view.text)

    def say_end(self, view: AnswerView) -> None:
        """What a whole answer cost, and whether it was cut off."""
        assert view.end is not None
        if not view.text:
            self.say("The answer is empty; /retry asks again.")
        speed = view.speed()
        if speed:
            mode = self.settings.params.mode
            self.say(f"{mode}: {speed}" if view.end.denoiser_calls is not None else speed)
        if view.end.finish_reason != "length":
            return
        end = view.end
        if end.max_context is not None and end.num_context is not None and end.num_context >= end.max_context:
            self.complain(
                "The context is full. Nothing was dropped, but nothing more fits: /undo or /clear makes room."
            )
        else:
            self.say("The answer was cut off at its greatest length; /set max_new_tokens gives it more.")

    def tell_plain(self) -> None:
        """Says once that the model has no chat template."""
        if self.model.is_plain and not self.told_plain:
            self.told_plain = True
            self.complain('This model has no chat template: messages are plain lines of "User:" and "Assistant:".')

    def choose_mode(self, name: str) -> None:
        self.change_setting(f"mode {name}".strip())

    def change_setting(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            self.say("\n".join(listed(self.settings.params)))
        elif not value.strip():
            self.say(described(self.settings.params, name))
        else:
            params = with_setting(self.settings.params, name, value.strip())
            self.settings = AnswerSettings(params, self.settings.chosen | {name})
            self.say(described(params, name).partition("\n")[0])

    def change_system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "off" else text
        self.say(f"system prompt: {self.conversation.system or 'none'}")

    def retry(self, _: str) -> None:
        before = self.conversation.take_back()
        if not self.conversation.is_unanswered:
            self.say("There is no message to answer.")
        elif not self.answer() and before is not None:
            self.conversation.answer(before)
            self.say("The answer from before stays.")

    def undo(self, _: str) -> None:
        there = self.conversation.undo()
        self.say("Your last message and its answer are taken back." if there else "There is nothing to take back.")

    def clear(self, _: str) -> None:
        self.conversation = Conversation(self.conversation.system)
        self.say("A new conversation begins.")

    def save(self, name: str) -> None:
        file = _file(name)
        self.conversation.save(file)
        self.say(f"{file} holds {len(self.conversation.turns)} messages.")

    def load(self, name: str) -> None:
        self.conversation = Conversation.load(_file(name))
        self.show_loaded()

    def show_loaded(self) -> None:
        """Shows a conversation that came from a file."""
        for turn in self.conversation.turns:
            self.say(f"> {turn.content}" if turn.role == "user" else turn.content)
        if self.conversation.is_unanswered:
            self.say("The last message has no answer yet; /retry asks for one.")

    def help(self, _: str) -> None:
        width = max(len(f"{name} {takes}") for name, (takes, _) in _HELP.items())
        lines = [f"{f'{name} {takes}':{width}}  {what}" for name, (takes, what) in _HELP.items()]
        self.say("\n".join([*lines, _ENTRY_HELP]))

    def say(self, text: str) -> None:
        self.notes.print(Text(text, "dim"), soft_wrap=True)

    def complain(self, text: str) -> None:
        self.notes.print(Text(text, "yellow"), soft_wrap=True)


def _file(name: str) -> Path:
    if not name:
        raise ValueError("the name of a file is missing; write it behind the command")
    return Path(os.path.expanduser(name))
