"""Curves of training over steps: bins, seeds and their band against plain loops."""

import polars as pl
import pytest
from synthetic import make_ablations, make_dynamics

from tip_analysis import figures
from tip_analysis.analysis.dynamics import METRICS, dynamics_curves
from tip_analysis.core.errors import UnknownNameError
from tip_analysis.core.result_tables import DynamicsCurveTable, checked


def observed() -> pl.DataFrame:
    return make_dynamics(make_ablations())


def test_a_bin_is_the_mean_of_its_steps_and_the_band_spans_the_seeds() -> None:
    table = observed()
    found = dynamics_curves(table, ["reverse_kl", "grad_norm"], num_bins=6)
    checked(found, DynamicsCurveTable)
    part = found.filter(arm="q3:0.1", metric="grad_norm")
    assert part["step"].to_list() == [4.5, 14.5, 24.5, 34.5, 44.5, 54.5]
    ours = table.filter(rule="q3", retention_ratio=0.1)
    for index, row in enumerate(part.iter_rows(named=True)):
        means = []
        for seed in (0, 1, 2):
            steps = ours.filter(seed=seed).filter(
                pl.col("step").is_between(10 * index, 10 * index + 9)
            )
            means.append(steps["grad_norm"].mean())
        assert row["value"] == pytest.approx(sum(means) / 3)
        assert (row["low"], row["high"]) == pytest.approx((min(means), max(means)))
        assert row["num_seeds"] == 3


def test_what_is_not_known_is_null_and_gets_no_panel() -> None:
    curves = dynamics_curves(observed())
    assert (
        curves.filter(metric="truncated_share")["value"].null_count()
        == curves.filter(metric="truncated_share").height
    )
    figure = figures.training_curves(curves, words=METRICS)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert METRICS["truncated_share"] not in titles
    assert len(titles) == len(METRICS) - 1
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"q3:0.1", "all", "soft_or:0.5"} <= labels


def test_few_steps_have_few_bins_and_no_steps_none() -> None:
    table = observed().filter(pl.col("step") < 3)
    assert dynamics_curves(table, ["loss"]).filter(arm="all")["step"].to_list() == [0.0, 1.0, 2.0]
    assert dynamics_curves(table.clear(), ["loss"]).is_empty()
    with pytest.raises(UnknownNameError, match="quantity of training 'lenght'"):
        dynamics_curves(table, ["lenght"])
