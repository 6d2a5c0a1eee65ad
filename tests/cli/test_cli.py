"""The commands as a user types them: what is refused, in which words, and what a small run gives
from end to end."""

import ast
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from tiny_models import tiny_model

from tip_analysis.analysis.quadrants import quadrant_shares
from tip_analysis.cli import commands
from tip_analysis.cli import main as cli
from tip_analysis.core.errors import OptionError
from tip_analysis.core.run_folder import open_run
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.demo.arithmetic.tokenizer import build_tokenizer


def tip(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        tip(*arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "problems.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in problems(6, seed=3)))
    return file


@pytest.fixture(scope="module")
def run(prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "cli"
    tip(
        "rollout",
        folder,
        "--student",
        "arithmetic-student",
        "--prompts",
        prompts,
        "--max-new-tokens",
        100,
        "--num-rollouts",
        2,
    )
    tip("score", folder, "--teacher", "arithmetic-teacher", "--shard-size", 4)
    return folder


def test_a_run_from_end_to_end(run, tmp_path, capsys):
    tip("select", run, "--rules", "soft_or", "q3", "random", "--ratios", 0.1, 0.5, "--seeds", 0, 1)
    tip("gradients", run, "--num-probes", 4, "--limit", 4, "--loss", "reverse_kl")
    tip("export", run, "--to", tmp_path / "flat", "--entropy-cut", 0.3)
    tip("report", run, "-o", tmp_path / "page.html", "--entropy-cut", "otsu")
    tip("compare", run, run)
    tip("status", run, "--verify")
    shown = capsys.readouterr().out
    assert "every shard is as it was written" in shown
    assert "tip-analysis ablate" in shown
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    opened = open_run(run)
    masks = opened.masks().select("rule", "retention_ratio", "seed").unique().collect()
    assert masks.height == 2 + 2 + 4  # rules that do not sample have one seed
    exported = pl.read_parquet(tmp_path / "flat" / "tokens.parquet")
    assert exported.height == opened.tokens().collect().height
    assert exported.filter(
        (pl.col("student_entropy") > 0.3) != pl.col("quadrant").is_in(["Q1", "Q2"])
    ).is_empty()
    labels = pl.read_parquet(tmp_path / "flat" / "labels" / "q3-0.1-rollout-0.parquet")
    for row in labels.iter_rows(named=True):
        kept = [label for label in row["labels"] if label != -100]
        assert len(row["labels"]) == len(row["input_ids"])
        assert len(kept) == max(1, len(row["selected"]) // 10) == sum(row["selected"])
        assert all(
            label in (-100, token)
            for label, token in zip(row["labels"], row["input_ids"], strict=True)
        )


def test_a_run_keeps_to_its_first_measurement_until_another_is_preferred(run, tmp_path, capsys):
    few = ("--limit", 4, "--loss", "reverse_kl")
    measured = tmp_path / "run"
    shutil.copytree(run, measured, ignore=shutil.ignore_patterns("gradients", "masks"))
    record = json.loads((measured / "run.json").read_text())
    record["stages"] = {
        key: stage
        for key, stage in record["stages"].items()
        if stage["table"] not in ("gradients", "masks")
    }
    record.pop("preferences", None)
    (measured / "run.json").write_text(json.dumps(record))
    tip("gradients", measured, "--params", "head", "--num-probes", 4, *few)
    tip("gradients", measured, "--params", "head", "--method", "exact", *few)
    tip("gradients", measured, "--params", "body", "--num-probes", 4, *few)
    oracle = ("select", measured, "--rules", "gradient_oracle", "--ratios", 0.5)
    page = tmp_path / "page.html"

    def shown(*options) -> str:
        tip("report", measured, "-o", page, *options)
        return page.read_text()

    tip(*oracle)
    assert "Gradients of the reverse KL (the head, 4 probes, seed 0)" in shown()
    assert "reverse_kl over the body, 4 probes" in page.read_text(), "the others are named"
    assert "Gradients of the reverse KL (the body, 4" in shown("--measurement", "param_scope=body")
    assert "--measurement param_scope=body" in page.read_text(), "the page says how it was made"
    tip("gradients", measured, "--params", "head", "--method", "exact", "--prefer", *few)
    assert "Gradients of the reverse KL (the head, exact, seed 0)" in shown()
    assert "measurement.method: probe" in refused(capsys, *map(str, oracle)).replace('"', "")
    assert "KEY=VALUE" in refused(capsys, "report", measured, "--measurement", "exact")


def test_a_command_run_again_does_nothing_twice(run, prompts):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    tip(
        "rollout",
        run,
        "--student",
        "arithmetic-student",
        "--prompts",
        prompts,
        "--max-new-tokens",
        100,
        "--num-rollouts",
        2,
    )
    tip("score", run, "--teacher", "arithmetic-teacher", "--shard-size", 4)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_comparing_a_run_with_itself_shows_no_difference(run):
    from tip_analysis.analysis.comparison import compare_runs

    tables = compare_runs(open_run(run), open_run(run))
    for table in list(tables.values())[:2]:
        assert table["difference"].abs().max() == 0.0
    moves = list(tables.values())[2]
    stays = {row["quadrant"]: row[row["quadrant"]] for row in moves.iter_rows(named=True)}
    assert sum(stays.values()) == pytest.approx(1.0)
    from tip_analysis.analysis.quadrants import assign_quadrants

    shares = quadrant_shares(assign_quadrants(open_run(run).tokens()))
    assert stays == pytest.approx(
        {row["quadrant"]: row["share"] for row in shares.iter_rows(named=True) if row["share"]}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompt"),
        ('{"problem": "12+34+56="}\n{"problem": ', "line 2"),
        ('{"question": "12+34+56="}', "expected one of the fields problem, prompt, messages"),
        ('{"id": "a", "problem": "x"}\n{"id": "a", "problem": "y"}', "'a' occurs twice"),
    ],
    ids=["empty", "broken", "missing field", "duplicate id"],
)
def test_bad_prompts_are_refused(capsys, tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    line = refused(
        capsys,
        "rollout",
        tmp_path / "run",
        "--student",
        "arithmetic-student",
        "--prompts",
        tmp_path / "p.jsonl",
    )
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--num-rollouts", "0"], "--num-rollouts"),
        (["--token-budget", "0"], "--token-budget"),
        (["--limit", "0"], "limit"),
        (["--template", "nice"], "template 'nice'"),
        (["--grader", "maths"], "did you mean 'math'"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--device", "tpu9"], "--device"),
        (["--max-new-tokens", "120"], "the context of arithmetic-student ends at 128"),
        (["--chat-template-kwargs", "thinking"], "KEY=VALUE"),
        (["--student", "arithmetic-studnet"], "did you mean 'arithmetic-student'"),
        (["--prompts", "nowhere.jsonl"], "no such file"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_options_out_of_range_are_refused_and_make_no_run(
    capsys, tmp_path, prompts, given, message
):
    defaults = [
        "--student",
        "arithmetic-student",
        "--prompts",
        str(prompts),
        "--max-new-tokens",
        "100",
    ]
    kept = [
        part
        for pair in zip(defaults[::2], defaults[1::2], strict=True)
        if pair[0] not in given
        for part in pair
    ]
    line = refused(capsys, "rollout", tmp_path / "run", *kept, *given)
    assert message in line
    assert not (tmp_path / "run" / "rollouts").exists()


def test_stages_in_the_wrong_order_are_refused(capsys, tmp_path, prompts):
    assert "no run at" in refused(
        capsys, "score", tmp_path / "run", "--teacher", "arithmetic-teacher"
    )
    assert "no run at" in refused(capsys, "report", tmp_path / "run")
    tip(
        "rollout",
        tmp_path / "run",
        "--student",
        "arithmetic-student",
        "--prompts",
        prompts,
        "--limit",
        1,
        "--max-new-tokens",
        9,
    )
    assert "tip-analysis score" in refused(capsys, "select", tmp_path / "run", "--rules", "q3")
    assert "tip-analysis score" in refused(capsys, "gradients", tmp_path / "run")
    assert "tip-analysis score" in refused(
        capsys, "export", tmp_path / "run", "--to", tmp_path / "flat"
    )


def test_what_a_finished_run_refuses(capsys, run, prompts, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*.parquet")}
    assert "top_k: 5 → 3" in refused(
        capsys, "score", run, "--teacher", "arithmetic-teacher", "--shard-size", 4, "--top-k", 3
    )
    assert "num_rollouts: 2 → 3" in refused(
        capsys,
        "rollout",
        run,
        "--student",
        "arithmetic-student",
        "--prompts",
        prompts,
        "--max-new-tokens",
        100,
        "--num-rollouts",
        3,
    )
    assert "did you mean 'soft_or'" in refused(capsys, "select", run, "--rules", "softor")
    assert "ratio" in refused(capsys, "select", run, "--rules", "q3", "--ratios", 1.5)
    assert "--rules" in refused(capsys, "select", run)
    assert "cut" in refused(
        capsys, "report", run, "-o", tmp_path / "x.html", "--entropy-cut", "modal"
    )
    assert "i/n" in refused(
        capsys, "score", run, "--teacher", "arithmetic-teacher", "--shard", "4/4"
    )
    assert "no solution" in refused(
        capsys,
        "score",
        run,
        "--teacher",
        "arithmetic-teacher",
        "--teacher-context",
        "solution",
        "--shard-size",
        4,
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    assert "not empty" in refused(capsys, "export", run, "--to", tmp_path / "full")
    assert {path: path.read_bytes() for path in before} == before


def test_mismatched_tokenizers_are_refused_by_the_first_token(capsys, run, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["seven"])
    tokenizer.save_pretrained(tmp_path)
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    line = refused(capsys, "score", run, "--teacher", tmp_path, "--shard-size", 4)
    assert "'seven' for the teacher" in line


def test_the_rules_are_listed(capsys):
    tip("select", "--list")
    shown = capsys.readouterr().out
    for name in ("soft_or", "q3", "entropy_sampling", "gradient_oracle"):
        assert name in shown


@pytest.mark.parametrize(
    "code",
    ["import tip_analysis", "import tip_analysis.report", "import tip_analysis.cli.registry"],
)
def test_what_needs_no_torch_imports_none(code):
    script = (
        f"{code}\nimport sys\nassert 'torch' not in sys.modules and 'transformers' not in"
        " sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_help_imports_neither_torch_nor_polars():
    script = (
        "import sys\nfrom tip_analysis.cli.main import main\n"
        "try:\n    main(['score', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'polars', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def modules_of_options() -> list[Path]:
    folder = Path(str(commands.__file__)).parent
    return [*sorted(folder.glob("*.py")), folder.parent / "option_groups.py"]


@pytest.mark.parametrize("path", modules_of_options(), ids=lambda path: path.stem)
def test_every_option_has_a_sentence_of_help(path):
    for group in [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    ]:
        for field, after in itertools.pairwise([*group.body, None]):
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation) not in (
                "Models",
                "Taxonomy",
                "Common",
                "Engines",
                "TrainingEngines",
                "Environments",
            ):
                text = (
                    after.value.value
                    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    else ""
                )
                assert str(text).endswith("."), (
                    f"{group.name}.{ast.unparse(field.target)} has no sentence of help"
                )


def test_a_bad_row_of_the_prompts_is_named_or_skipped(tmp_path, capsys):
    rows = [json.dumps(row) for row in problems(3, seed=3)]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join([rows[0], '{"problem": 7}', rows[1], "{broken", rows[2]]))
    how = ("--student", "arithmetic-student", "--prompts", file, "--max-new-tokens", 4)
    said = refused(capsys, "rollout", tmp_path / "run", *how)
    assert "problems.jsonl" in said
    assert "line 2" in said
    tip("rollout", tmp_path / "run", *how, "--on-bad-row", "skip", "--num-rollouts", 1)
    run = open_run(tmp_path / "run")
    assert run.rollouts().collect()["prompt_id"].n_unique() == 3
    assert run.stages()["rollout"]["settings"]["skipped_rows"] == 2
    assert run.stages()["rollout"]["summary"]["num_skipped_rows"] == 2
    assert "num skipped rows" in capsys.readouterr().out
    how = ("--model", *how[1:], "--num-samples", 2)
    assert "line 2" in refused(capsys, "evaluate", tmp_path / "run", *how)
    tip("evaluate", tmp_path / "run", *how, "--on-bad-row", "skip")
    assert run.evaluations().collect()["problem_id"].n_unique() == 3
    assert "num skipped rows" in capsys.readouterr().out


def test_an_ablation_is_told_what_to_do_with_bad_rows(tmp_path, monkeypatch, capsys):
    from tip_analysis.training import door

    told = []

    def ablate(run, *, on_bad_row, **how):
        told.append(on_bad_row)
        raise OptionError("enough")

    monkeypatch.setattr(door, "ablate", ablate)
    how = ("ablate", tmp_path / "run", "--preset", "arithmetic", "--rules", "all")
    assert "enough" in refused(capsys, *how)
    assert "enough" in refused(capsys, *how, "--on-bad-row", "skip")
    assert told == ["fail", "skip"]
