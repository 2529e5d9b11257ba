"""README and the pages of docs/: links lead somewhere and Python runs. `make docs` checks the site itself."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

import twotower
from twotower.decoding.modes import MODES
from twotower.decoding.params import COMMIT_RULES
from twotower.options import options_of

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
]


def pieces(page: Path, language: str) -> list[str]:
    """The blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_readme_is_one_screen_with_two_commands() -> None:
    readme = ROOT / "README.md"
    assert readme.stat().st_size <= 6000
    commands = [line.split("#")[0].strip() for block in pieces(readme, "sh") for line in block.splitlines()]
    assert commands == ["make demo", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files_of_the_repository(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#\s]+)|(?:src|srcset)=\"([^\"]+)\"", text)
    generated = {"cli.md", "examples.md"}  # which the site makes of the commands and of the scripts
    missing = [a or b for a, b in links if "://" not in a + b and not (page.parent / (a or b)).exists()]
    assert {*missing} <= generated


@pytest.mark.parametrize(
    "page", [page for page in PAGES if pieces(page, "python")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_python_on_pages_runs(page: Path) -> None:
    names: dict[str, object] = {}
    for block in pieces(page, "python"):
        if "import openai" not in block and "from openai" not in block:  # examples/ calls a server with it
            exec(compile(block, str(page), "exec"), names)
    assert names["twotower"] is twotower


def test_the_page_on_families_shows_the_code() -> None:
    source = (ROOT / "src" / "twotower" / "checkpoints" / "families" / "older.py").read_text(encoding="utf-8")
    functions = [b[b.index("def ") :] for b in pieces(ROOT / "docs" / "families.md", "python") if "def " in b]
    assert functions
    assert all(function in source for function in functions)


def test_the_page_on_modes_names_every_mode_setting_and_rule() -> None:
    page = (ROOT / "docs" / "modes.md").read_text(encoding="utf-8")
    settings = [field.name for field in dataclasses.fields(twotower.SamplingParams)]
    first_columns = " ".join(re.findall(r"^\|([^|]*)\|", page, re.MULTILINE))
    assert not [name for name in (*MODES, *settings, *COMMIT_RULES) if f"`{name}`" not in first_columns]


def test_the_page_on_modes_says_what_the_table_of_modes_says() -> None:
    page = (ROOT / "docs" / "modes.md").read_text(encoding="utf-8")
    for mode in MODES.values():
        cost = "a pass of each tower" if mode.uses_denoiser else "a pass of the context tower"
        cost = "a pass of the denoiser, and of the context tower for each block" if mode.fills_blocks else cost
        drafts = "drafter" in mode.settings
        cost = "a pass of the context tower, and of the denoiser if that drafts" if drafts else cost
        text = "exactly that of `ar`" if mode.exact else "the denoiser's own"
        assert f"| `{mode.name}` | {mode.summary} | {cost} | {text} |" in page
    for setting in {name for mode in MODES.values() for name in mode.settings}:
        readers = ", ".join(f"`{mode.name}`" for mode in MODES.values() if setting in mode.settings)
        assert re.search(rf"^\| `{setting}`.*\| {readers} \|$", page, re.MULTILINE), f"{setting}: {readers}"
    helps = {name: what.help for name, (_, what) in options_of(twotower.SamplingParams).items() if name != "mode"}
    assert not [name for name, text in helps.items() if f"| {text} |" not in page.replace("`", "")]


def test_getting_started_names_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert {*re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)} == {*extras} - {"dev", "docs"}


def test_the_page_on_architecture_has_the_contract_of_imports() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    layers = reversed(tools["importlinter"]["contracts"][0]["layers"])
    order = [sorted(re.findall(r"twotower\.(\w+)", layer)) for layer in layers]
    [chain] = [block for block in pieces(ROOT / "docs" / "architecture.md", "text") if "<" in block]
    assert [sorted(re.findall(r"\w+", layer)) for layer in chain.split("<")] == order


def test_the_page_on_architecture_lists_every_folder() -> None:
    listed = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    package = ROOT / "src" / "twotower"
    folders = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*listed}
