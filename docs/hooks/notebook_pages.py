"""The notebooks as pages: prose, code, and the outputs and figures that are stored with them."""

import base64
import re
from pathlib import Path
from typing import Any

import nbformat

DISPLAY_MATH = re.compile(r"\$([^$\n]+)\$")


def pages(folder: Path) -> dict[str, str | bytes]:
    """Site path -> content, for each notebook and each of its figures."""
    made: dict[str, str | bytes] = {}
    for path in sorted(folder.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        figures: list[bytes] = []
        text = "\n\n".join(_cell(cell, path.stem, figures) for cell in notebook.cells)
        made[f"notebooks/{path.stem}.md"] = text + "\n"
        for number, figure in enumerate(figures, start=1):
            made[f"notebooks/{path.stem}_{number}.png"] = figure
    return made


def _cell(cell: Any, stem: str, figures: list[bytes]) -> str:
    if cell.cell_type == "markdown":
        return plain_math(cell.source)
    outputs = [_output(output, stem, figures) for output in cell.get("outputs", [])]
    return "\n\n".join([f"```python\n{cell.source}\n```", *filter(None, outputs)])


def _output(output: Any, stem: str, figures: list[bytes]) -> str:
    if output.output_type == "stream":
        return f"```text\n{output.text}\n```"
    data = output.get("data", {})
    if "image/png" in data:
        figures.append(base64.b64decode(data["image/png"]))
        return f"![Figure {len(figures)} of this notebook]({stem}_{len(figures)}.png)"
    if "text/html" in data:
        html = re.sub(r"\n\s*\n", "\n", data["text/html"])  # an empty line would end the block
        return f'<div class="notebook-output">\n{html}\n</div>'
    return f"```text\n{data.get('text/plain', '')}\n```"


WORDS = {
    r"\mathrm{fwd}": "fwd",
    r"\varphi": "φ",
    r"\delta": "δ",
    r"\nabla_\theta": "∇θ",
    r"\nabla": "∇",
    r"\theta": "θ",
    r"\hat h": "ĥ",
    r"\hat\delta": "δ̂",
    r"\rho": "ρ",
    r"\eta": "η",
    r"\beta": "β",
    r"\ell": "ℓ",
    r"\langle": "⟨",
    r"\rangle": "⟩",
    r"\mathrm{KL}": "KL",
    r"\mathbb{E}": "E",
    r"\ln": "ln ",
    r"\lfloor": "⌊",
    r"\rfloor": "⌋",
    r"\max": "max",
    r"\sum": "Σ",
    r"\cdot": "·",
    r"\mid": " | ",
    r"\in": "∈",
    r"\|": "‖",
    r"\,": "",
    r"\ ": " ",
}
"""TeX that the notebooks use, as text: a page needs no typesetting library."""


def plain_math(text: str) -> str:
    """Markdown whose formulas are italic text with sub- and superscripts."""
    return DISPLAY_MATH.sub(lambda found: f"<i>{_formula(found[1])}</i>", text)


def _formula(tex: str) -> str:
    tex = re.sub(r"\\sqrt\{([^{}]*)\}", r"√(\1)", tex)
    tex = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1 / \2)", tex)
    for name in sorted(WORDS, key=len, reverse=True):  # a longer name may begin with a shorter one
        tex = tex.replace(name, WORDS[name])
    tex = re.sub(r"_\{([^{}]*)\}|_(\w)", lambda m: f"<sub>{m[1] or m[2]}</sub>", tex)
    tex = re.sub(r"\^\{([^{}]*)\}|\^(\w|\*)", lambda m: f"<sup>{m[1] or m[2]}</sup>", tex)
    if "\\" in tex:
        raise ValueError(f"a formula has TeX that plain_math does not know: {tex}")
    return re.sub(r"[{}]", "", tex).replace("|", "&#124;").replace("*", "&#42;")
