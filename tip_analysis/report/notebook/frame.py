"""What all displays share: the frame with its style, tables, swatches and terminal styles."""

from collections.abc import Iterable, Sequence

from rich.style import Style

from tip_analysis.figures.style import ON_BLUE, ON_LIGHT, QUADRANT_COLORS

SCALE_COLOR = "#7c3a96"
"""The far end of the colour scale of a score, as in the report."""
OPACITY = {"Q1": 0.30, "Q2": 0.22, "Q3": 0.34}
"""How strongly a token's ground takes its quadrant's colour, as in the report; Q4 has none."""


def rgb(color: str) -> str:
    """`#0072b2` as `0 114 178`."""
    return " ".join(str(int(color[index : index + 2], 16)) for index in (1, 3, 5))


_BORDERS = {"Q1": "2px solid", "Q2": "2px dotted", "Q3": "3px solid"}
_STYLE = "".join(
    [
        ".tip-view{line-height:1.5;max-width:60em}.tip-view small{opacity:.75}",
        ".tip-view table{border-collapse:collapse;margin:.5em 0}",
        ".tip-view th,.tip-view td{text-align:left;padding:.15em .9em .15em 0;background:none}",
        ".tip-view .tip-n{text-align:right}",
        ".tip-tokens{font-family:monospace;line-height:2;margin:.5em 0}",
        ".tip-tokens{white-space:pre-wrap;overflow-wrap:anywhere}",
        ".tip-t{border-radius:3px;padding:.16em 0;border-bottom:2px solid transparent}",
        ".tip-apart .tip-t{unicode-bidi:isolate}",
        ".tip-q0{opacity:.65;font-style:italic}.tip-Q3{font-weight:700}",
        *(
            f".tip-{name}{{background:rgb({rgb(QUADRANT_COLORS[name])} / {OPACITY[name]});"
            f"border-bottom:{border} {QUADRANT_COLORS[name]}}}"
            for name, border in _BORDERS.items()
        ),
        ".tip-bar{display:flex;height:1.1em;max-width:30em;border-radius:3px;overflow:hidden}",
        (
            ".tip-swatch{display:inline-block;width:.75em;height:.75em;border-radius:3px;"
            "margin-right:.4em}"
        ),
        ".tip-prompt pre{white-space:pre-wrap;overflow-wrap:anywhere}",
        ".tip-prompt pre{max-height:16em;overflow-y:auto}",
    ]
)


def framed(*parts: str) -> str:
    """One output; formulas inside tokens are not to be typeset, so MathJax is told to keep out."""
    return (
        '<div class="tip-view tex2jax_ignore'
        f' mathjax_ignore"><style>{_STYLE}</style>{"".join(parts)}</div>'
    )


def table_html(
    header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()
) -> str:
    """Cells are HTML already."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (
            f"<{tag}{' class=tip-n' * (index in numeric)}>{cell}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"


def swatch(quadrant: str) -> str:
    """A quadrant's colour beside its name."""
    return (
        f'<span class="tip-swatch" style="background:{QUADRANT_COLORS[quadrant]}"></span>{quadrant}'
    )


def terminal_style(quadrant: str | None) -> Style:
    """Colours of the page; Q3 stands out without colour too."""
    if quadrant is None:
        return Style(dim=True, italic=True)
    if quadrant == "Q4":
        return Style()
    ink = ON_BLUE if quadrant == "Q1" else ON_LIGHT
    strong = True if quadrant == "Q3" else None
    return Style(color=ink, bgcolor=QUADRANT_COLORS[quadrant], bold=strong, underline=strong)


def terminal_ramp(strength: float | None) -> Style:
    """A score's colour at a place in [0, 1] on its scale; dim where there is no value."""
    if strength is None:
        return Style(dim=True)
    pale, dark = (250, 247, 251), tuple(int(part) for part in rgb(SCALE_COLOR).split())
    red, green, blue = (round(a + strength * (b - a)) for a, b in zip(pale, dark, strict=True))
    return Style(
        color=ON_BLUE if strength > 0.55 else ON_LIGHT, bgcolor=f"rgb({red},{green},{blue})"
    )
