"""The built package holds what it needs: data, C sources and pages in the wheel, tests and examples in the sdist, and
compiled kernels in a wheel that is asked for them."""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from twotower.backends.native.compile import LEVELS, find_compilers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "twotower"
BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "MANIFEST.in").exists(), reason="these are not the sources of a distribution"),
]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources."""
    copy = tmp_path_factory.mktemp("copy") / "twotower"
    unwanted = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "site"
    )
    shutil.copytree(ROOT, copy, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def built(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built offline."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-c", BUILD, out], cwd=copied, check=True, capture_output=True)
    return out


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert names == {name for name in files if "__pycache__" not in name}
    assert {Path(name).suffix for name in names} >= {".py", ".typed", ".c", ".h", ".safetensors", ".jsonl", ".html"}


def test_the_sdist_can_be_tested(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "examples", "benchmarks", "recipes", "docs"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= names
    assert {"Makefile", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml"} <= names


@pytest.mark.skipif(not find_compilers(), reason="this machine has no C compiler")
def test_a_wheel_that_is_asked_for_kernels_has_every_level_of_this_machine_and_says_so(
    built: Path, copied: Path, tmp_path: Path
) -> None:
    """After the plain wheel, of which nothing may be left in this one, nor of this one in the next plain wheel."""
    sources = copied / "src" / "twotower" / "backends" / "native" / "c"
    for file in sources.glob("*.c"):
        file.write_text("")
    (sources / "linear.c").write_text("int answer(void) { return 42; }\n")  # the real ones take half a minute
    for kernels, out in (("1", tmp_path / "kernels"), ("", tmp_path / "plain")):
        environment = {**os.environ, "TWOTOWER_BUILD_KERNELS": kernels}
        subprocess.run([sys.executable, "-c", BUILD, out], cwd=copied, env=environment, check=True, capture_output=True)
    [wheel] = (tmp_path / "kernels").glob("*.whl")
    [plain] = (tmp_path / "plain").glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert plain.name.endswith("-py3-none-any.whl")
    names, plain_names = ({Path(name).name for name in zipfile.ZipFile(one).namelist()} for one in (wheel, plain))
    assert names - plain_names == {level.file.name for level in LEVELS if platform.machine() in level.machines}
