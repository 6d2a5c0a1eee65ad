"""Two runs side by side."""

import polars as pl
import pytest
from synthetic import make_tables, write_run

from tip_analysis.analysis.comparison import COMPARED, compare_runs
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.run_folder import open_run

CUTS = Taxonomy(entropy_cut=0.5, divergence_cut=0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same rollouts under two teachers, and other rollouts."""
    folder = tmp_path_factory.mktemp("runs")
    tables = make_tables(num_prompts=5, gradients=False)
    kinder = tables.tokens.with_columns(
        pl.col("reverse_kl") * pl.when(pl.int_range(pl.len()) % 3 == 0).then(0.0).otherwise(1.0)
    )
    others = make_tables(num_prompts=5, gradients=False, seed=1)
    renamed = {
        name: (
            getattr(others, name).with_columns(
                pl.format("other-{}", "rollout_id").alias("rollout_id")
            )
        )
        for name in ("rollouts", "tokens", "gradients", "masks")
    }
    made = {
        "a": tables,
        "b": type(tables)(
            tables.rollouts, kinder, tables.gradients, tables.masks, tables.vocabulary
        ),
    }
    made["c"] = type(tables)(**renamed, vocabulary=others.vocabulary)
    return {
        name: (open_run(write_run(folder / name, each)), each.tokens) for name, each in made.items()
    }


def quadrants(tokens: pl.DataFrame) -> list[str | None]:
    names = {(True, True): "Q1", (True, False): "Q2", (False, True): "Q3", (False, False): "Q4"}
    kept = tokens.filter("loss_mask")
    return [
        names[h > 0.5, d > 0.5]
        for h, d in zip(kept["student_entropy"], kept["reverse_kl"], strict=True)
    ]


def test_shares_and_means_stand_side_by_side(runs) -> None:
    (run_a, tokens_a), (run_b, tokens_b) = runs["a"], runs["b"]
    shares, means, _ = compare_runs(run_a, run_b, CUTS).values()
    named_a, named_b = quadrants(tokens_a), quadrants(tokens_b)
    for row in shares.iter_rows(named=True):
        assert row["share_a"] == pytest.approx(named_a.count(row["quadrant"]) / len(named_a))
        assert row["difference"] == pytest.approx(
            named_b.count(row["quadrant"]) / len(named_b) - row["share_a"]
        )
    assert means["statistic"].to_list() == list(COMPARED)
    by_name = {row["statistic"]: row for row in means.iter_rows(named=True)}
    assert by_name["student_entropy"]["difference"] == 0.0
    expected = (
        tokens_b.filter("loss_mask")["reverse_kl"].mean()
        - tokens_a.filter("loss_mask")["reverse_kl"].mean()
    )
    assert by_name["reverse_kl"]["difference"] == pytest.approx(expected)


def test_common_tokens_are_followed_between_quadrants(runs) -> None:
    (run_a, tokens_a), (run_b, tokens_b) = runs["a"], runs["b"]
    moves = list(compare_runs(run_a, run_b, CUTS).values())[2]
    pairs = list(zip(quadrants(tokens_a), quadrants(tokens_b), strict=True))
    for row in moves.iter_rows(named=True):
        for name in ("Q1", "Q2", "Q3", "Q4"):
            assert row[name] == pytest.approx(pairs.count((row["quadrant"], name)) / len(pairs))
    assert sum(moves.select("Q1", "Q2", "Q3", "Q4").sum().row(0)) == pytest.approx(1.0)


def test_runs_without_common_tokens_have_no_moves(runs) -> None:
    assert len(compare_runs(runs["a"][0], runs["c"][0], CUTS)) == 2
