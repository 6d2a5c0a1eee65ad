"""The gap between the scorer's log-probabilities and the engine's, and the warning it earns."""

from dataclasses import replace
from statistics import median

import polars as pl
import pytest
from synthetic import make_tables, write_run

from tip_analysis.analysis.logprob_gap import logprob_gap, warn_about_gap
from tip_analysis.core.run_folder import open_run
from tip_analysis.report.build import write_report


def run_with(tmp_path, said):
    """A run whose engine said `said(student_logprob, place)` of each token; None is unknown."""
    tables = make_tables(num_prompts=3, rollouts_per_prompt=2, seed=1)
    rollouts = tables.rollouts.with_columns(
        pl.Series(
            "sampled_logprobs",
            [
                None if values is None else [said(value, i) for i, value in enumerate(values)]
                for values in tables.rollouts["sampled_logprobs"].to_list()
            ],
            dtype=pl.List(pl.Float32),
        )
    )
    path = write_run(tmp_path / "run", replace(tables, rollouts=rollouts))
    return open_run(path)


def expected_gaps(run):
    """Typed out: for each written token, |what the scorer says − what the engine said|."""
    said = {
        (row["rollout_id"], place): value
        for row in run.rollouts().collect().iter_rows(named=True)
        for place, value in enumerate(row["sampled_logprobs"] or [])
    }
    return [
        abs(row["student_logprob"] - said[row["rollout_id"], row["position"]])
        for row in run.tokens().collect().iter_rows(named=True)
        if row["loss_mask"] and said.get((row["rollout_id"], row["position"])) is not None
    ]


def shifted(value, place):
    return None if value is None else value - 0.05 * (1 + place % 3)


def test_median_and_largest_are_those_of_the_written_tokens(tmp_path):
    run = run_with(tmp_path, shifted)
    found, gaps = logprob_gap(run), expected_gaps(run)
    assert found["num_logprobs_compared"] == len(gaps) > 50
    assert found["logprob_gap_median"] == pytest.approx(median(gaps), abs=1e-6)
    assert found["logprob_gap_max"] == pytest.approx(max(gaps), abs=1e-6)
    assert 0.04 < found["logprob_gap_median"] < 0.16


def test_tokens_can_be_left_out_and_unknown_ones_are(tmp_path):
    run = run_with(tmp_path, lambda value, place: None if place % 2 else value)
    whole = logprob_gap(run)
    assert whole["logprob_gap_max"] == 0.0
    assert whole["num_logprobs_compared"] == len(expected_gaps(run))
    common = run.tokens().collect()["token_id"].mode()[0]
    less = logprob_gap(run, but_for=[common])
    assert less["num_logprobs_compared"] < whole["num_logprobs_compared"]


def test_nothing_is_said_where_nothing_is_known(tmp_path):
    assert logprob_gap(run_with(tmp_path, lambda value, place: None)) == {}


def test_a_warning_above_a_tenth_of_a_nat(caplog):
    warn_about_gap({})
    warn_about_gap({"logprob_gap_median": 0.1, "logprob_gap_max": 3.0})
    assert not caplog.records
    warn_about_gap({"logprob_gap_median": 0.11, "logprob_gap_max": 3.0})
    assert "by 0.11 nats in the median (3 at most)" in caplog.text


@pytest.mark.parametrize(("gap", "told"), [(0.3, True), (0.01, False)])
def test_a_report_repeats_it(tmp_path, gap, told):
    run = run_with(tmp_path, shifted)
    summary = {"logprob_gap_median": gap, "logprob_gap_max": 2 * gap}
    run.update(lambda record: record["stages"]["score"]["summary"].update(summary))
    page = write_report([run.path], tmp_path / "page.html").read_text()
    assert ("differ from those of the engine" in page) == told
