"""Screens: shares by hand, outliers, and masks with and without artefacts."""

import polars as pl
import pytest
from synthetic import make_tables

from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.screening import (
    ANY,
    mark_outliers,
    num_artefacts,
    screen,
    screen_tokens,
    warnings_of,
)
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.names import Artefact, Scope
from tip_analysis.core.run_folder import create_run
from tip_analysis.core.schema import TokenTable


@pytest.fixture(scope="module")
def tokens() -> pl.DataFrame:
    return make_tables(num_prompts=8, rollouts_per_prompt=3, mean_length=30).tokens


def with_artefacts(tokens: pl.DataFrame, chosen: pl.Expr, delta: float | None = None):
    label = pl.when(chosen).then(pl.lit("stop_token")).cast(polars_schema(TokenTable)["artefact"])
    raised = pl.lit(delta, pl.Float32) if delta else pl.col("reverse_kl")
    return tokens.with_columns(
        artefact=label, reverse_kl=pl.when(chosen).then(raised).otherwise("reverse_kl")
    )


def test_shares_of_quadrants_and_of_the_loss_are_sums_over_the_labelled_tokens(tokens) -> None:
    marked = with_artefacts(tokens, pl.col("position") == 0)
    cuts = Taxonomy(entropy_cut=0.5, divergence_cut=0.5)
    table = screen_tokens(marked, taxonomy=cuts, rules=())
    written = marked.filter("loss_mask")
    is_q3 = (pl.col("student_entropy") <= 0.5) & (pl.col("reverse_kl") > 0.5)
    q3 = written.filter(is_q3)
    row = table.filter(artefact="stop_token", name="Q3").row(0, named=True)
    assert (row["num_tokens"], row["num_artefacts"]) == (
        q3.height,
        q3.filter(pl.col("position") == 0).height,
    )
    assert row["share"] == pytest.approx(row["num_artefacts"] / row["num_tokens"])
    loss = table.filter(artefact="stop_token", name="reverse_kl").row(0, named=True)
    first = written.filter(pl.col("position") == 0)["reverse_kl"].cast(pl.Float64).sum()
    assert loss["share"] == pytest.approx(first / written["reverse_kl"].cast(pl.Float64).sum())
    assert loss["share_low"] <= loss["share"] <= loss["share_high"]


def test_one_divergence_that_sets_the_scale_is_an_outlier(tokens) -> None:
    assert num_artefacts(screen_tokens(tokens, rules=())) == 0
    raised = tokens.with_columns(
        reverse_kl=pl.when(pl.int_range(pl.len()) == 5)
        .then(pl.lit(90.0, pl.Float32))
        .otherwise("reverse_kl")
    )
    found = mark_outliers(raised).collect()
    assert found["artefact"].is_not_null().arg_true().to_list() == [5]
    assert found["artefact"][5] == Artefact.OUTLIER
    by_batch = mark_outliers(raised, Scope.BATCH).collect()
    assert by_batch["artefact"][5] == Artefact.OUTLIER
    masked = raised.with_columns(loss_mask=pl.int_range(pl.len()) != 5)
    assert mark_outliers(masked).collect()["artefact"].null_count() == tokens.height


def test_masks_with_and_without_artefacts_are_compared_on_the_other_tokens(tokens) -> None:
    """Large divergences at rollouts' ends set the scale of all: the masks of the others move."""
    last = pl.col("position") == pl.col("position").max().over("rollout_id")
    marked = with_artefacts(tokens, last, delta=25.0)
    table = screen_tokens(marked, rules=("soft_or",), ratios=(0.2,))
    row = table.filter(artefact=ANY, name="soft_or:0.2").row(0, named=True)
    how = {"rule": "soft_or", "retention_ratio": 0.2}
    written = marked.filter("loss_mask")
    chosen = select_tokens(add_scores(written), **how).collect()
    others = written.filter(pl.col("artefact").is_null())
    again = select_tokens(add_scores(others), **how).collect().filter("selected")
    kept = chosen.filter("selected", pl.col("artefact").is_null())
    first, second = (
        set(frame.select("rollout_id", "position").iter_rows()) for frame in (kept, again)
    )
    assert row["jaccard"] == pytest.approx(len(first & second) / len(first | second))
    assert row["jaccard"] < 1
    assert row["num_artefacts"] == chosen.filter("selected").height - kept.height


def test_warnings_name_what_is_more_than_a_twentieth(tokens) -> None:
    last = pl.col("position") == pl.col("position").max().over("rollout_id")
    texts = warnings_of(screen_tokens(with_artefacts(tokens, last, delta=25.0), rules=()))
    assert any("summed reverse KL" in text and "stop_token" in text for text in texts)
    assert warnings_of(screen_tokens(tokens, rules=())) == []


def test_a_screen_is_kept_in_the_run_and_not_made_again(tokens, tmp_path) -> None:
    run = create_run(tmp_path / "run")
    run.begin("score", config={}).write(0, tokens)
    first = screen(run, rules=("q3",), ratios=(0.1,))
    assert screen(run.path, rules=("q3",), ratios=(0.1,)).equals(first)
    assert run.table("screens").collect().height == first.height
