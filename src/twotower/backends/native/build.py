"""Opens the kernels' library: the one that a wheel has for this CPU, or one that this machine's C compiler makes in
seconds, once per user and machine."""

import ctypes
import functools
import hashlib
import os
import platform
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

from twotower.backends.native.compile import (
    COMPILERS,
    FLAGS,
    NATIVE,
    SHARED,
    SOURCES,
    compile_library,
    cpu_features,
    find_compilers,
    levels_of,
)

# Bytes that must be free before a compiler is called: ten times what it writes
_ROOM = 4 << 20


class Kernels(NamedTuple):
    """The opened library and where it is from; without one, why there is none and what to do about it."""

    library: ctypes.CDLL | None
    origin: str = ""
    problem: str = ""
    remedy: str = ""


def library() -> ctypes.CDLL | None:
    """The opened kernels, None where `kernels` has a problem instead."""
    return kernels().library


@functools.cache
def kernels() -> Kernels:
    """This machine's kernels. They are compiled where the wheel has none for this CPU and no earlier process did it."""
    problems: dict[str, None] = {}  # in order, each once
    levels = levels_of(platform.machine(), cpu_features())
    built_in = next((level for level in levels if level.file.exists()), None)
    if built_in is not None:
        try:
            return Kernels(ctypes.CDLL(str(built_in.file)), f"built in for {built_in.name}")
        except OSError as error:
            problems[str(error)] = None
    compilers = find_compilers()
    for compiler in compilers:
        for find in (_cache_folder, _temporary_folder):
            try:
                return Kernels(ctypes.CDLL(str(compiled(compiler, find()))), f"compiled by {compiler}")
            except OSError as error:
                problems[str(error)] = None
            except RuntimeError as error:  # the compiler's fault, in whatever folder
                problems[str(error)] = None
                break
    if compilers:
        remedy = "they need gcc or clang, and a folder that this user can write and load programs from (XDG_CACHE_HOME)"
    else:
        problems[f"there is no C compiler ({', '.join(COMPILERS)})"] = None
        remedy = "install gcc or clang, or a wheel of twotower with kernels built in"
    return Kernels(None, problem="; ".join(problems), remedy=remedy)


def _cache_folder() -> Path:
    """Where the library is kept: twotower in $XDG_CACHE_HOME or else in ~/.cache. Raises FileNotFoundError where there
    is neither."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if Path(named).is_absolute():  # others are to be ignored: https://specifications.freedesktop.org/basedir
        return Path(named) / "twotower"
    try:
        home = Path.home()
    except RuntimeError as error:  # HOME is not set, and the user id is not in the list of users: some containers
        raise FileNotFoundError("this user has no home folder; set HOME or XDG_CACHE_HOME") from error
    if not home.is_dir():  # such as /nonexistent, which is not to be made
        raise FileNotFoundError(f"the home folder {home} doesn't exist; set HOME or XDG_CACHE_HOME")
    return home / ".cache" / "twotower"


def _temporary_folder() -> Path:
    """Where the library is kept if the cache can't be written: a folder of this user's among the temporary files.

    Raises PermissionError where somebody else can write to it, and so could have put any program there.
    """
    folder = Path(tempfile.gettempdir()) / f"twotower-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others; remove it, or set HOME to a folder of your own")
    return folder


def compiled(compiler: str, folder: Path) -> Path:
    """The library's file in `folder`, compiled unless a whole one is there. Its name has a hash of sources, flags,
    compiler and CPU, and one of its content: a file that was cut short by a full disk or a crash is never taken.

    Raises OSError where the folder can't be written or is full, RuntimeError where the compiler fails.
    """
    digest = hashlib.sha256()
    for source in (*sorted(SOURCES.glob("*.c")), *sorted(SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    digest.update(" ".join((compiler, *FLAGS, *NATIVE, *SHARED, cpu_features())).encode())
    name = f"kernels-{digest.hexdigest()[:16]}"
    for file in folder.glob(f"{name}-*.so"):
        if file.name == _full_name(name, file):
            return file
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as room:  # a compiler takes seconds to find a full disk, at every start
            room.write(bytes(_ROOM))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    with tempfile.TemporaryDirectory(dir=folder) as building:
        partial = Path(building) / "partial.so"
        compile_library(compiler, NATIVE, partial)
        # Several processes may build at once; each finds a whole file.
        return partial.rename(folder / _full_name(name, partial))


def _full_name(name: str, file: Path) -> str:
    return f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.so"
