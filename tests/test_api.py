"""The package's public names are where they say, and are imported at first use only."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import twotower

ROOT = Path(__file__).parents[1]
PAGES = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")}
OBJECTS = [name for name in twotower.__all__ if name != "__version__"]


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "import sys, twotower; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0


def test_type_checkers_and_python_find_the_same_names_in_the_same_places() -> None:
    tree = ast.parse(Path(twotower.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == twotower._HOMES
    assert {*imported, "__version__"} == {*twotower.__all__}
    assert twotower.__all__ == sorted(twotower.__all__)


@pytest.mark.parametrize("name", OBJECTS)
def test_a_public_name_is_the_object_of_its_home(name: str) -> None:
    found = getattr(twotower, name)
    assert found is getattr(importlib.import_module(twotower._HOMES[name]), name)
    assert found.__module__ == twotower._HOMES[name], "it is defined elsewhere"


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lod'"):
        getattr(twotower, "lod")  # noqa: B009


def test_the_version_is_that_of_the_changelog() -> None:
    assert f"## [{twotower.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {twotower.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: page.name)
def test_code_on_the_pages_uses_public_names_only(page: Path) -> None:
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    # Whoever adds a family writes a module of the package itself.
    blocks = [block for block in blocks if "from twotower.checkpoints.families" not in block]
    used = {name for block in blocks for name in re.findall(r"\btwotower\.(\w+)", block)}
    assert used <= {*twotower.__all__}
