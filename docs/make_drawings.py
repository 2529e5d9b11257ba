"""Draws docs/drawings/*.svg: python docs/make_drawings.py.

Colours are classes. In a file by itself a style sheet gives them values for light and dark; the site puts the drawings
inline, without that sheet, and drawings.css follows the reader's choice of theme.
"""

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).with_name("drawings")
# Class of a shape -> its fill and its edge, in light and in dark
COLOURS = {
    "plain": (("#f2f3f7", "#8b90a3"), ("#2c2e3b", "#8d90a6")),
    "context": (("#dbe9fb", "#2f6fc0"), ("#1d3a5f", "#5b9be6")),
    "denoiser": (("#fde6cd", "#c46a12"), ("#5a3412", "#f0a050")),
    "new": (("#fde6cd", "#c46a12"), ("#5a3412", "#f0a050")),
    "old": (("#dff2e3", "#3c8a52"), ("#243b2a", "#63b178")),
    "mask": (("#d9dbe3", "#a4a8b8"), ("#3a3c4a", "#5f6275")),
    "dropped": (("none", "#c0392b"), ("none", "#dd6666")),
    "ink": (("#1b1f2a", "none"), ("#e6e6f0", "none")),
    "soft": (("#5b6070", "none"), ("#a9abbd", "none")),
    "head": (("#5b6070", "none"), ("#a9abbd", "none")),
    "line": (("none", "#5b6070"), ("none", "#a9abbd")),
}
SHAPES = """
rect, polyline { stroke-width: 1.5; }
text { font: 14px system-ui, sans-serif; }
text.small { font-size: 12px; }
text.bold { font-weight: 600; }
"""


def rules(inside: str, dark: bool) -> str:
    """A rule per class for shapes inside of the element that the selector names."""
    pairs = {kind: both[dark] for kind, both in COLOURS.items()}
    return "\n".join(f"{inside} .{k} {{ fill: {fill}; stroke: {edge}; }}" for k, (fill, edge) in pairs.items())


STYLE = f"{SHAPES}{rules('svg', False)}\n@media (prefers-color-scheme: dark) {{\n{rules('svg', True)}\n}}"
_SHAPES_INSIDE = SHAPES.replace("rect, polyline", "rect, .drawing polyline").strip().split("\n")
SITE_STYLE = "\n".join(
    [
        "/* Written by docs/make_drawings.py. */",
        *(f".drawing {line}" for line in _SHAPES_INSIDE),
        rules(".drawing", False),
        rules('[data-md-color-scheme="slate"] .drawing', True),
        "",
    ]
)


