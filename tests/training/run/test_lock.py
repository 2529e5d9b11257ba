"""One call writes to an output folder at a time, and a killed one leaves it free."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from twotower.training.run.lock import LOCK_FILE, OutputInUse, locked

HOLD = """
import sys, pathlib, twotower.training.run.lock as lock
with lock.locked(pathlib.Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the folder until its input is closed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_the_second_is_told_who_is_first_and_what_to_do(holder: subprocess.Popen, tmp_path: Path) -> None:
    who = rf"being written by process {holder.pid} on this machine, python -c .*, since 20..-..-.. ..:..; wait for it"
    message = rf"{who}, .* or stop it with: kill {holder.pid}"
    with pytest.raises(OutputInUse, match=message), locked(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()  # the refused call doesn't take the lock's file away
    holder.communicate()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_leaves_the_folder_free(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_holder_on_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr(socket, "gethostname", lambda: "far")
        held = locked(tmp_path)
        held.__enter__()
    with pytest.raises(OutputInUse, match=r"on far, .* or stop it there"), locked(tmp_path):
        pass
    held.__exit__(None, None, None)


def test_a_lock_that_has_just_ended_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder removes its file between the other's opening and locking it: the other locks a file without a name."""
    real, removed = fcntl.flock, []

    def flock(file, operation):
        if not removed:
            removed.append((tmp_path / LOCK_FILE).unlink())
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
        with pytest.raises(OutputInUse), locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"without locks .* start no second call that writes to it"), locked(tmp_path):
        pass


def test_a_new_folder_in_which_nothing_was_made_goes_away(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "out"):
        pass
    assert not (tmp_path / "new" / "out").exists()
    with locked(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out" / "made").touch()
    assert (tmp_path / "new" / "out" / "made").exists()


def test_only_the_first_of_several_ranks_holds_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path, 0), locked(tmp_path, 1):
        pass
