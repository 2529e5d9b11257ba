"""Where the kernels' library comes from, and what is said where there is none. The sources are one short function."""

import concurrent.futures
import ctypes
import os
import platform
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from twotower.backends.native import build, compile
from twotower.backends.native.compile import Level

COMPILER = next(iter(compile.find_compilers()), "")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="this machine has no C compiler")


@pytest.fixture(autouse=True)
def _short_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No wheel's kernels, one compiler, a home and a temporary folder of this test's own."""
    sources, home, temporary = tmp_path / "sources", tmp_path / "home", tmp_path / "tmp"
    for folder in (sources, home, temporary):
        folder.mkdir()
    (sources / "a.c").write_text("int answer(void) { return 42; }\n")
    for module in (build, compile):
        monkeypatch.setattr(module, "SOURCES", sources)
    monkeypatch.setattr(compile, "SHARED", ("-fPIC", "-shared"))  # all functions can be seen
    monkeypatch.setattr(compile, "BUILT_IN", tmp_path / "built_in")
    monkeypatch.setattr(build, "find_compilers", lambda: [COMPILER])
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    build.kernels.cache_clear()
    yield
    build.kernels.cache_clear()


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "home" / ".cache" / "twotower"


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The folder for those who have no other cache; it isn't there yet."""
    return tmp_path / "tmp" / f"twotower-{os.getuid()}"


def _script(tmp_path: Path, name: str, *lines: str) -> str:
    compiler = tmp_path / name
    compiler.write_text("\n".join(("#!/bin/sh", *lines)))
    compiler.chmod(0o755)
    return str(compiler)


def _answers(found: build.Kernels) -> bool:
    return found.library is not None and found.library.answer() == 42


@needs_compiler
def test_the_library_is_kept_in_the_user_s_cache_and_nothing_else_is_left(kept: Path, temporary: Path) -> None:
    found = build.kernels()
    assert _answers(found)
    assert found.origin == f"compiled by {COMPILER}"
    assert [file.suffix for file in kept.iterdir()] == [".so"]
    assert not temporary.exists()


@needs_compiler
def test_compiles_once_and_again_for_other_sources(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    first = build.compiled(COMPILER, kept)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
        assert build.compiled(COMPILER, kept) == first
    (compile.SOURCES / "b.h").write_text("/* changed */\n")
    assert build.compiled(COMPILER, kept) != first


@needs_compiler
def test_a_file_that_was_cut_short_is_compiled_again_and_never_loaded(kept: Path) -> None:
    first = build.compiled(COMPILER, kept)
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    assert build.compiled(COMPILER, kept).read_bytes() == whole


@needs_compiler
def test_several_processes_at_once_each_find_a_whole_file(kept: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda _: build.compiled(COMPILER, kept), range(4)))
    assert all(ctypes.CDLL(str(file)).answer() == 42 for file in files)
    assert set(kept.iterdir()) == set(files)


def test_without_a_compiler_the_problem_and_the_remedy_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compilers", list)
    found = build.kernels()
    assert found.library is None
    assert found.problem == "there is no C compiler (cc, gcc, clang)"
    assert found.remedy == "install gcc or clang, or a wheel of twotower with kernels built in"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["echo 'in file a.c' >&2", "echo 'error: no such vector' >&2", "exit 1"], "error: no such vector"),
        (["echo \"unrecognized argument '-march=native'\" >&2", "exit 1"], "unrecognized argument"),
        (["kill -SEGV $$"], "died with <Signals.SIGSEGV: 11>"),
        (["exit 3"], "returned non-zero exit status 3"),
    ],
)
def test_a_compiler_that_fails_is_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: Path, lines: list[str], told: str
) -> None:
    broken = _script(tmp_path, "cc", *lines)
    monkeypatch.setattr(build, "find_compilers", lambda: [broken])
    found = build.kernels()
    assert found.library is None
    assert found.problem.startswith(f"{broken} fails: ")
    assert told in found.problem
    assert "gcc or clang" in found.remedy
    assert not list(kept.iterdir())


@pytest.mark.parametrize("lines", [["exit 1"], ['for last; do [ "$p" = -o ] && echo "ELF" > "$last"; p=$last; done']])
@needs_compiler
def test_the_next_compiler_is_tried_where_the_first_one_s_work_is_no_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str]
) -> None:
    """One that fails, and one that writes what can't be loaded here, as a compiler for another C library does."""
    monkeypatch.setattr(build, "find_compilers", lambda: [_script(tmp_path, "cc", *lines), COMPILER])
    found = build.kernels()
    assert _answers(found)
    assert found.origin == f"compiled by {COMPILER}"


