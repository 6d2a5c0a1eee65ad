"""Several ablations side by side: every pair weighs the same, nothing is pooled."""

import polars as pl
import pytest
from synthetic import make_ablations

from tip_analysis import figures
from tip_analysis.analysis.arms import ALL, Arm
from tip_analysis.analysis.pair_tables import MEAN_OVER_PAIRS, arms_of_pairs, paper_arms_of_pairs
from tip_analysis.analysis.paper_claims import paper_results
from tip_analysis.core.result_tables import PairAccuracyTable, checked


def two_pairs() -> dict[str, pl.DataFrame]:
    small = make_ablations(benchmark="AIME24", problems=5, seed=1)
    large = make_ablations(benchmark="MATH-500", problems=80, seed=2)
    return {"one": pl.concat([small, large]), "two": make_ablations(seed=3)}


def test_pairs_and_benchmarks_weigh_the_same() -> None:
    pairs = two_pairs()
    found = checked(arms_of_pairs(pairs), PairAccuracyTable)
    row = found.filter(ALL.rows(), pair="one").row(0, named=True)
    arms = pairs["one"].filter(ALL.rows())
    by_benchmark = arms.group_by("benchmark").agg(pl.col("accuracy").mean())["accuracy"]
    assert row["accuracy"] == pytest.approx(by_benchmark.mean())
    both = found.filter(ALL.rows(), pl.col("pair") != MEAN_OVER_PAIRS)
    mean = found.filter(ALL.rows(), pair=MEAN_OVER_PAIRS).row(0, named=True)
    assert mean["accuracy"] == pytest.approx(both["accuracy"].mean())
    assert mean["best_at_k"] == pytest.approx(both["best_at_k"].mean())


def test_an_arm_that_one_pair_lacks_has_no_mean() -> None:
    pairs = two_pairs()
    q3 = Arm("q3", 0.1)
    pairs["two"] = pairs["two"].filter(~q3.rows())
    found = arms_of_pairs(pairs)
    assert found.filter(q3.rows())["pair"].to_list() == ["one"]
    assert MEAN_OVER_PAIRS not in arms_of_pairs({"one": pairs["one"]})["pair"]
    assert arms_of_pairs({}).is_empty()


def test_the_papers_mean_by_hand() -> None:
    found = paper_arms_of_pairs()
    results = paper_results().filter(ALL.rows(), pl.col("metric") == "mean@16 accuracy %", table=3)
    per_pair = results.group_by("pair").agg(pl.col("mean").mean() / 100)
    ours = found.filter(ALL.rows(), pl.col("pair") != MEAN_OVER_PAIRS)
    assert sorted(ours["accuracy"]) == pytest.approx(sorted(per_pair["mean"]))
    mean = found.filter(ALL.rows(), pair=MEAN_OVER_PAIRS)["accuracy"][0]
    assert mean == pytest.approx(per_pair["mean"].mean())


def test_figures_of_pairs_show_every_arm() -> None:
    table = arms_of_pairs(two_pairs())
    figure = figures.mean_over_pairs(table, paper_arms_of_pairs(), mean=MEAN_OVER_PAIRS)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert {"q3:0.1", "all", "soft_or:0.5"} <= set(labels)
    figure = figures.average_and_best(table)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["one", "two", MEAN_OVER_PAIRS]
    assert len(figures.average_and_best(paper_arms_of_pairs()).axes) == 4
