"""What a type checker finds in a user's script that goes through the door."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("user_script.py")
REVEALED = re.compile(r'Type of "(?P<what>.*)" is "(?P<type>.*)"')


def revealed(python: str, folder: Path) -> dict[str, str]:
    """What pyright says that each expression of the script is, in a folder of its own."""
    script = shutil.copy(SCRIPT, folder / "script.py")
    command = [sys.executable, "-m", "pyright", "--pythonpath", python, str(script)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    assert ended.returncode == 0, ended.stdout
    return {found["what"]: found["type"] for found in REVEALED.finditer(ended.stdout)}


def check_types(types: dict[str, str]) -> None:
    """Every expression has a type that is known."""
    asked = SCRIPT.read_text("utf-8").count("reveal_type(")
    assert len(types) == asked >= 40
    assert not {what: found for what, found in types.items() if "Unknown" in found}
    assert types["tokens"] == "LazyFrame"
    assert types["tip.proposition_2(masks, tokens.collect())"] == "DataFrame"
    assert types['tip.score(run, teacher="arithmetic-teacher")'] == "StageSummary"


def test_pyright_knows_every_type_that_a_users_script_meets(tmp_path: Path) -> None:
    check_types(revealed(sys.executable, tmp_path))
