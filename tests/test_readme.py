import re
import subprocess

from readme_parts import README, ROOT, listed_files, with_columns

from tip_analysis.analysis.selection import rule_names


def test_the_column_table_is_that_of_the_code():
    text = README.read_text("utf-8")
    assert with_columns(text) == text, "run `make docs`"
    assert "`reverse_kl` | float32 | δ_t" in text


def test_the_tree_is_true():
    listed = listed_files(README.read_text("utf-8"))
    missing = [path for path in listed if not (ROOT / path.removesuffix("/*")).exists()]
    assert not missing, f"the tree names what is not there: {missing}"
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    modules = [
        path
        for path in tracked
        if re.fullmatch(r"tip_analysis/[^/]+(/[^/]+)?\.py", path) and "__init__" not in path
    ]
    unlisted = [
        path
        for path in modules
        if path not in listed and path.rsplit("/", 1)[0] + "/*" not in listed
    ]
    assert not unlisted, f"the tree lacks {unlisted}"


def test_commands_and_rules_that_are_named_exist():
    text = README.read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z0-9-]+)", text):
        assert f"\n{target}:" in makefile, target
    for rule in re.findall(r'rule="(\w+)"', text):
        assert rule in rule_names()
