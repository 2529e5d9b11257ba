import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from twotower.backends.native import build

COMPILER = next((found for name in build.COMPILERS if (found := shutil.which(name))), None)


@pytest.fixture(autouse=True)
def _fresh_library() -> None:
    build.library.cache_clear()


def test_without_a_compiler_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO, logger=build.__name__):
        assert build.library() is None
        assert build.library() is None
    assert len(caplog.records) == 1
    assert "no C compiler (cc, gcc, clang)" in caplog.text


def test_a_compiler_that_fails_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no such vector >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(compiler))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with caplog.at_level(logging.WARNING, logger=build.__name__):
        assert build.library() is None
    assert "no such vector" in caplog.text
    assert not list((tmp_path / ".cache" / "twotower").glob("*"))


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder for users without a home, which is not there yet; nobody has a home."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: COMPILER)
    monkeypatch.setattr(Path, "home", _no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path / f"twotower-{os.getuid()}"


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="this machine has no C compiler")
def test_a_user_without_a_home_keeps_the_library_among_the_temporary_files(temporary: Path) -> None:
    assert build.library() is not None
    assert [file.suffix for file in temporary.iterdir()] == [".so"]
    assert temporary.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="this machine has no C compiler")
@pytest.mark.parametrize(("named", "kept_there"), [("{}/cache", True), ("cache", False), ("", False)])
def test_an_absolute_xdg_cache_home_is_where_the_library_is_kept(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str, kept_there: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", named.format(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert build.library() is not None
    assert (tmp_path / "cache" / "twotower").exists() == kept_there
    assert temporary.exists() != kept_there


def test_a_temporary_folder_that_others_can_write_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    temporary.mkdir()
    temporary.chmod(0o777)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true")
    with caplog.at_level(logging.WARNING, logger=build.__name__):
        assert build.library() is None
    assert f"{temporary} can be written by others" in caplog.text


def test_where_no_folder_serves_the_warning_says_what_it_must_be(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where programs may not run from it: the library is there and can't be loaded."""

    def compiled(_: str, folder: Path) -> Path:
        (folder / "kernels.so").write_text("no library")
        return folder / "kernels.so"

    monkeypatch.setattr(build, "compiled", compiled)
    with caplog.at_level(logging.WARNING, logger=build.__name__):
        assert build.library() is None
    assert f"{temporary}/kernels.so" in caplog.text
    assert "a folder that this user can write and load programs from (XDG_CACHE_HOME)" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="this machine has no C compiler")
def test_a_home_that_cannot_be_written_is_passed_over(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".cache").write_text("a file, not a folder")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert build.library() is not None
    assert list(temporary.glob("*.so"))


@pytest.mark.skipif(COMPILER is None, reason="this machine has no C compiler")
def test_compiles_once_and_again_for_other_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert COMPILER is not None
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "a.c").write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    first = build.compiled(COMPILER, tmp_path / "cache")
    assert first.exists()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
        assert build.compiled(COMPILER, tmp_path / "cache") == first
    (sources / "b.h").write_text("/* changed */\n")
    assert build.compiled(COMPILER, tmp_path / "cache") != first
