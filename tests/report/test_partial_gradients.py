"""Gradients that cover a part of a run: rules that select by them, and all rules beside them, are
compared on the measured tokens, against plain counts."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from tests.synthetic import Tables, make_tables, write_run
from tip_analysis.analysis.run_view import ReportOptions, RunView
from tip_analysis.report.page import Part, Picture, Table
from tip_analysis.report.sections.selections import selections

RATIOS = (0.1, 0.5)
PLACE = ["rollout_id", "position"]


def _oracle_masks(tokens: pl.DataFrame, gradients: pl.DataFrame) -> pl.DataFrame:
    """The k = max(1, ⌊ρ·m⌋) tokens of largest φ of every measured rollout, by a plain loop."""
    phi = gradients.filter(pl.col("loss") == "reverse_kl").select(*PLACE, "grad_dot_loss")
    rows = []
    for (rollout,), part in tokens.join(phi, on=PLACE).group_by("rollout_id", maintain_order=True):
        order = np.argsort(-part["grad_dot_loss"].to_numpy(), kind="stable")
        for ratio in RATIOS:
            chosen = order[: max(1, int(np.floor(ratio * part.height + 1e-9)))]
            rows += [(rollout, int(part["position"][int(i)]), ratio) for i in chosen]
    return pl.DataFrame(rows, schema=[*PLACE, "retention_ratio"], orient="row")


@pytest.fixture(scope="module")
def partial() -> Tables:
    """Half of the rollouts have gradients, and one rule selects by them."""
    tables = make_tables(num_prompts=8, seed=3)
    measured = tables.tokens["rollout_id"].unique(maintain_order=True)[::2]
    gradients = tables.gradients.filter(pl.col("rollout_id").is_in(measured.implode()))
    chosen = _oracle_masks(tables.tokens, gradients)
    oracle = tables.masks.clear().join(chosen, on=[*PLACE, "retention_ratio"], how="right")
    oracle = oracle.with_columns(
        rule=pl.lit("gradient_oracle"), selection_scope=pl.lit("rollout"), seed=pl.lit(0)
    )
    oracle = oracle.select(tables.masks.columns).cast(dict(tables.masks.schema))
    return dataclasses.replace(tables, gradients=gradients, masks=pl.concat([tables.masks, oracle]))


@pytest.fixture(scope="module")
def part(partial, tmp_path_factory) -> Part:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tip_analysis.report.page.inline_svg", lambda *_a, **_o: "")
        path = write_run(tmp_path_factory.mktemp("runs") / "partial", partial)
        return selections([RunView(path, ReportOptions(num_resamples=20))]).parts[0]


def _table(part: Part, caption: str) -> Table:
    (found,) = [
        block
        for block in part.blocks
        if isinstance(block, Table) and block.caption.startswith(caption)
    ]
    return found


def _measured(partial: Tables) -> pl.DataFrame:
    """Written tokens with gradients, with the Q3 of the whole run's cuts (median, mean)."""
    tokens = partial.tokens.filter("loss_mask")
    entropy = tokens["student_entropy"].cast(pl.Float64)
    divergence = tokens["reverse_kl"].cast(pl.Float64)
    finite = divergence.filter(divergence.is_finite())
    in_q3 = (entropy <= entropy.median()) & (divergence > finite.mean())
    return tokens.with_columns(in_q3=in_q3).join(
        partial.gradients.select(PLACE).unique(), on=PLACE, how="semi"
    )


def test_every_rule_is_counted_on_the_measured_tokens(partial, part):
    measured = _measured(partial)
    assert 0 < measured["in_q3"].sum() < measured.height < partial.tokens.height
    rows = _table(part, "What each selection takes from Q3").rows
    assert {row[0] for row in rows} >= {"gradient_oracle", "q3", "entropy"}
    for row in rows:
        chosen = partial.masks.filter(
            pl.col("rule") == row[0], (pl.col("retention_ratio") - float(row[1])).abs() < 1e-9
        )
        chosen = measured.join(chosen, on=PLACE, how="semi")
        missed = 1 - chosen["in_q3"].sum() / measured["in_q3"].sum()
        assert row[4] == f"{chosen.height:,}"
        assert row[5] == f"{100 * chosen['in_q3'].mean():.1f}%"
        assert row[6] == f"{100 * missed:.1f}%"


def test_planted_errors_are_those_among_the_measured_tokens(partial, part):
    planted = _measured(partial).filter(pl.col("planted_label") == "planted_error")
    table = _table(part, f"Planted errors found, of {planted.height}")
    for row in table.rows:
        chosen = partial.masks.filter(
            pl.col("rule") == row[0], (pl.col("retention_ratio") - float(row[1])).abs() < 1e-9
        )
        found = planted.join(chosen, on=PLACE, how="semi").height
        assert row[2:4] == [str(found), f"{100 * found / planted.height:.1f}%"]


def test_the_number_of_measured_tokens_is_given(partial, part):
    assert f"on the same {_measured(partial).height:,} measured tokens" in part.population


def test_alignment_is_among_the_kept_curves(part):
    captions = [block.caption for block in part.blocks if isinstance(block, Picture)]
    assert any("How much of Σφ each rule keeps" in caption for caption in captions)


def test_without_a_rule_that_needs_gradients_the_whole_run_is_compared(partial, tmp_path):
    masks = partial.masks.filter(pl.col("rule") != "gradient_oracle")
    path = write_run(tmp_path / "run", dataclasses.replace(partial, masks=masks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tip_analysis.report.page.inline_svg", lambda *_a, **_o: "")
        made = selections([RunView(path, ReportOptions(num_resamples=20))]).parts[0]
    assert "measured token" not in made.population
    rows = {(row[0], row[1]): row for row in _table(made, "What each selection takes").rows}
    chosen = masks.filter(pl.col("rule") == "q3", pl.col("retention_ratio") == 0.1)
    assert rows["q3", "0.1"][4] == f"{chosen.height:,}"
