"""What MkDocs does beside turning docs/*.md into pages; mkdocs.yml names this file under `hooks`.

- cli.md is written from the command line's own declarations, and examples.md from the scripts in examples/.
- A dataclass whose fields are declared as options (twotower.options) is shown as a table of them.
- The README of every recipe, CONTRIBUTING.md, CHANGELOG.md, SECURITY.md and LICENSE become pages. Pages link to those
  files as they lie in the repository, so that a link works on a code host too; here it is turned to the page.
- Drawings stand inline, and a <picture> becomes Material's two images, so that both follow the theme that the reader
  has chosen.
- A page that would fetch anything from another host is an error: the site works without a network.
"""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import twotower
from twotower.cli import reference
from twotower.options import options_of

ROOT = Path(__file__).parents[1]
_DRAWING = re.compile(r"^!\[([^\]]*)\]\((drawings/[\w-]+\.svg)\)$", re.MULTILINE)
_PICTURE = re.compile(r'<picture>.*?srcset="([^"]+)".*?src="([^"]+)" alt="([^"]+)".*?</picture>')
_FETCHED = re.compile(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
_CLASS = re.compile(r"^::: twotower\.([A-Z]\w+)$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()[^)#\s][^)\s]*")


def _pages_of_repository() -> dict[str, Path]:
    """Page -> the file of the repository that it shows."""
    pages = {f"recipes/{path.parent.name}.md": path for path in sorted(ROOT.glob("recipes/*/README.md"))}
    pages |= {f"{name.lower()}.md": ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")}
    return pages | {"license.md": ROOT / "LICENSE"}


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "cli.md", content=f"# Command line\n\n{reference.markdown()}"))
    files.append(File.generated(config, "examples.md", content=_examples()))
    for page, path in _pages_of_repository().items():
        files.append(File.generated(config, page, content=path.read_text(encoding="utf-8")))
    return files


def _examples() -> str:
    """A section for every script: what it does, and its code."""
    page = "# Examples\n\nShort scripts from the folder `examples/`. A test runs each of them.\n"
    for path in sorted(ROOT.glob("examples/*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        code = "\n".join(source.splitlines()[tree.body[0].end_lineno :]).strip()
        page += f"\n## {path.name}\n\n{ast.get_docstring(tree)}\n\n```python\n{code}\n```\n"
    return page


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri
    own = _pages_of_repository()
    shown = {path.relative_to(ROOT).as_posix(): name for name, path in own.items()}
    file = own.get(source, ROOT / "docs" / source)

    def link(found: re.Match[str]) -> str:
        if "://" in found[0]:
            return found[0]
        path, hash_, anchor = found[0].partition("#")
        target = _in_repository(file, path)
        if target not in shown and (source not in own or not target.startswith("docs/")):
            return found[0]
        page_there = shown.get(target, target.removeprefix("docs/"))
        return "../" * source.count("/") + page_there + hash_ + anchor

    markdown = _PICTURE.sub(r"![\3](\2#only-light)![\3](\1#only-dark)", _LINK.sub(link, markdown))
    return _CLASS.sub(_options, _DRAWING.sub(_inline, markdown))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    if found := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} would fetch {found[1]} from another host")
    return output


def _in_repository(file: Path, target: str) -> str:
    """A link's target, seen from the root of the repository."""
    path = (file.parent / target).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else target


def _options(found: re.Match[str]) -> str:
    """A class's docstring and its options; any other class is left to mkdocstrings."""
    name = found[1]
    owner = getattr(twotower, name)
    if not dataclasses.is_dataclass(owner) or not options_of(owner):
        return found[0]
    rows = []
    for field, (declared, what) in options_of(owner).items():
        default = what.shown_default or f"`{declared.default!r}`"
        rows.append(f"| `{field}` | {default} | {what.help} | {what.range} |")
    table = "\n".join(["| setting | default | meaning | range |", "|---|---|---|---|", *rows])
    return f"### {name} {{ #twotower.{name} }}\n\n{inspect.getdoc(owner)}\n\n{table}\n"


def _inline(found: re.Match[str]) -> str:
    text = (ROOT / "docs" / found[2]).read_text(encoding="utf-8")
    drawing = re.sub(r"<style>.*?</style>|<\?xml.*?\?>", "", text, flags=re.DOTALL).strip()
    drawing = re.sub(r"\n\s*", "\n", drawing)
    return f'<figure class="drawing" role="img" aria-label="{found[1]}">\n{drawing}\n</figure>'
