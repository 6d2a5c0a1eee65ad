"""The parts of README.md that are made from the code: `python tests/readme_parts.py` (or `make
docs`) writes them anew."""

import re
from pathlib import Path

import polars as pl

from tip_analysis.core.schema import TokenTable

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def column_table() -> str:
    """The columns of the token table in Markdown."""
    rows = ["| column | type | meaning |", "| --- | --- | --- |"]
    for name, column in TokenTable.columns().items():
        rows.append(
            f"| `{name}` | {_type(column.dtype)} | {column.description} |".replace("‖", "‖")
        )
    return "\n".join(rows)


def _type(dtype: pl.DataType) -> str:
    names = {pl.String: "str", pl.Boolean: "bool", pl.Int32: "int32", pl.Float32: "float32"}
    if isinstance(dtype, pl.List):
        return f"list of {_type(dtype.inner)}"  # pyright: ignore[reportArgumentType]
    return "str" if isinstance(dtype, pl.Enum) else names[type(dtype)]


def with_columns(text: str) -> str:
    """README text with the column table as the code has it."""
    return re.sub(
        r"(?s)(<!-- columns.*?-->\n).*?(<!-- end of columns -->)",
        lambda m: m[1] + column_table() + "\n" + m[2],
        text,
    )


def listed_files(text: str) -> set[str]:
    """Paths that the README's tree names: folders end with a slash, and what is indented lies in
    the folder above."""
    tree = re.search(r"(?s)## The tree\n\n```\n(.*?)```", text)
    assert tree, "README.md has no tree"
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
    README.write_text(with_columns(README.read_text("utf-8")), "utf-8")