@needs_compiler
def test_a_user_without_a_home_keeps_the_library_among_the_temporary_files(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert _answers(build.kernels())
    assert [file.suffix for file in temporary.iterdir()] == [".so"]
    assert temporary.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.parametrize("home", ["nonexistent", "a file"])
def test_a_home_that_is_none_is_passed_over_and_not_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, temporary: Path, home: str
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    assert _answers(build.kernels())
    assert list(temporary.glob("*.so"))
    assert not (tmp_path / "nonexistent").exists()


@needs_compiler
@pytest.mark.parametrize(("named", "kept_there"), [("{}/cache", True), ("cache", False), ("", False)])
def test_an_absolute_xdg_cache_home_is_where_the_library_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: Path, named: str, kept_there: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", named.format(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert _answers(build.kernels())
    assert (tmp_path / "cache" / "twotower").exists() == kept_there
    assert kept.exists() != kept_there


@needs_compiler
def test_a_cache_that_cannot_be_written_is_passed_over(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # a file, in which there are no folders
    assert _answers(build.kernels())
    assert list(temporary.glob("*.so"))


@needs_compiler
def test_a_temporary_folder_that_others_can_write_is_not_used(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    temporary.mkdir()
    temporary.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    found = build.kernels()
    assert found.library is None
    assert f"{temporary} can be written by others" in found.problem
    assert "a folder that this user can write and load programs from (XDG_CACHE_HOME)" in found.remedy


@needs_compiler
def test_a_limit_on_files_is_told_before_a_compiler_is_called(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("called the compiler"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        found = build.kernels()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.library is None
    assert f"File too large: '{kept}'" in found.problem
    assert not list(kept.iterdir())


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """mounted(options) is a new file system in memory."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mounted-{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user can't mount file systems")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@needs_compiler
@pytest.mark.parametrize("options", ["size=1m", "noexec", "ro"])
def test_a_cache_that_is_full_or_read_only_or_without_programs_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, mounted: Callable[..., Path], temporary: Path, options: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(mounted(options)))
    assert _answers(build.kernels())
    assert list(temporary.glob("*.so"))


@needs_compiler
@pytest.mark.parametrize(
    ("options", "told"),
    [("size=1m", "No space left on device"), ("noexec", "failed to map segment"), ("ro", "Read-only file system")],
)
def test_where_no_folder_serves_each_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, mounted: Callable[..., Path], options: str, told: str
) -> None:
    place = mounted(options)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    found = build.kernels()
    assert found.library is None
    assert told in found.problem
    assert str(place) in found.problem
    assert "a folder that this user can write and load programs from (XDG_CACHE_HOME)" in found.remedy


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[Level]:
    """Two levels that this machine has, and between them one whose instructions it lacks; a wheel may have all."""
    monkeypatch.setattr(build, "cpu_features", lambda: "flags : old new")
    needs = {"best": {"old", "new"}, "other": {"alien"}, "base": set[str]()}
    made = [Level(name, (platform.machine(),), (), frozenset(features)) for name, features in needs.items()]
    monkeypatch.setattr(compile, "LEVELS", made)
    return made


@needs_compiler
def test_the_best_of_a_wheel_s_libraries_that_the_cpu_can_run_is_taken_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, levels: list[Level], kept: Path
) -> None:
    best, other, base = levels
    compile.BUILT_IN.mkdir()
    for level in (other, base):
        compile.compile_library(COMPILER, (), level.file)
    monkeypatch.setattr(build, "find_compilers", lambda: pytest.fail("looked for a compiler"))
    assert build.kernels().origin == "built in for base"
    compile.compile_library(COMPILER, (), best.file)
    build.kernels.cache_clear()
    found = build.kernels()
    assert _answers(found)
    assert found.origin == "built in for best"
    assert not kept.exists()


@needs_compiler
def test_a_compiler_helps_where_the_wheel_s_library_does_not_load(levels: list[Level]) -> None:
    compile.BUILT_IN.mkdir()
    levels[0].file.write_bytes(b"no library")
    found = build.kernels()
    assert _answers(found)
    assert found.origin == f"compiled by {COMPILER}"
