"""The notebooks: tidy as they are stored, with outputs that are current, and right when run from a
fresh kernel.

Each is run as it stands on a small run, with one more cell that checks what it computed against
another way of getting there.
"""

import ast
import json
from pathlib import Path

import pytest
from notebook_outputs import differences, execute, picture_differs, stored_form, text_differs

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra [notebooks]")

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ("01_quadrants", "02_gradient_norms", "03_selection_and_ablations", "04_your_own_models")
MAX_CODE_LINES = 40
MAX_OUTPUT_BYTES = 200_000

FIGURES = {
    "01_quadrants": 3,
    "02_gradient_norms": 2,
    "03_selection_and_ablations": 6,
    "04_your_own_models": 1,
}
"""Pictures that each notebook draws."""

CHECKS = {
    "01_quadrants": """
        import sys
        placed = quads.filter("loss_mask").collect()
        high_entropy, high_divergence = placed["student_entropy"] > 0.3, placed["reverse_kl"] > 0.5
        num_q3 = (~high_entropy & high_divergence).sum()
        assert abs(summary.share("Q3") - num_q3 / placed.height) < 1e-12
        for name in ("Q1", "Q2", "Q3", "Q4"):
            assert abs(by_quadrant[name] - summary.share(name)) < 1e-12
        assert (table["share_low"] <= table["share"]).all()
        assert (table["share"] <= table["share_high"]).all()
        at_cuts = grid.filter(entropy_spec="0.3", divergence_spec="0.5")
        assert abs(at_cuts["Q3"].item() - summary.share("Q3")) < 1e-12
        least = {"q3_recall": 0.9, "q3_precision": 0.8, "auc": 0.95}
        assert all(found[name].item() > bound for name, bound in least.items())
        assert "torch" not in sys.modules
    """,
    "02_gradient_norms": """
        rows = measured["reverse_kl"].collect()
        largest = (2 / 16) ** 0.5 * rows["grad_norm_sq"] * (1 + 1e-6)
        assert (rows["grad_norm_sq_se"] <= largest).all()
        for loss in measured:
            shares = energy.filter(loss=loss, quantity="grad_norm_sq")["share"]
            assert abs(shares.sum() - 1) < 1e-9
        listed = profile.select("loss", "measure", "quadrant", "value").rows()
        mean = {row[:3]: row[3] for row in listed}
        strong = mean["reverse_kl", "mean divergence, nats", "Q3"]
        assert strong > 5, "planted errors disagree strongly"
        saturated, open_ = (mean[loss, "mean ‖g‖²", "Q3"] for loss in ("reverse_kl", "forward_kl"))
        why = "softmax saturation: the same tokens pull far less under the reverse KL"
        assert open_ > 10 * saturated, why
        assert rows.filter(rollout_id=loudest)["grad_norm_sq"].max() == rows["grad_norm_sq"].max()
    """,
    "03_selection_and_ablations": """
        sizes = scored.group_by("rollout_id").len()["len"]
        for ratio, tenths in ((0.1, 1), (0.2, 2), (0.5, 5)):
            counts = masks.filter(retention_ratio=ratio)["rule"].value_counts()["count"]
            kept = counts.unique().to_list()
            assert kept == [sum(max(1, size * tenths // 10) for size in sizes)]
        of_q3 = made_of.filter(retention_ratio=0.1, quadrant="Q3")
        share = lambda rule: of_q3.filter(rule=rule)["share"].item()
        assert share("entropy") == 0 < share("random") < share("q3")
        found = dict(missed.filter(retention_ratio=0.2).select("rule", "recall").rows())
        assert found["entropy"] == 0 and found["q3"] == 1
        rows = arms.select("rule", "retention_ratio", "accuracy").rows()
        accuracy = {(rule, ratio): value for rule, ratio, value in rows}
        assert ("untrained", 1.0) in accuracy
        effect = judged.filter(claim="c")["effect"].item()
        assert abs(effect - (accuracy["q3", 0.1] - accuracy["all", 1.0])) < 1e-6
        verdict = judged.filter(claim="c")["verdict"].item()
        assert verdict == "not resolved", "one seed resolves nothing"
        assert paper.height >= 10
    """,
    "04_your_own_models": """
        rows = kept.collect()
        sizes = rows.group_by("rollout_id").len()["len"]
        assert rows["selected"].sum() == sum(max(1, size // 10) for size in sizes)
        assert rows["prompt_id"].n_unique() == 16 and rows["rollout_id"].n_unique() == 64
        name = pl.col("quadrant").cast(pl.String)
        share = dict(by_quadrant.collect().select(name, "share").rows())
        assert share["Q3"] > 0.5 > share["Q4"], "the rule takes disagreement"
        total = shares.group_by("run").agg(pl.col("share").sum())
        assert (abs(total["share"] - 1) < 1e-12).all() and total.height == 2
        mean = pl.col("student_entropy").mean()
        entropy = {
            name: run.tokens().select(mean).collect().item() for name, run in runs.items()
        }
        assert entropy["mine"] > entropy["built-in"], "smaller weights, flatter distributions"
        assert set(runs["mine"].rollouts().collect()["reward"]) == {0.0, 1.0}
    """,
}
"""What is checked in the notebook's own kernel, after its last cell."""