class Drawing:
    """Shapes on a sheet of `width` x `height`, written as SVG."""

    def __init__(self, width: int, height: int) -> None:
        self._size = f"{width} {height}"
        self._shapes: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, kind: str, *lines: str, small: bool = False) -> None:
        """A rounded box with lines of text in its middle, the first one bold where there are several."""
        self._shapes.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="6"/>')
        step = 15 if small else 18
        top = y + h / 2 + 4.5 - step * (len(lines) - 1) / 2
        for i, line in enumerate(lines):
            look = "small" if small else "bold" if i == 0 and len(lines) > 1 else ""
            self.text(x + w / 2, top + i * step, line, look)

    def text(self, x: float, y: float, line: str, look: str = "", anchor: str = "middle") -> None:
        self._shapes.append(f'<text class="ink {look}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(line)}</text>')

    def arrow(self, *points: tuple[float, float], kind: str = "line") -> None:
        """A line through the points with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        (x0, y0), (x1, y1) = points[-2:]
        length = max(abs(x1 - x0), abs(y1 - y0))
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        head = f"{x1},{y1} {x1 - 8 * dx - 5 * dy},{y1 - 8 * dy - 5 * dx} {x1 - 8 * dx + 5 * dy},{y1 - 8 * dy + 5 * dx}"
        self._shapes += [f'<polyline class="{kind}" points="{path}"/>', f'<polygon class="head" points="{head}"/>']

    def cells(self, x: float, y: float, tokens: list[str], kinds: str, width: float = 46) -> None:
        """A row of tokens; a letter for each says what it is: m mask, n new, o fixed before, x dropped, c context."""
        names = {"m": "mask", "n": "new", "o": "old", "x": "dropped", "c": "context"}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            self.box(x + i * width, y, width - 4, 30, names[kind], token, small=True)

    def save(self, name: str) -> None:
        shapes = "\n  ".join(self._shapes)
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._size}">'
        text = f"{opening}\n  <style>{STYLE}</style>\n  {shapes}\n</svg>\n"
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")


def two_towers() -> None:
    d = Drawing(760, 270)
    d.box(20, 70, 100, 56, "plain", "prompt")
    d.box(180, 40, 190, 116, "context", "context tower", "frozen,", "reads left to right")
    d.box(480, 40, 190, 116, "denoiser", "denoiser tower", "trained,", "fills in masks")
    d.arrow((120, 98), (180, 98))
    for i, label in enumerate(("keys and values", "recurrent states", "layer by layer")):
        y = 62 + 36 * i
        if i < 2:
            d.arrow((370, y + 4), (480, y + 4))
            d.text(425, y - 4, label, "small")
        else:
            d.text(425, y - 4, label, "small soft")
    d.cells(481, 206, ["▒", "the", "▒", "▒"], "mnmm")
    d.text(672, 225, "16 tokens", "small", "start")
    d.arrow((600, 156), (600, 206))
    d.arrow((545, 206), (545, 156))
    d.text(618, 185, "one step", "small", "start")
    d.arrow((476, 221), (275, 221), (275, 156))
    d.text(376, 240, "finished block", "small")
    d.save("two-towers")


def block_decoding() -> None:
    words = ["The", "dog", "ran", "to", "the", "park", "and", "saw", "a", "big", "red", "ball", ".", "He", "was", "so"]
    fixed = [[], [0, 1, 3, 4, 12], [2, 5, 6, 8, 11, 13], [7, 9, 10, 14, 15]]
    labels = ["16 masks", "step 1: of 5 it is surer than γ", "step 2: of 6 more", "step 3: of the rest"]
    d = Drawing(760, 306)
    known: set[int] = set()
    for row, (places, label) in enumerate(zip(fixed, labels, strict=True)):
        y = 14 + 52 * row
        tokens = [words[i] if i in known or i in places else "▒" for i in range(16)]
        kinds = "".join("n" if i in places else "o" if i in known else "m" for i in range(16))
        d.text(180, y + 20, label, "small", "end")
        d.cells(188, y, tokens, kinds, 35.5)
        known |= {*places}
        if row < 3:
            d.arrow((470, y + 32), (470, y + 50))
    d.arrow((470, 202), (470, 226))
    d.box(188, 228, 564, 44, "context", "the context tower reads the block in one pass, and the next block begins")
    d.text(470, 296, "orange: fixed in this step; green: fixed before, and never changed again", "small soft")
    d.save("block-decoding")


def state_seeding() -> None:
    d = Drawing(760, 350)
    d.text(150, 26, "context tower", "bold")
    d.text(150, 44, "after its last token", "small soft")
    d.text(590, 26, "denoiser tower", "bold")
    d.text(590, 44, "on one block", "small soft")
    rows = [
        ("Mamba-2", "state, last inputs", "scan starts from that state"),
        ("experts", "", "each position by itself"),
        ("Mamba-2", "state, last inputs", "scan starts from that state"),
        ("attention", "keys, values of all tokens", "reads them and the whole block"),
        ("MLP", "", "each position by itself"),
    ]
    for i, (kind, given, use) in enumerate(rows):
        y = 60 + 56 * i
        d.box(50, y, 200, 40, "context", f"{kind}")
        d.box(440, y, 300, 40, "denoiser", f"{kind}: {use}", small=True)
        if given:
            d.arrow((250, y + 20), (440, y + 20))
            d.text(345, y + 13, given, "small")
        if i < len(rows) - 1:
            d.arrow((150, y + 40), (150, y + 56))
            d.arrow((590, y + 40), (590, y + 56))
    d.save("state-seeding")


def verified() -> None:
    d = Drawing(760, 220)
    d.text(250, 34, "1. the denoiser drafts, one pass", "small", "end")
    d.cells(266, 14, ["dog", "ran", "to", "the", "big", "lake"], "nnnnnn", 70)
    for i in range(5):
        d.text(299 + 70 * i, 69, "=" if i < 4 else "≠", "bold")
    d.text(250, 104, "2. the context tower reads it, one pass", "small", "end")
    d.cells(266, 84, ["dog", "ran", "to", "the", "park", "and"], "cccccc", 70)
    d.arrow((579, 114), (579, 160))
    d.text(250, 184, "3. what comes of it", "small", "end")
    d.cells(266, 164, ["dog", "ran", "to", "the", "park", "lake"], "ooooox", 70)
    d.text(404, 212, "kept: the same in both", "small soft")
    d.text(579, 212, "its own, free", "small soft")
    d.text(652, 212, "dropped", "small soft")
    d.save("verified")


def path_generate() -> None:
    d = Drawing(700, 232)
    d.box(14, 40, 140, 60, "plain", "load", "checkpoints")
    d.box(190, 40, 140, 60, "context", "prefill", "model")
    d.box(366, 40, 140, 60, "denoiser", "denoise", "model")
    d.box(542, 40, 140, 60, "plain", "commit", "decoding")
    d.box(366, 156, 140, 60, "context", "extend", "model")
    d.box(542, 156, 140, 60, "plain", "record, text", "decoding")
    for x in (154, 330, 506):
        d.arrow((x, 70), (x + 36, 70))
    d.arrow((612, 40), (612, 24), (436, 24), (436, 40))
    d.text(524, 16, "masks are left", "small")
    d.arrow((612, 100), (612, 156))
    d.text(602, 133, "block is full", "small", "end")
    d.arrow((542, 186), (506, 186))
    d.arrow((436, 156), (436, 100))
    d.text(426, 133, "next block", "small", "end")
    d.save("path-generate")


if __name__ == "__main__":
    FOLDER.joinpath("drawings.css").write_text(SITE_STYLE, encoding="utf-8")
    for draw in (two_towers, block_decoding, state_seeding, verified, path_generate):
        draw()
