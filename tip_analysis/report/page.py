"""The page: what a section is made of, and its HTML.

A section is plain data; `render` puts a list of them into one self-contained file. Everything that
comes from a run goes through jinja2's autoescape or into a JSON block whose `<`, `>` and `&` are
escaped. A content-security policy names the hash of the page's one script, so that a browser would
refuse any other, and forbids every request.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from tip_analysis import figures
from tip_analysis.core.words import sentence
from tip_analysis.figures import style
from tip_analysis.report import glossary

OPEN_ROWS = 8
"""A longer table is folded away."""


@dataclass(frozen=True)
class Tag:
    """A quadrant's name with its colour."""

    quadrant: str


@dataclass(frozen=True)
class FromPaper:
    """A value of the paper's, marked as such."""

    text: str


@dataclass(frozen=True)
class Measured:
    """A value with its interval on a line of its own."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """A table of texts; `numeric` columns are set flush right, `from_paper` rows are marked."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Tag | FromPaper | Measured]]
    caption: str
    numeric: frozenset[int] = frozenset()
    dense: bool = False
    """For long lists of settings."""
    folded: str = ""
    """Where the table is folded away whatever its length: what opens it."""

    @property
    def opener(self) -> str:
        """What opens a folded table; empty where it is open."""
        if self.folded or len(self.rows) <= OPEN_ROWS:
            return self.folded
        return f"Show the {len(self.rows)} rows"


@dataclass(frozen=True)
class Picture:
    """One figure, drawn for a wide and a narrow screen. `alt` says in words what it shows."""

    wide: Markup
    narrow: Markup
    caption: str
    alt: str
    kind: str = ""
    """A class for the style sheet: `map` is drawn brighter on a dark ground."""
    folded: str = ""
    """Where the figure is folded away: what opens it."""


@dataclass(frozen=True)
class TopToken:
    """One of a model's most likely tokens: visible text, probability in [0, 1], and whether it was
    the sampled one."""

    text: str
    probability: float
    sampled: bool = False


@dataclass(frozen=True)
class StrongToken:
    """One token in full: the fields of the paper's worked examples, with the text around it."""

    quadrant: str
    facts: Sequence[tuple[str, str]]
    before: str
    token: str
    after: str
    student_top: Sequence[TopToken]
    teacher_top: Sequence[TopToken]
    link: str | None = None
    from_paper: bool = False


@dataclass(frozen=True)
class StrongList:
    """A list of strong tokens under a heading."""

    title: str
    tokens: Sequence[StrongToken]
    note: str = ""
    compact: bool = False


@dataclass(frozen=True)
class Missing:
    """A part whose stage has not been run, and the command that runs it."""

    what: str
    command: str


@dataclass(frozen=True)
class Numbers:
    """Key figures: (name, value, note)."""

    entries: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Command:
    """A command line under a short label."""

    label: str
    command: str


@dataclass(frozen=True)
class Warnings:
    """What a reader must know before trusting the numbers."""

    texts: Sequence[str]


Block = Table | Picture | StrongList | Missing | Numbers | Warnings | Command


@dataclass(frozen=True)
class Part:
    """What one run has to say in a section."""

    finding: str
    blocks: Sequence[Block] = ()
    population: str = ""
    run: str = ""
    folded: str = ""
    """Where the blocks are folded away: what opens them."""


@dataclass(frozen=True)
class Section:
    """A section: its parts (one per run), and what it does and does not show."""

    key: str
    title: str
    parts: Sequence[Part]
    shows: str = ""
    shows_not: str = ""
    template: str = "section.html.j2"
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def absent(self) -> bool:
        """Whether no run has anything to show yet."""
        return bool(self.parts) and all(
            any(isinstance(block, Missing) for block in part.blocks) for part in self.parts
        )


def picture(
    draw: Callable[[float], Figure],
    *,
    key: str,
    caption: str,
    alt: str,
    kind: str = "",
    folded: str = "",
) -> Picture:
    """Draw a figure twice, for a page and for a phone.

    Args:
        draw: width in inches -> figure.
        key: unique in the page; prefixes the ids inside the SVG.
        caption: shown below.
        alt: read out in place of the figure.
        kind: a class for the style sheet.
        folded: what opens a figure that is folded away.
    """
    wide = inline_svg(draw(figures.PAGE_WIDTH), prefix=f"{key}-w", alt=alt)
    narrow = inline_svg(
        draw(figures.COLUMN_WIDTH), prefix=f"{key}-n", alt=alt, full_width=figures.COLUMN_WIDTH
    )
    return Picture(wide, narrow, caption, alt, kind, folded)


def inline_svg(
    figure: Figure, *, prefix: str, alt: str, full_width: float = figures.PAGE_WIDTH
) -> Markup:
    """The figure as an `<svg>` element: ids made unique, colours those of the reader's theme, text
    kept as text."""
    buffer = io.StringIO()
    with figures.figure_style():
        figure.savefig(buffer, format="svg", dpi=144, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    referenced = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
    svg = re.sub(
        r' id="([^"]+)"',
        lambda found: f' id="{prefix}-{found[1]}"' if found[1] in referenced else "",
        svg,
    )
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", svg)
    for color, variable in _theme_colors().items():
        svg = svg.replace(color, f"var({variable})")
    view_box = re.search(r'viewBox="[^"]+"', svg)
    share = min(100.0, 100.0 * figure.get_figwidth() / full_width)
    box = view_box[0] if view_box else ""
    head = (
        f'<svg {box} style="max-width:{share:.0f}%" role="img"'
        ' xmlns:xlink="http://www.w3.org/1999/xlink" aria-label="'
    )
    return Markup(head) + alt + Markup('"' + svg[svg.index(">", svg.index("<svg")) :])


def _theme_colors() -> dict[str, str]:
    colors = {color: f"--{name.lower()}" for name, color in figures.QUADRANT_COLORS.items()}
    return colors | {
        style.INK: "--ink",
        style.MUTED: "--soft",
        style.GRID: "--faint",
        style.SURFACE: "--figure-surface",
        style.ON_BLUE: "--on-blue",
    }


def json_block(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`: no character in it can end the element or
    begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


SCRIPTS = (
    "base.js",
    "page.js",
    "binary.js",
    "link.js",
    "grid.js",
    "tokens.js",
    "csv.js",
    "map.js",
    "table.js",
    "explore.js",
    "browser.js",
    "moves.js",
    "keys.js",
)
"""The page's script, in order: each file adds one member to `tip`, and the last starts it."""


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tip_analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sentence"] = sentence
    environment.filters["plain"] = lambda text: text.replace("*", "").replace("`", "")
    environment.tests["block"] = lambda value, kind: type(value).__name__ == kind
    return environment


def asset(name: str) -> str:
    """A file of `assets/`."""
    return files("tip_analysis.report").joinpath("assets", name).read_text("utf-8")


def render(sections: Sequence[Section], **context: Any) -> str:
    """The whole page."""
    numbers: dict[int, int] = {}
    script = "\n".join(map(asset, SCRIPTS))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            sections=sections,
            style=Markup(asset("report.css")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            json_block=json_block,
            terms=glossary.TERMS,
            headers=glossary.HEADERS,
            ident=lambda item: f"table-{numbers.setdefault(id(item), len(numbers))}",
            **context,
        )
    )
