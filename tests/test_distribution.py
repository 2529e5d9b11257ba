"""The built package holds what it needs: data, C sources and pages in the wheel, tests and examples in the sdist."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "twotower"
BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "MANIFEST.in").exists(), reason="these are not the sources of a distribution"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built from a copy, offline."""
    copy, out = tmp_path_factory.mktemp("copy") / "twotower", tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "site"
    )
    shutil.copytree(ROOT, copy, ignore=unwanted)
    subprocess.run([sys.executable, "-c", BUILD, out], cwd=copy, check=True, capture_output=True)
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
