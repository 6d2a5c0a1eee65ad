"""The parts of docs/ that are made from the code and the benchmarks' results: `make docs` (or
`python tests/docs_parts.py`) writes them again.

A part stands between `<!-- generated: NAME -->` and `<!-- end of generated -->`; the rest of a page
is written by hand.
"""

import importlib.util
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dataframely as dy
import polars as pl

from tip_analysis.analysis.rules import RULES
from tip_analysis.core.schema import TABLES
from tip_analysis.figures.door import FIGURES
from tip_analysis.report.glossary import TERMS, Term
from tip_analysis.rollouts.importers.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
TREE = DOCS / "reference" / "tree.md"


def columns() -> str:
    """Every table with its columns, in Markdown."""
    return "\n".join(_table(name, schema) for name, schema in TABLES.items())


def _table(name: str, schema: type[dy.Schema]) -> str:
    purpose = " ".join((schema.__doc__ or "").split())
    head = [f"## {name}", "", purpose, "", "| column | type | meaning |", "| --- | --- | --- |"]
    rows = (
        f"| `{column}` | {_type(kind.dtype)} | {_cell(kind.description or '')} |"
        for column, kind in schema.columns().items()
    )
    return "\n".join([*head, *rows, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(dtype: pl.DataType) -> str:
    if isinstance(dtype, pl.List):
        return f"list of {_type(dtype.inner)}"  # pyright: ignore[reportArgumentType]
    named = {"String": "str", "Boolean": "bool", "Enum": "str"}
    name = type(dtype).__name__
    return named.get(name, name.lower())


def rules() -> str:
    """The rules that ship, in Markdown."""
    head = ["| rule | sampled | what it selects |", "| --- | --- | --- |"]
    rows = (
        f"| `{rule.name}` | {'yes' if rule.sampled else ''} | {rule.description} |"
        for rule in RULES.values()
    )
    return "\n".join([*head, *rows])


def formats() -> str:
    """The formats that can be imported, in Markdown."""
    head = ["| `--from` | reads | files of a folder |", "| --- | --- | --- |"]
    rows = (
        f"| `{name}` | {form.description} | `{form.pattern}` |" for name, form in FORMATS.items()
    )
    return "\n".join([*head, *rows])


def _summary() -> Any:
    spec = importlib.util.spec_from_file_location("summary", ROOT / "benchmarks" / "summary.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmarks() -> str:
    """The measured ratios, in Markdown."""
    return _summary().table()


def engines() -> str:
    """Tokens a second of the engines that write rollouts, in Markdown."""
    return _summary().engines_table()


def approximate() -> str:
    """What a teacher's top k costs in accuracy, in Markdown."""
    return _summary().approximate_table()


def glossary() -> str:
    """The words of the page and of the documentation, in Markdown."""
    head = ["| word | meaning |", "| --- | --- |"]
    return "\n".join([*head, *map(_term, TERMS)])


def _term(term: Term) -> str:
    columns = ", ".join(f"`{column}`" for column in term.columns)
    name = f"**{_cell(term.name)}**" + (f" ({columns})" if columns else "")
    return f"| {name} | {_cell(term.meaning)} |"


def gallery() -> str:
    """Every figure of a run, with the line that draws it, in Markdown."""
    return "\n".join(_figure(name) for name in FIGURES)


def _figure(name: str) -> str:
    first = (FIGURES[name].__doc__ or "").split("\n\n")[0]
    said = " ".join(first.split())
    code = f'```python\ntip.figures.{name}("runs/demo")\n```'
    return f"## {name}\n\n{said}\n\n{code}\n\n![{name}](gallery/{name}.svg)\n"


def draw_gallery(folder: Path) -> None:
    """The images of the gallery, from a synthetic run."""
    from synthetic import (
        make_ablations,
        make_dynamics,
        make_tables,
        write_ablations,
        write_dynamics,
        write_run,
    )

    from tip_analysis.figures import save_figure

    with tempfile.TemporaryDirectory() as place:
        run, arms = write_run(Path(place) / "synthetic", make_tables()), make_ablations()
        write_ablations(run, arms)
        write_dynamics(run, make_dynamics(arms))
        folder.mkdir(exist_ok=True)
        for name, draw in FIGURES.items():
            save_figure(draw(run), folder / f"{name}.svg", dpi=100)


PARTS: dict[str, tuple[Path, Callable[[], str]]] = {
    "columns": (DOCS / "reference" / "columns.md", columns),
    "benchmarks": (DOCS / "reference" / "benchmarks.md", benchmarks),
    "engines": (DOCS / "how_to" / "vllm.md", engines),
    "rules": (DOCS / "concepts" / "scores.md", rules),
    "glossary": (DOCS / "reference" / "glossary.md", glossary),
    "gallery": (DOCS / "gallery.md", gallery),
    "formats": (DOCS / "how_to" / "import_rollouts.md", formats),
}
"""Name of a generated part, the page that holds it, and what makes it."""


def with_part(text: str, name: str, content: str) -> str:
    """A page with its part `name` as it should be."""
    pattern = rf"(?s)(<!-- generated: {name} -->\n).*?(<!-- end of generated -->)"
    assert re.search(pattern, text), f"the page has no generated part {name}"
    return re.sub(pattern, lambda found: found[1] + content + "\n" + found[2], text)


def listed_files(text: str) -> set[str]:
    """Paths that the tree names: folders end with a slash, and what is indented lies in the folder
    above."""
    tree = re.search(r"(?s)```\n(.*?)```", text)
    assert tree, "the page has no tree"
    found, folders = set(), []
    for line in tree[1].splitlines():
        name = line.strip().split(" ", maxsplit=1)[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        found.add("/".join([*folders, name.rstrip("/")]))
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return found


if __name__ == "__main__":
    for name, (page, make) in PARTS.items():
        page.write_text(with_part(page.read_text("utf-8"), name, make()), "utf-8")
    draw_gallery(DOCS / "gallery")
