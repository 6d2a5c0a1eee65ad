"""What a reader of single tokens sees, against counts by hand."""

import numpy as np
import polars as pl
import pytest
from synthetic import make_tables, write_run

from tip_analysis.analysis import browsing
from tip_analysis.analysis.prompt_sample import scaled_intervals
from tip_analysis.analysis.rollout_facts import count_rollouts, rollout_facts
from tip_analysis.analysis.run_view import ReportOptions, RunView
from tip_analysis.core.errors import UnknownNameError


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> RunView:
    path = tmp_path_factory.mktemp("run") / "demo"
    return RunView(write_run(path, make_tables(seed=6)), ReportOptions())


def test_a_sample_begins_with_the_strongest_and_keeps_its_budget(view: RunView) -> None:
    lengths = dict(view.raw.group_by("rollout_id").len().collect().iter_rows())
    q3 = view.tokens.filter(pl.col("quadrant") == "Q3").collect()
    strongest = q3.sort("q3_score", descending=True)["rollout_id"][0]
    for budget in (1, 200, 10**6):
        chosen = browsing.sample_rollouts(view, budget)
        assert chosen[0] == strongest == browsing.strongest_rollout(view)
        assert len(set(chosen)) == len(chosen)
        assert len(chosen) == 1 or sum(lengths[name] for name in chosen) <= budget
    assert set(chosen) == set(lengths)


def test_recorded_ratios_are_the_smallest_of_each_rule(view: RunView) -> None:
    names = view.raw.select("rollout_id").unique().collect()["rollout_id"].sort()[:3].to_list()
    smallest: dict[tuple, float] = {}
    for row in view.run.masks().collect().iter_rows(named=True):
        if row["rollout_id"] in names:
            key = row["rule"], row["rollout_id"], row["position"]
            smallest[key] = min(row["retention_ratio"], smallest.get(key, 1.0))
    found = browsing.recorded_ratios(view, names)
    keys = found.select("rule", "rollout_id", "position").rows()
    assert dict(zip(keys, found["retention_ratio"], strict=True)) == smallest
    assert keys == sorted(keys)
    assert browsing.selection_ratios(view, names).equals(found)


def test_colour_scales_leave_out_what_is_not_finite() -> None:
    values = [float(value) for value in range(101)]
    table = pl.DataFrame({"a": [*values, None, float("inf"), float("nan")]})
    scales = browsing.colour_scales(table.with_columns(b=pl.lit(None, pl.Float64)), ["a", "b"])
    assert scales == {"a": (1.0, 99.0)}


def test_a_rollout_that_is_not_there_is_named(view: RunView) -> None:
    with pytest.raises(UnknownNameError, match="unknown rollout 'p999/9'"):
        browsing.one_rollout(view, "p999/9")


def test_unusual_rollouts_are_counted(view: RunView) -> None:
    facts = rollout_facts(view.run)
    counted = count_rollouts(facts)
    assert counted.num_rollouts == facts.height == view.rollouts.height
    rows = facts.to_dicts()
    assert counted.num_cut_off == sum(row["finish_reason"] == "length" for row in rows)
    assert counted.num_empty == sum(row["num_tokens"] == 0 for row in rows)
    tempered = facts.with_columns(temperature=pl.lit(0.7, pl.Float32))
    assert count_rollouts(tempered).num_tempered == facts.height
    unknown = facts.with_columns(temperature=pl.lit(None, pl.Float32))
    assert count_rollouts(unknown).num_of_unknown_temperature == facts.height


def test_scaled_intervals_keep_the_value_and_shrink_the_ends() -> None:
    whole = pl.DataFrame({"key": ["a"], "x": [2.0], "x_low": [0.0], "x_high": [9.0]})
    part = pl.DataFrame({"key": ["a"], "x": [3.0], "x_low": [1.0], "x_high": [7.0]})
    found = scaled_intervals(whole, part, keys=["key"], names=["x"], scale=0.5).row(0)
    np.testing.assert_allclose(found[1:], [2.0, 2.0 - 0.5 * 2.0, 2.0 + 0.5 * 4.0])
