"""The signals that end a program, and what it does about them."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# The third comes when the program's terminal is closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STDERR = 2
# For the last lines of a log, and for a signal to come.
_LAST_SECONDS = 0.05


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Calls `handler` for SIGINT, SIGTERM and SIGHUP, until it is left."""
    # nohup has had SIGHUP ignored
    caught = [one for one in _SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, handler) for one in caught}
    try:
        yield
    finally:
        for one, earlier in before.items():
            signal.signal(one, earlier)


def end_at_once(number: int, _: FrameType | None = None) -> None:
    """Ends the process by a signal, as a shell or a supervisor expects of it, without waiting for anything."""
    time.sleep(_LAST_SECONDS)
    if os.isatty(STDERR):
        os.write(STDERR, b"\x1b[?25h\n")  # a progress bar hides the cursor
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    # The first process of a container isn't ended by signals.
    time.sleep(_LAST_SECONDS)
    os._exit(128 + number)
