"""Compiles the C sources in c/ and opens the library; once per user and machine, in a few seconds."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

COMPILERS = ("cc", "gcc", "clang")
# O2, not O3: the vectors are written out, and O3 takes three times as long to compile for the same speed.
# No ffast-math: it would reorder sums, and every row must give the same bits in every batch.
FLAGS = ("-O2", "-march=native", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
SHARED = ("-fPIC", "-shared", "-fvisibility=hidden", "-fopenmp")

SOURCES = Path(__file__).parent / "c"


def find_compiler() -> str | None:
    """The path of this machine's C compiler."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, None where this machine has no C compiler that builds them; the reason is logged once."""
    compiler = find_compiler()
    if compiler is None:
        logger.info("no C compiler (%s): the CPU path is plain PyTorch, 3 to 5 times slower", ", ".join(COMPILERS))
        return None
    for find in (_cache_folder, _temporary_folder):
        try:
            return ctypes.CDLL(str(compiled(compiler, find())))
        except subprocess.CalledProcessError as error:
            problem = error.stderr
            break
        except OSError as error:
            problem = str(error)
    need = "they need a C compiler, and a folder that this user can write and load programs from (XDG_CACHE_HOME)"
    logger.warning("the C kernels don't build or load here (%s), so the CPU path is plain PyTorch; %s", problem, need)
    return None


def _cache_folder() -> Path:
    """Where the library is kept: twotower in $XDG_CACHE_HOME or else in ~/.cache. Raises FileNotFoundError where there
    is neither."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if Path(named).is_absolute():  # others are to be ignored: https://specifications.freedesktop.org/basedir
        return Path(named) / "twotower"
    try:
        return Path.home() / ".cache" / "twotower"
    except RuntimeError as error:  # HOME is not set, and the user id is not in the list of users: some containers
        raise FileNotFoundError("this user has no home folder; set HOME or XDG_CACHE_HOME") from error


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
    """The library's file in `folder`, compiled unless it is there: its name has a hash of sources, flags, compiler and
    CPU.

    Raises OSError where the folder can't be written, CalledProcessError where the compiler fails.
    """
    sources = sorted(SOURCES.glob("*.c"))
    digest = hashlib.sha256()
    for source in (*sources, *sorted(SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    digest.update(" ".join((compiler, *FLAGS, *SHARED, _cpu())).encode())
    file = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            partial = Path(building) / file.name
            command = [compiler, *FLAGS, *SHARED, "-o", str(partial), *map(str, sources), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(partial, file)  # several processes may build at once; each finds a whole file
    return file


def _cpu() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return f"{platform.machine()} {platform.processor()}"
