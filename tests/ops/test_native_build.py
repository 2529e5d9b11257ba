import logging
import shutil
import subprocess
from pathlib import Path

import pytest

from twotower.ops.native import build

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
    with caplog.at_level(logging.WARNING, logger=build.__name__):
        assert build.library() is None
    assert "no such vector" in caplog.text
    assert not list((tmp_path / ".cache" / "twotower").glob("*"))


def test_a_home_that_cannot_be_written_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / ".cache").write_text("a file, not a folder")
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with caplog.at_level(logging.WARNING, logger=build.__name__):
        assert build.library() is None
    assert str(tmp_path) in caplog.text


@pytest.mark.skipif(COMPILER is None, reason="this machine has no C compiler")
def test_compiles_once_and_again_for_other_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert COMPILER is not None
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "a.c").write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(build, "_SOURCES", sources)
    first = build.compiled(COMPILER, tmp_path / "cache")
    assert first.exists()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
        assert build.compiled(COMPILER, tmp_path / "cache") == first
    (sources / "b.h").write_text("/* changed */\n")
    assert build.compiled(COMPILER, tmp_path / "cache") != first
