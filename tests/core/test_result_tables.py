"""Contracts of result tables: what the analysis makes keeps them, figures refuse what breaks
them."""

import ast
from pathlib import Path

import dataframely as dy
import polars as pl
import pytest
from synthetic import make_ablations, make_dynamics, make_tables, write_ablations, write_run

from tip_analysis import analysis
from tip_analysis.analysis.run_view import ReportOptions, RunView
from tip_analysis.analysis.shown_masks import (
    compared_masks,
    compared_tokens,
    mean_composition,
    overlap_at_one_ratio,
)
from tip_analysis.core import result_tables as contracts
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.result_tables import checked

SCHEMAS = {
    name: value
    for name, value in vars(contracts).items()
    if isinstance(value, type) and issubclass(value, dy.Schema) and value is not dy.Schema
}
FEW = {"num_resamples": 20}


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> RunView:
    path = write_run(tmp_path_factory.mktemp("run") / "demo", make_tables(seed=4))
    write_ablations(path, make_ablations())
    return RunView(path, ReportOptions(num_resamples=20))


def _gradients(view: RunView) -> dict[str, pl.DataFrame]:
    return {loss: analysis.gradient_statistics(view, loss) for loss in view.losses}


def _made(view: RunView) -> pl.DataFrame:
    return analysis.composition(compared_masks(view), compared_tokens(view))


def _pairs(view: RunView) -> pl.DataFrame:
    found = overlap_at_one_ratio(compared_masks(view))
    assert found is not None
    return found[1]


def _arms(view: RunView) -> pl.DataFrame:
    return analysis.final_arms(view.run.ablations().collect())


MADE = {
    "QuadrantShareTable": lambda view: view.share_table,
    "DensityTable": lambda view: analysis.density(view.tokens, view.cuts),
    "CutSensitivityTable": lambda view: analysis.cut_sensitivity(view.raw),
    "QuadrantProfileTable": lambda view: analysis.gradient_profile(
        _gradients(view), {"divergence": "mean divergence", "grad_norm_sq": "mean ‖g‖²"}
    ),
    "QuadrantProfileTable of logits": lambda view: analysis.logit_profile(
        view, divergence="mean divergence", norm="mean logit ‖g‖"
    ),
    "EnergyShareTable": lambda view: analysis.energy_shares(_gradients(view)),
    "CompositionTable": _made,
    "CompositionTable of means": lambda view: mean_composition(_made(view)),
    "OverlapTable": lambda view: analysis.overlap(compared_masks(view)),
    "OverlapTable at one ratio": _pairs,
    "CoverageTable": lambda view: analysis.coverage_curve(
        compared_masks(view), view.raw, columns=["reverse_kl", "forward_kl"], **FEW
    ),
    "GroupTable": lambda view: analysis.group_effects(view.raw, grouping="kind", **FEW),
    "ArmAccuracyTable": lambda view: analysis.arm_accuracies(view.run.ablations().collect()),
    "ArmDifferenceTable": lambda view: analysis.differences_from_all(_arms(view)),
    "PaperDifferenceTable": lambda view: analysis.paper_differences_from_all(_arms(view)),
    "ClaimEffectTable": lambda view: analysis.claim_effects(analysis.claims_table(_arms(view))),
    "MemoryTable": lambda view: analysis.relative_memory(_arms(view)),
    "DynamicsCurveTable": lambda _: analysis.dynamics_curves(make_dynamics(make_ablations())),
    "MemoryTable of the paper": lambda _: analysis.paper_memory(),
}


TESTS = Path(__file__).parents[1]


def checked_elsewhere() -> set[str]:
    """Contracts of what needs more than a run with gradients: tests of the functions that make them
    check what they get."""
    files = [*TESTS.glob("analysis/test_*.py"), *TESTS.glob("gradients/test_*.py")]
    calls = [
        node
        for file in files
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "checked"
    ]
    return {ast.unparse(call.args[1]).removeprefix("contracts.") for call in calls}


def test_every_contract_has_a_function_that_makes_it() -> None:
    made = {name.split()[0] for name in MADE}
    assert set(SCHEMAS) - made <= checked_elsewhere()
    assert made <= set(SCHEMAS)


@pytest.mark.parametrize("name", MADE)
def test_what_the_analysis_makes_keeps_its_contract(name: str, view: RunView) -> None:
    schema, table = SCHEMAS[name.split()[0]], MADE[name](view)
    assert table.height
    typed = checked(table, schema)
    assert typed.columns == table.columns
    assert {column: typed.schema[column] for column in polars_schema(schema)} == polars_schema(
        schema
    )
    for column in polars_schema(schema):
        with pytest.raises(SchemaError, match=rf"{schema.__name__} needs the column\(s\) {column}"):
            checked(table.drop(column), schema)


def _overlaps(**columns: object) -> pl.DataFrame:
    return pl.DataFrame(
        {"rule_a": ["a", "a"], "rule_b": ["b", "c"], "jaccard": [0.5, 1], **columns}
    )


def test_columns_of_its_own_and_other_widths_pass() -> None:
    table = _overlaps(jaccard=pl.Series([0, 1], dtype=pl.Int8), note=["x", "y"])
    found = checked(table, contracts.OverlapTable)
    assert found["note"].to_list() == ["x", "y"]
    assert found["jaccard"].to_list() == [0.0, 1.0]
    assert found.schema["jaccard"] == pl.Float64
    empty = checked(table.clear(), contracts.OverlapTable)
    assert empty.height == 0


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"jaccard": [0.5, 1.5]}, "OverlapTable: row 1: jaccard is above its range, found 1.5"),
        ({"jaccard": [-0.1, 1.0]}, "OverlapTable: row 0: jaccard is below its range"),
        ({"jaccard": [0.5, float("nan")]}, "OverlapTable: row 1: jaccard must not be NaN"),
        ({"jaccard": ["half", "all"]}, "OverlapTable: the column jaccard must be Float64"),
        ({"rule_a": [None, "a"]}, "OverlapTable: row 0: rule_a must not be null"),
    ],
)
def test_what_breaks_a_contract_is_named(columns: dict, words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        checked(_overlaps(**columns), contracts.OverlapTable)


def test_a_quadrant_that_is_none_and_a_bar_drawn_twice_are_refused() -> None:
    row = {"run": ["a"], "quadrant": ["Q5"], "share": [0.1], "share_low": [None]}
    table = pl.DataFrame({**row, "share_high": [None]})
    with pytest.raises(SchemaError, match="the column quadrant must be Enum"):
        checked(table, contracts.QuadrantShareTable)
    twice = pl.concat([table.with_columns(quadrant=pl.lit("Q1"))] * 2)
    with pytest.raises(SchemaError, match=r"the key \('a', 'Q1'\) must not occur twice"):
        checked(twice, contracts.QuadrantShareTable)
