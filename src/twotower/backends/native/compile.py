"""Compiles the C sources in c/, for the machine at hand or for a level of instructions that many machines have.

setup.py runs this file where nothing but Python is installed, so it imports only the standard library.
"""

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

COMPILERS = ("cc", "gcc", "clang")
# O2, not O3: the vectors are written out, and O3 takes three times as long to compile for the same speed.
# No ffast-math: it would reorder sums, and every row must give the same bits in every batch.
FLAGS = ("-O2", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
SHARED = ("-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
NATIVE = ("-march=native",)

SOURCES = Path(__file__).parent / "c"
# Where a wheel with kernels has them
BUILT_IN = Path(__file__).parent / "built_in"

_LONGEST_COMPILE = 600  # seconds: the slowest small boards take a minute


class Level(NamedTuple):
    """Instructions that a library of a wheel is compiled for: the `machines` that have them, by Python's names, if
    their CPU has all `features`, by the names of /proc/cpuinfo."""

    name: str
    machines: tuple[str, ...]
    target: tuple[str, ...]
    features: frozenset[str]

    @property
    def file(self) -> Path:
        """Where a wheel has the library."""
        return BUILT_IN / f"kernels-{self.name}.so"


_X86 = ("x86_64", "AMD64")
_V2 = frozenset(["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"])
_V4 = _V3 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])
# The best first. The sources tell no finer differences apart; see the x86-64 psABI for v2 to v4.
LEVELS = (
    Level(
        "x86-64-v4-amx",
        _X86,
        ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        _V4 | {"avx512_bf16", "amx_tile", "amx_bf16"},
    ),
    Level("x86-64-v4-bf16", _X86, ("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}),
    Level("x86-64-v4", _X86, ("-march=x86-64-v4",), _V4),
    Level("x86-64-v3", _X86, ("-march=x86-64-v3",), _V3),
    Level("x86-64-v2", _X86, ("-march=x86-64-v2",), _V2),
    Level("armv8-a", ("aarch64", "arm64"), ("-march=armv8-a",), frozenset()),
)


def cpu_features() -> str:
    """The line of /proc/cpuinfo that has this CPU's features; where there is none, names of machine and processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return f"{platform.machine()} {platform.processor()}"


def levels_of(machine: str, features: str) -> list[Level]:
    """The levels that a machine can run, the best first. Each gives its own bits, and the same on every machine; but
    where the system keeps matrix tiles from a process, x86-64-v4-amx gives those of x86-64-v4-bf16."""
    there = set(features.split())
    return [level for level in LEVELS if machine in level.machines and level.features <= there]


def find_compilers() -> list[str]:
    """The paths of this machine's C compilers; several names of one program count once."""
    found = [path for name in COMPILERS if (path := shutil.which(name))]
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def compile_library(compiler: str, target: Sequence[str], file: Path) -> None:
    """Compiles all sources into `file`, in whose folder the compiler keeps what it needs meanwhile.

    Raises OSError where the compiler can't be run or the folder can't be written, and RuntimeError with the compiler's
    first complaint where it fails.
    """
    sources = map(str, sorted(SOURCES.glob("*.c")))
    command = [compiler, *FLAGS, *target, *SHARED, "-o", str(file), *sources, "-lm"]
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        try:
            subprocess.run(
                command,
                check=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LONGEST_COMPILE,
                env={**os.environ, "TMPDIR": scratch},
            )
        except subprocess.CalledProcessError as error:
            lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
            telling = [line for line in lines if re.search("error|cannot|fail|No space", line)]
            ended = str(error).rpartition("]' ")[2].rstrip(".")  # such as "died with <Signals.SIGSEGV: 11>"
            raise RuntimeError(f"{compiler} fails: {next(iter(telling + lines), ended)[:300]}") from error
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{compiler} takes longer than {_LONGEST_COMPILE} seconds") from error
