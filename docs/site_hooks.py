"""What MkDocs does beside turning docs/*.md into pages; mkdocs.yml names this file under `hooks`.

- docs/cli.md is written from the command line's own declarations.
- The README of every recipe, CONTRIBUTING.md and CHANGELOG.md become pages. Pages link to those files as they lie in the
  repository, so that a link works on a code host too; here it is turned to the page.
- Drawings stand inline, so that they take the colours of the theme that the reader has chosen.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_DRAWING = re.compile(r"^!\[([^\]]*)\]\((drawings/[\w-]+\.svg)\)$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def _pages_of_repository() -> dict[str, Path]:
    """Page -> the file of the repository that it shows."""
    pages = {f"recipes/{path.parent.name}.md": path for path in sorted(ROOT.glob("recipes/*/README.md"))}
    pages |= {f"{name.lower()}.md": ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG")}
    return {page: path for page, path in pages.items() if path.exists()}


def on_files(files: Files, config: Any) -> Files:
    from twotower.cli import reference

    files.append(File.generated(config, "cli.md", content=reference.markdown()))
    for page, path in _pages_of_repository().items():
        files.append(File.generated(config, page, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri
    shown = {path.relative_to(ROOT).as_posix(): name for name, path in _pages_of_repository().items()}
    here = shown_from(source, shown)

    def link(found: re.Match[str]) -> str:
        if "://" in found[0]:
            return found[0]
        target = _relative(ROOT / here, found[0])
        if target is not None and target in shown:
            return "../" * source.count("/") + shown[target]
        if here != f"docs/{source}" and target is not None and target.startswith("docs/"):
            return "../" * source.count("/") + target.removeprefix("docs/")
        return found[0]

    return _DRAWING.sub(_inline, _LINK.sub(link, markdown))


def shown_from(source: str, shown: dict[str, str]) -> str:
    """Where the text of a page lies in the repository."""
    return next((path for path, page in shown.items() if page == source), f"docs/{source}")


def _relative(file: Path, target: str) -> str | None:
    """A link's target, seen from the root of the repository; None outside of it."""
    path = (file.parent / target).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None


def _inline(found: re.Match[str]) -> str:
    text = (ROOT / "docs" / found[2]).read_text(encoding="utf-8")
    drawing = re.sub(r"<style>.*?</style>|<\?xml.*?\?>", "", text, flags=re.DOTALL).strip()
    drawing = re.sub(r"\n\s*", "\n", drawing)
    return f'<figure class="drawing" role="img" aria-label="{found[1]}">\n{drawing}\n</figure>'
