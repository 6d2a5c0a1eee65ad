"""README and docs: short, true where they name the code, and whole where they link."""

import re
import subprocess
from pathlib import Path

import pytest
from docs_parts import DOCS, PARTS, README, ROOT, TREE, draw_gallery, listed_files, with_part

from tip_analysis.analysis.rules import rule_names
from tip_analysis.cli import registry
from tip_analysis.figures.door import FIGURES

PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 120


@pytest.mark.parametrize("name", PARTS)
def test_generated_parts_are_those_of_the_code(name):
    page, make = PARTS[name]
    text = page.read_text("utf-8")
    assert with_part(text, name, make()) == text, "run `make docs`"


def test_the_column_tables_hold_what_readers_look_for():
    text = PARTS["columns"][0].read_text("utf-8")
    assert "| `reverse_kl` | float32 | δ_t = KL(P_S ‖ P_T)" in text
    assert "| `student_topk_ids` | list of int32 |" in text
    assert "| `grad_norm_sq` | float64 |" in text


def tracked_modules() -> list[str]:
    """Modules that git knows, without `__init__`."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        path
        for path in listed
        if re.fullmatch(r"tip_analysis/.+\.py", path) and "__init__" not in path
    ]


def test_the_tree_is_true():
    listed = listed_files(TREE.read_text("utf-8"))
    missing = [path for path in listed if not (ROOT / path.removesuffix("/*")).exists()]
    assert not missing, f"the tree names what is not there: {missing}"
    unlisted = [
        path
        for path in tracked_modules()
        if path not in listed and path.rsplit("/", 1)[0] + "/*" not in listed
    ]
    assert not unlisted, f"the tree lacks {unlisted}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        if "://" in target or target in MADE_BY_THE_SITE or "/notebooks/0" in target:
            continue
        assert (page.parent / target).exists(), target


MADE_BY_THE_SITE = ("reference/commands.md", "commands.md", "../reference/commands.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_options_and_rules_that_are_named_exist(page):
    text = page.read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z0-9-]+)|^make ([a-z0-9-]+)", text, re.MULTILINE):
        assert f"\n{''.join(target)}:" in makefile, target
    for rule in re.findall(r'rule="(\w+)"', text):
        assert rule in {*rule_names(), "sure_teacher"}
    written = re.findall(r"tip-analysis ([\w-]+)((?: [^\n`]*)?)", text)
    for command, rest in written:
        if command in COMMANDS:
            known = COMMANDS[command]
            for option in re.findall(r"(?<!\S)--([a-z][a-z-]*)", rest):
                assert option in known, f"{command} has no --{option}"


def _options_of(command: type) -> set[str]:
    """What a command's dataclass, and those that it holds, call their fields as options."""
    found: set[str] = {"help"}
    for name, field in command.__dataclass_fields__.items():
        made = field.default_factory
        nested = made if isinstance(made, type) and hasattr(made, "__dataclass_fields__") else None
        found |= _options_of(nested) if nested else {name.strip("_").replace("_", "-")}
    return found


COMMANDS = {name: _options_of(kind) for name, kind in registry.COMMANDS.items()}
"""Options of each command."""


def test_a_stale_part_is_noticed():
    page, make = PARTS["columns"]
    text = page.read_text("utf-8").replace("| `reverse_kl` |", "| `kl` |")
    assert with_part(text, "columns", make()) != text


def test_every_figure_of_the_gallery_has_its_image():
    page = (DOCS / "gallery.md").read_text("utf-8")
    images = {path.name for path in (DOCS / "gallery").iterdir()}
    assert images == {f"{name}.svg" for name in FIGURES}
    assert images == set(re.findall(r"\(gallery/([a-z_]+\.svg)\)", page))
    assert all((DOCS / "gallery" / name).stat().st_size < 250_000 for name in images)


@pytest.mark.slow
def test_images_of_the_gallery_are_those_drawn_now(tmp_path):
    draw_gallery(tmp_path)
    for path in (DOCS / "gallery").iterdir():
        assert path.read_text("utf-8") == (tmp_path / path.name).read_text("utf-8"), path.name