def stored(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def python_of(source: str) -> str:
    """A cell without its magics."""
    return "\n".join(line for line in source.splitlines() if not line.startswith("%"))


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES) == sorted(CHECKS)


@pytest.mark.parametrize("name", NAMES)
def test_is_short_and_mostly_prose(name):
    notebook = stored(name)
    lines = [
        line
        for source in code_cells(notebook)
        for line in source.splitlines()
        if line.strip() and line.strip()[0] != "#"
    ]
    assert len(lines) < MAX_CODE_LINES
    assert max(len(line) for line in lines) <= 128
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert len(prose) > 1.2 * sum(map(len, lines))
    assert "Eq. " in prose or name == "04_your_own_models"


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_in_one_stable_form(name):
    path = FOLDER / f"{name}.ipynb"
    notebook = stored(name)
    nbformat.validate(notebook)
    assert path.read_text("utf-8") == nbformat.writes(notebook) + "\n"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1)), "make notebooks"
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert all(len(json.dumps(cell.outputs)) < MAX_OUTPUT_BYTES for cell in ran)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_show_figures_and_name_no_folder_of_a_machine(name):
    outputs = [output for cell in stored(name).cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == FIGURES[name]
    assert not any(output.output_type == "error" for output in outputs)
    text = json.dumps([{**output, "data": _texts(output)} for output in outputs])
    assert "/tmp" not in text
    assert str(Path.home()) not in text


def _texts(output) -> dict[str, str]:
    return {kind: part for kind, part in output.get("data", {}).items() if kind != "image/png"}


@pytest.mark.parametrize("name", NAMES)
def test_needs_no_import_of_the_package_but_its_door(name):
    """`import tip_analysis as tip` is enough, and each `tip.NAME` is there: a renamed function is
    found without running anything."""
    import tip_analysis as tip

    for source in code_cells(stored(name)):
        for node in ast.walk(ast.parse(python_of(source))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("tip_analysis"), ast.unparse(node)
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("tip_analysis.") for alias in node.names)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tip":
                assert node.attr in tip.__all__, ast.unparse(node)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    from tip_analysis.demo.example import make_small_run

    return make_small_run(tmp_path_factory.mktemp("notebooks") / "runs" / "small").path


@pytest.mark.parametrize("name", NAMES)
def test_runs_computes_what_it_says_and_shows_what_is_stored(name, small_run):
    pytest.importorskip("nbclient", reason="running notebooks needs the extra [notebooks]")
    notebook = stored(name)
    check = "\n".join(line.removeprefix("        ") for line in CHECKS[name].splitlines())
    notebook.cells.append(nbformat.v4.new_code_cell(f"{check}\nprint('checked')"))
    folder = small_run.parent.parent
    ran = stored_form(execute(notebook, folder, small_run), folder)
    assert ran.cells.pop().outputs[-1]["text"] == "checked\n"
    assert not list(differences(stored(name), ran)), "run `make notebooks`"
    shown = [
        output.data["text/html"]
        for cell in ran.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    assert any("tip-tokens" in html for html in shown) or name == "03_selection_and_ablations"


def test_stale_outputs_are_noticed():
    """Another number, another word, another picture, a missing output; not another time."""
    notebook = stored("01_quadrants")
    assert not list(differences(notebook, stored("01_quadrants")))
    for change in (
        lambda text: text.replace("1.803115", "1.903115"),
        lambda text: text.replace("planted_label", "label"),
    ):
        edited = nbformat.reads(change(nbformat.writes(notebook)), as_version=4)
        assert list(differences(notebook, edited))
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    first, second = (output.data["image/png"] for output in pictures[:2])
    assert picture_differs(first, second)
    assert not picture_differs(first, first)
    edited = stored("01_quadrants")
    next(cell for cell in edited.cells if cell.get("outputs")).outputs.clear()
    assert list(differences(notebook, edited))
    row = "<tr><td>score</td><td class=tip-n>3,564</td><td class=tip-n>{}</td></tr>"
    assert not text_differs(row.format("1.20"), row.format("99.0"))
    assert text_differs(row.format("1.20"), row.format("1.20").replace("3,564", "3,565"))
    assert not text_differs("share 0.51832", "share 0.51833")
    assert text_differs("share 0.51832", "share 0.53")


def test_example_run_takes_what_is_named_then_the_demo(small_run, tmp_path, monkeypatch):
    from tip_analysis.demo.example import example_run

    monkeypatch.setenv("TIP_RUN", str(small_run))
    assert example_run().path == small_run
    monkeypatch.delenv("TIP_RUN")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(small_run)
    (tmp_path / "notebooks").mkdir()
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        assert example_run().path == tmp_path / "runs" / "demo"


def test_example_run_makes_a_run_once_where_there_is_none(tmp_path, monkeypatch, capsys):
    from tip_analysis.demo import example as module

    monkeypatch.delenv("TIP_RUN", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_made", [])
    monkeypatch.setattr(module, "make_small_run", module.create_run)
    first = module.example_run()
    assert first is module.example_run()
    assert first.record_path.is_file()
    module._made[0][0].cleanup()
    assert capsys.readouterr().out.count("make demo") == 1
