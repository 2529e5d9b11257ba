"""Reading messages: with line editing in a terminal, line by line elsewhere."""

import importlib.util
import sys
from collections.abc import Sequence

_PROMPT, _MORE = "> ", ". "
_QUOTES = '"""'


def read_message() -> str | None:
    """The next message, None at the end of the input.

    A line that ends with a backslash goes on in the next one, and lines between triple quotes belong together.
    Raises KeyboardInterrupt for Ctrl-C.
    """
    try:
        line = _line(_PROMPT)
    except EOFError:
        return None
    lines = []
    try:
        if line.lstrip().startswith(_QUOTES):
            line = line.lstrip().removeprefix(_QUOTES)
            while not line.rstrip().endswith(_QUOTES):
                lines.append(line)
                line = _line(_MORE)
            lines.append(line.rstrip().removesuffix(_QUOTES))
            return "\n".join(lines).strip("\n")
        while line.endswith("\\"):
            lines.append(line.removesuffix("\\"))
            line = _line(_MORE)
    except EOFError:
        line = ""  # what is there is the message
    return "\n".join([*lines, line])


def _line(prompt: str) -> str:
    """One line without its end. Raises EOFError at the end of the input."""
    if sys.stdin.isatty():
        if sys.stdout.isatty():
            return input(prompt)
        # Python's input would write the prompt among the answers
        print(prompt, end="", flush=True, file=sys.stderr)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def complete(words: Sequence[str]) -> None:
    """Lets the tab key complete the words of commands. Does nothing where Python has no readline, as on Windows."""
    if importlib.util.find_spec("readline") is None:
        return
    import readline

    def completed(text: str, state: int) -> str | None:
        # Words of a message aren't commands
        if not readline.get_line_buffer().startswith("/"):
            return None
        found = [word for word in words if word.startswith(text)]
        return found[state] + " " if state < len(found) else None

    readline.set_completer(completed)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
