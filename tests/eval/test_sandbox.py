"""Programs are shut in: each wall is tried from the inside."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from twotower.eval import sandbox
from twotower.eval.sandbox import passes, walls


@pytest.fixture
def short(monkeypatch):
    limits = {"cpu_seconds": 1, "memory_bytes": 1 << 28, "wall_seconds": 1}
    monkeypatch.setattr(sandbox, "LIMITS", sandbox.LIMITS | limits)


@pytest.fixture
def replaced(monkeypatch, tmp_path):
    """replaced(old, new): programs are run by a copy of the child's file, whose name tells what that started."""

    def make(old: str, new: str) -> Path:
        text = sandbox._CHILD.read_text()
        assert old in text
        copy = tmp_path / "child.py"
        copy.write_text(text.replace(old, new))
        monkeypatch.setattr(sandbox, "_CHILD", copy)
        return copy

    return make


@pytest.fixture(params=["with namespaces", "without"])
def child(request, replaced):
    """The child's file, also as where the kernel grants no namespaces."""
    condition = "if libc.unshare("
    return replaced(condition, condition if request.param == "with namespaces" else "if False and libc.unshare(")


def running(file):
    """The processes that run a Python file, and those that they forked."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(file).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass  # it has ended
    return found


@pytest.mark.parametrize("program", ["x = 1", "import math, re, typing, collections", "print('a' * 100000)", "input"])
def test_a_program_that_ends_passes(program):
    assert passes(program)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "bytearray(1 << 29)", "open('a', 'w').write('b')"])
def test_limits_hold_everywhere(program, short):
    assert not passes(program)


@pytest.mark.slow
def test_a_busy_program_is_ended_by_its_cpu_time(monkeypatch):
    monkeypatch.setattr(sandbox, "LIMITS", sandbox.LIMITS | {"cpu_seconds": 1, "wall_seconds": 60})
    began = time.monotonic()
    assert not passes("while True: pass")
    assert time.monotonic() - began < 30


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the means")


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize(
    ("program", "ends"),
    [
        ("import os, time\nif os.fork() == 0: time.sleep(60)", True),
        ("import os, time\nif os.fork() == 0: os.setsid(), time.sleep(60)", True),
        ("import os, time\nfor _ in range(3):\n  if os.fork(): break\n  os.setsid()\nelse: time.sleep(60)", True),
        ("import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(60)", False),
    ],
)
def test_nothing_that_a_program_starts_outlives_it(child, program, ends, short):
    began = time.monotonic()
    assert passes(program) == ends
    assert time.monotonic() - began < 30
    assert running(child) == []


@needs_linux
def test_nothing_outlives_the_evaluation(child):
    line = "import pathlib, sys; from twotower.eval import sandbox; sandbox._CHILD = pathlib.Path(sys.argv[1])"
    program = "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(60)"
    evaluation = subprocess.Popen([sys.executable, "-c", f"{line}; sandbox.passes(sys.argv[2])", str(child), program])
    wait_until(lambda: len(running(child)) == 4)  # the evaluation, whose argument it is, the child, and two of its
    os.kill(evaluation.pid, signal.SIGKILL)
    evaluation.wait()
    wait_until(lambda: not running(child))


def wait_until(condition):
    end = time.monotonic() + 8  # less than a program may take
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_what_a_program_writes_fills_no_memory(short):
    program = """
import os
for file in range(3, 16):
    try:
        for _ in range(500):
            os.write(file, bytes(1 << 16))
    except OSError:
        pass
"""
    tracemalloc.start()
    try:
        assert not passes(program)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_what_a_program_finds_in_memory_is_no_pass():
    program = """
import os, sys
frame, found = sys._getframe(), []
while frame:
    found += [v for part in frame.f_locals.values() for v in (part.values() if isinstance(part, dict) else [part])]
    frame = frame.f_back
for value in found:
    if isinstance(value, str | bytes) and len(value) in (16, 32):
        for file in range(3, 16):
            try:
                os.write(file, value.encode() if isinstance(value, str) else value)
            except OSError:
                pass
os._exit(0)
"""
    assert not passes(program)


@needs_linux
def test_processes_are_limited(monkeypatch):
    monkeypatch.setattr(sandbox, "LIMITS", sandbox.LIMITS | {"processes": 5})
    threads = sum(1 for _ in Path("/proc").glob("[0-9]*/task/*"))
    program = f"""
import os, resource, time
soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
assert 5 <= soft == hard < {threads} + 500  # others may start some meanwhile
try:
    for _ in range(0 if {os.getuid()} == 0 else hard):  # what root runs is not limited
        if os.fork() == 0:
            time.sleep(9)
except BlockingIOError:
    pass
else:
    assert {os.getuid()} == 0
"""
    assert passes(program)


@pytest.mark.slow
def test_elsewhere_than_on_linux_there_are_limits_only(replaced, short):
    replaced("sys.platform", "'darwin'")
    walls.cache_clear()
    try:
        assert walls() == {"no_network": False, "no_other_processes": False, "no_writing": False}
    finally:
        walls.cache_clear()
    programs = ("x = 1", "assert 0", "while True: pass", "import os, time\nif os.fork() == 0: time.sleep(60)")
    assert [passes(program) for program in programs] == [True, False, False, True]


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
