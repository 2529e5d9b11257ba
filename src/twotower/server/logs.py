"""The log: lines of JSON on stderr, short whatever clients send, written so that nothing under the log can hold up."""

import asyncio
import json
import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from twotower.server.config import LogLevel

# Most characters of a field, which may be what a client has sent; of a message; of an exception with its traceback.
_FIELD, _MESSAGE, _EXCEPTION = 512, 2048, 16384
# Most lines that wait to be written, and the seconds that the last of them have when the log is closed.
_HELD, _LAST_SECONDS = 2000, 1.0
# After a line couldn't be written, until the next is tried.
_RETRY_SECONDS = 0.1
_STDERR = 2

logger = logging.getLogger(__name__)


def cut(text: str, most: int = _FIELD) -> str:
    """The text if it has at most `most` characters, else its two ends and how many characters are not shown."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} … [{len(text) - most // 2 * 2} characters] … {text[len(text) - most // 2 :]}"


def cut_fields(value: Any) -> Any:
    """A value of a log line with every text in it cut."""
    if isinstance(value, str):
        return cut(value)
    if isinstance(value, dict):
        return {cut(str(key)): cut_fields(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [cut_fields(element) for element in value]
    return value if value is None or isinstance(value, (bool, int, float)) else cut(str(value))


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, logger, message and the record's `fields`, long texts cut.

    The line is ASCII, everything else is escaped: no character of a client ends the line or steers a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": cut(record.getMessage(), _MESSAGE),
        }
        fields: dict[str, Any] = getattr(record, "fields", {})
        line |= {name: cut_fields(value) for name, value in fields.items() if value is not None}
        if record.exc_info:
            line["exception"] = cut(self.formatException(record.exc_info), _EXCEPTION)
        return json.dumps(line)


class _StderrLines(logging.Handler):
    """Writes records to stderr from a thread of its own.

    A full disk, a closed pipe or a reader that has stopped reading costs lines, never time or memory: what can't be
    written is counted, and the count is told once lines can be written again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self.addFilter(is_no_cancellation)
        self._lines: queue.Queue[bytes | None] = queue.Queue(_HELD)
        self._count = threading.Lock()
        self._num_lost = 0
        self._thread = threading.Thread(target=self._write_all, name="twotower-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self._line(record))
        except queue.Full:
            self._lose(1)

    def close(self) -> None:
        """Ends the thread when it has written what waits, or after a second."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=_LAST_SECONDS)
            self._thread.join(_LAST_SECONDS)
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode()

    def _lose(self, count: int) -> None:
        with self._count:
            self._num_lost += count

    def _write_all(self) -> None:
        is_torn = False
        while (line := self._lines.get()) is not None:
            with self._count:
                lost, self._num_lost = self._num_lost, 0
            if lost:
                message = f"{lost} lines of the log are lost, because they could not be written"
                told = {"name": logger.name, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message}
                line = self._line(logging.makeLogRecord(told)) + line
            left = b"\n" + line if is_torn else line
            try:
                while left:
                    written = os.write(_STDERR, left)
                    is_torn = True
                    left = left[written:]
                is_torn = False
            except OSError:
                self._lose(lost + 1)
                time.sleep(_RETRY_SECONDS)


def is_no_cancellation(record: logging.LogRecord) -> bool:
    """False for uvicorn's tracebacks of requests that a server cuts when it stops: these are no defects, and have their
    own lines."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


@contextmanager
def log_to_stderr(level: LogLevel) -> Iterator[None]:
    """Writes all log records of this process, from `level` on, and its warnings to stderr as lines of JSON, until it is
    left."""

    def warned(message: Warning | str, *_: object, **__: object) -> None:
        logger.warning("%s", message)

    root, handler = logging.getLogger(), _StderrLines()
    level_before = root.level
    root.addHandler(handler)
    root.setLevel(level.upper())
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warned
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level_before)
        handler.close()
