"""What the site has besides the pages in docs/: pages made from the code, the notebooks and the
files at the repository's root. MkDocs calls the functions named `on_…` while it builds.
"""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import command_pages  # noqa: E402
import notebook_pages  # noqa: E402
import python_pages  # noqa: E402

PICTURES = ("quadrant_map.png", "token_browser.png")
"""Pictures in reports/ that pages show."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made now."""
    made: dict[str, str | bytes] = {
        "reference/commands.md": command_pages.commands_page(),
        "reference/python.md": python_pages.python_page(),
        "contributing.md": from_root("CONTRIBUTING.md"),
        "changelog.md": from_root("CHANGELOG.md"),
    }
    made |= notebook_pages.pages(ROOT / "notebooks")
    made |= {f"pictures/{name}": (ROOT / "reports" / name).read_bytes() for name in PICTURES}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def from_root(name: str) -> str:
    """A page at the repository's root, its links to docs/ and notebooks/ as the site has them."""
    text = (ROOT / name).read_text("utf-8")
    return re.sub(r"\]\((?:docs/)?([^):]+?)\.ipynb\)", r"](\1.md)", text.replace("](docs/", "]("))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page to files outside docs/, which are right on disk, as the site has them."""
    up = "../" * page.file.src_uri.count("/")
    moved = {
        f"]({up}../notebooks/": f"]({up}notebooks/",
        f"]({up}../reports/": f"]({up}pictures/",
        f"]({up}../CONTRIBUTING.md": f"]({up}contributing.md",
        f"]({up}../CHANGELOG.md": f"]({up}changelog.md",
    }
    for written, served in moved.items():
        markdown = markdown.replace(written, served)
    return re.sub(r"(\]\([^)]*notebooks/[^)]*)\.ipynb", r"\1.md", markdown)


def on_post_build(config: Any) -> None:
    """Keep the search index as a script too, so that search works on pages opened from the disk."""
    folder = Path(config["site_dir"]) / "search"
    index = (folder / "search_index.json").read_text("utf-8")
    (folder / "search_index.js").write_text(f"var __index = {index}", "utf-8")


OUTSIDE = re.compile(r'(?:\bsrc|<link[^>]*\bhref)="(?:https?:)?//[^"]*"')


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that fetches anything from elsewhere when it is opened."""
    if found := OUTSIDE.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from outside: {found[0]}")
    return output
