"""An output folder that one call writes to at a time.

    OUT/.lock       who writes here, as JSON; gone when the call ends

What counts is the system's advisory lock on the file (flock), not that the file is there. It ends with its process, so
that a killed call leaves nothing that stops the next.
"""

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from twotower.origin import command

try:
    import fcntl
except ModuleNotFoundError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
# What file systems answer that know no locks
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class OutputInUse(ValueError):
    """Another call writes to the output folder."""


@contextmanager
def locked(folder: Path, rank: int = 0) -> Iterator[None]:
    """A context in which no other call can lock `folder`, which is made; of several ranks number 0 holds the lock.

    Raises OutputInUse, which says who has it, and changes nothing there. Warns where the file system knows no locks.
    """
    if rank > 0:
        yield
        return
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / LOCK_FILE
    file = _taken(place)
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command()}
        file.truncate(0)
        file.write(json.dumps(holder | {"since": f"{datetime.now():%Y-%m-%d %H:%M}"}) + "\n")
        file.flush()
        yield
    finally:
        place.unlink(missing_ok=True)  # while it is held: whoever waits for this file sees that it is gone
        file.close()
        if is_new and not any(folder.iterdir()):  # the call was refused for another reason
            folder.rmdir()


def _taken(place: Path) -> IO[str]:
    """The lock's file, open and locked."""
    while True:
        file = place.open("a+", encoding="utf-8")
        try:
            _lock(file, place)
            if place.exists() and os.path.samestat(os.fstat(file.fileno()), place.stat()):
                return file
        except BlockingIOError:
            file.seek(0)
            raise OutputInUse(_told(place.parent, file.read())) from None
        file.close()  # the call that held it has just ended, and removed it


def _lock(file: IO[str], place: Path) -> None:
    """Locks the file. Raises BlockingIOError where it is locked already."""
    if fcntl is None:
        warnings.warn(
            f"{place.parent} can't be locked on this system; start no second call that writes to it", stacklevel=4
        )
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        warnings.warn(
            f"{place.parent} is on a file system without locks ({error}); start no second call that writes to it",
            stacklevel=4,
        )


def _told(folder: Path, found: str) -> str:
    """What the second call is told; `found` is empty where the first has just begun."""
    who, stop = "another process", "stop it"
    if found:
        holder = json.loads(found)
        here = holder["host"] == socket.gethostname()
        who = f"process {holder['pid']} on {'this machine' if here else holder['host']}, {holder['command']}"
        who += f", since {holder['since']}"
        stop = f"stop it with: kill {holder['pid']}" if here else "stop it there"
    return f"{folder} is being written by {who}; wait for it, give another output folder, or {stop}"
