"""Programs are shut in: each wall is tried from the inside."""

import sys

import pytest

from twotower.eval import sandbox
from twotower.eval.sandbox import passes, walls


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(sandbox, "LIMITS", {"cpu_seconds": 1, "memory_bytes": 1 << 28, "wall_seconds": 2})


@pytest.mark.parametrize("program", ["x = 1", "import math, re, typing, collections", "print('a' * 100000)", "input"])
def test_a_program_that_ends_passes(program):
    assert passes(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert 0",
        "def f(:",
        "raise SystemExit",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "input()",
        "import os; os.write(3, b'\\xff'); os._exit(0)",
    ],
)
def test_a_program_that_fails_or_leaves_early_does_not(program):
    assert not passes(program)


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "bytearray(1 << 29)", "open('a', 'w').write('b')"]
)
def test_limits_hold_everywhere(program, short):
    assert not passes(program)


def test_nothing_of_the_environment_is_passed_on(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert passes("import os; assert 'SECRET' not in os.environ")


needs_walls = pytest.mark.skipif(
    sys.platform != "linux" or not all(walls().values()), reason="this user may not make namespaces here"
)


@needs_walls
def test_there_is_no_network():
    # not even the machine's own address: "network is unreachable"
    assert passes("""
import errno, socket
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError as error:
    assert error.errno == errno.ENETUNREACH, error
else:
    assert False
""")


@needs_walls
def test_files_cannot_be_changed(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("here")
    assert not passes(f"import os; os.remove({str(kept)!r})")
    assert kept.exists()


@needs_walls
def test_a_program_cannot_make_files_writable_again(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("here")
    # mount_setattr, clearing read-only; then the same in another namespace of its own, where it has every right
    assert passes(f"""
import ctypes, os, struct
libc = ctypes.CDLL(None)
clear = struct.pack("4Q", 0, 1, 0, 0)
for flags in (0, 0x10000000 | 0x00020000):
    libc.unshare(flags)
    assert libc.syscall(442, -100, b"/", 0x8000, clear, len(clear)) != 0
    assert libc.syscall(442, -100, b"/", 0, clear, len(clear)) != 0
    try:
        os.remove({str(kept)!r})
    except OSError:
        pass
""")
    assert kept.exists()


@needs_walls
def test_other_processes_cannot_be_seen():
    assert passes("import os; assert os.getpid() == 1")
