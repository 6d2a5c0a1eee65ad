"""The package as strangers meet it: a wheel, installed into environments of their own.

Marked `install` and run by `make test-install`: the first environment is filled from the package
index, which takes a minute or two; the second borrows this environment's packages.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import synthetic
from test_user_types import check_types, revealed

pytestmark = [pytest.mark.install, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[1]


def run_in(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, who has no checkout on the path."""
    surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    arguments = [str(part) for part in command]
    return subprocess.run(
        arguments, check=False, capture_output=True, text=True, cwd=folder, env=surroundings
    )


def must(folder: Path, *command: object) -> str:
    ended = run_in(folder, *command)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return ended.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    must(folder, sys.executable, "-m", "pip", *build)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds a plain installation and no more."""
    folder = tmp_path_factory.mktemp("plain")
    venv.create(folder, with_pip=True)
    must(folder, folder / "bin" / "pip", "install", "--quiet", wheel)
    return folder / "bin"


@pytest.fixture(scope="session")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with every extra: its packages are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("full")
    venv.create(folder, with_pip=True)
    must(folder, folder / "bin" / "pip", "install", "--quiet", "--no-deps", wheel)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return folder / "bin"


def test_a_plain_installation_brings_no_torch_and_the_data(plain: Path, tmp_path: Path) -> None:
    listed = must(tmp_path, plain / "pip", "list", "--format", "freeze").lower()
    names = {line.partition("==")[0] for line in listed.splitlines()}
    assert "tip-analysis" in names
    assert not names & {"torch", "transformers", "numba", "datasets", "peft", "accelerate"}
    place = must(
        tmp_path, plain / "python", "-c", "import tip_analysis; print(tip_analysis.__file__)"
    )
    package = Path(place.strip()).parent
    assert package.is_relative_to(plain.parent)
    assert (package / "py.typed").is_file()
    assert (package / "core" / "data" / "tip_paper_results.csv").is_file()
    assert (package / "analysis" / "__init__.pyi").is_file()


def test_a_plain_installation_analyses_draws_and_reports(plain: Path, tmp_path: Path) -> None:
    synthetic.write_run(tmp_path / "made", synthetic.make_tables())
    shutil.copytree(tmp_path / "made", tmp_path / "copied")
    shutil.rmtree(tmp_path / "made")
    script = """
import sys, tip_analysis as tip
run = tip.open_run("copied")
tokens = tip.add_scores(run.tokens())
quads = tip.assign_quadrants(tokens, entropy_cut="median", divergence_cut="mean").collect()
shares = tip.quadrant_shares(quads)
grid = tip.cut_sensitivity(run.tokens())
figure = tip.figures.cut_sensitivity(grid, entropy_cut=0.3, divergence_cut=0.5)
tip.figures.save_figure(figure, "map.svg")
assert "<table" in tip.show_quadrants(run)._repr_html_()
assert "torch" not in sys.modules
print(shares["share"].sum())
"""
    share = must(tmp_path, plain / "python", "-c", script).strip()
    assert float(share) == pytest.approx(1)
    assert (tmp_path / "map.svg").stat().st_size > 1000
    page = ("copied", "-o", "page.html")
    must(tmp_path, plain / "python", "-m", "tip_analysis.report", *page)
    assert "which tokens matter" in (tmp_path / "page.html").read_text("utf-8").lower()
    must(tmp_path, plain / "tip-analysis", "select", "copied", "--rules", "soft_or")


def test_a_plain_installation_says_which_extra_a_rollout_needs(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "problems.jsonl").write_text('{"problem": "12+34+56=", "answer": "102"}\n')
    asked = ("runs/x", "--student", "arithmetic-student", "--prompts", "problems.jsonl")
    ended = run_in(tmp_path, plain / "tip-analysis", "rollout", *asked)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert 'pip install "tip-analysis[models]"' in ended.stderr


def test_the_demo_runs_from_a_wheel_in_an_empty_folder(full: Path, tmp_path: Path) -> None:
    place = must(
        tmp_path, full / "python", "-c", "import tip_analysis; print(tip_analysis.__file__)"
    )
    assert Path(place.strip()).is_relative_to(full.parent)
    must(tmp_path, full / "tip-analysis", "demo", "--num-prompts", 12, "--out", "runs/demo")
    assert (tmp_path / "reports" / "demo.html").is_file()
    assert "score" in must(tmp_path, full / "tip-analysis", "status", "runs/demo")


def test_a_type_checker_finds_the_types_of_the_wheel(full: Path, tmp_path: Path) -> None:
    check_types(revealed(str(full / "python"), tmp_path))
