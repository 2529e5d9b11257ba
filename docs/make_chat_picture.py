"""Draws docs/chat.svg: a terminal in which `twotower chat` is in the middle of a block. Needs `pip install pyte`.

python docs/make_chat_picture.py
"""

import fcntl
import io
import itertools
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 104, 22
SAID = ("Tell a story of a boy with a red kite.", "/set confidence_threshold 0.5", "And what did his dog do?")
MASK = "▒▒▒"  # a masked place


class Terminal:
    """A program in a terminal whose screen can be read."""

    def __init__(self, command: list[str]) -> None:
        self.screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.ByteStream(self.screen)
        self._main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment)
        os.close(side)

    def type(self, line: str) -> None:
        os.write(self._main, line.encode() + b"\n")

    def read(self, seconds: float) -> bool:
        """Takes what the program writes next; whether something came in this time."""
        if not select.select([self._main], [], [], seconds)[0]:
            return False
        self._stream.feed(os.read(self._main, 4096))
        return True

    def settle(self) -> None:
        """Reads until the program has waited at its prompt for a second."""
        until = time.monotonic() + 120
        while self.read(1.0) or not any(line.rstrip() == ">" for line in self.screen.display):
            assert time.monotonic() < until, "\n".join(self.screen.display)


def drawn(screen: pyte.Screen) -> Text:
    """The screen with its colours."""
    text = Text()
    for y in range(screen.lines):
        cells = [screen.buffer[y][x] for x in range(screen.columns)]
        for style, run in itertools.groupby(cells, style_of):
            text.append("".join(cell.data for cell in run), style)
        text.append("\n")
    text.rstrip()
    return text


def style_of(cell: pyte.screens.Char) -> Style:
    colour = {"default": None, "brown": "yellow"}.get(cell.fg, cell.fg)
    return Style(color=colour, bold=cell.bold, reverse=cell.reverse)


def main() -> None:
    command = [sys.executable, "-m", "twotower", "chat", "stories", "--max-new-tokens", "80"]
    terminal = Terminal(command)
    for line in SAID[:-1]:
        terminal.settle()
        terminal.type(line)
    terminal.settle()
    terminal.type(SAID[-1])
    best, place = 0, None
    until = time.monotonic() + 20
    while time.monotonic() < until and terminal.read(3.0):
        masks = sum(line.count(MASK) for line in terminal.screen.display)
        length = sum(len(line.strip()) for line in terminal.screen.display)
        if 4 <= masks <= 10 and length > best:  # half a block, and as much text as there is
            best, place = length, drawn(terminal.screen)
    terminal.process.kill()
    assert place is not None, "no moment was seen at which half of a block is masked"
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(place)
    console.save_svg(str(Path(__file__).with_name("chat.svg")), title="twotower chat")


if __name__ == "__main__":
    main()
