"""The causal test on the arithmetic pair: what is forced, what is kept, and the planted truth."""

import polars as pl
import pytest
from instrument_runs import arithmetic_pair, arithmetic_run

from tip_analysis.analysis.interventions import intervention_effects, token_outcomes
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.run_folder import create_run
from tip_analysis.models.batching import TokenBudget
from tip_analysis.rollouts.engines.hf import HFEngine
from tip_analysis.rollouts.grading import grade
from tip_analysis.scoring.intervening import intervene

CUTS = Taxonomy(0.3, 0.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return arithmetic_run(tmp_path_factory.mktemp("run") / "run", num_prompts=24)


class Interrupted(HFEngine):
    """Fails after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__(arithmetic_pair()[0], TokenBudget(4096))
        self.calls = calls

    def generate(self, requests, sampling, advance=None):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().generate(requests, sampling, advance)


def test_tokens_are_forced_continued_and_graded(run) -> None:
    student = arithmetic_pair()[0]
    rows = intervene(run, num_tokens=8, num_continuations=2, taxonomy=CUTS, student=student)
    assert rows.height == 8 * 3 * 2
    tokens = run.tokens().select("rollout_id", "position", "token_id", "teacher_topk_ids").collect()
    joined = rows.join(tokens, on=["rollout_id", "position"], how="left")
    own, teacher, fresh = (
        joined.filter(choice=choice) for choice in ("student", "teacher", "fresh")
    )
    assert (own["forced_token_id"] == own["token_id"]).all()
    assert (teacher["forced_token_id"] == teacher["teacher_topk_ids"].list.first()).all()
    assert fresh["forced_token_id"].null_count() == fresh.height
    assert set(rows["reward"].unique()) <= {0.0, 1.0}
    assert (rows["num_tokens"] > rows["position"]).all()
    same = token_outcomes(rows).filter(~pl.col("teacher_differs"))
    assert (same["teacher_delta"] == 0).all()


def test_an_interrupted_test_goes_on_and_gives_the_same(run, tmp_path) -> None:
    how = {"num_tokens": 20, "num_continuations": 1, "taxonomy": CUTS, "seed": 5}
    with pytest.raises(KeyboardInterrupt):
        intervene(run, engine=Interrupted(4), **how)
    (key,) = [
        key
        for key, record in run.stages().items()
        if record["table"] == "interventions" and record["config"]["seed"] == 5
    ]
    assert len(run.stages()[key]["shards"]) == 1
    resumed = intervene(run, engine=Interrupted(99), **how)
    whole = arithmetic_run(tmp_path / "other", num_prompts=24)
    assert intervene(whole, engine=Interrupted(99), **how).equals(resumed)
    assert intervene(run, engine=Interrupted(0), **how).equals(resumed)  # kept: nothing is written


def test_what_cannot_be_tested_is_refused(run, tmp_path) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        intervene(run, num_tokens=0)
    table = run.rollouts().collect()
    ungraded = create_run(tmp_path / "ungraded")
    ungraded.begin("rollout", config={}).write(0, table.with_columns(
        reward=pl.lit(None, pl.Float32)))  # fmt: skip
    with pytest.raises(RunError, match="no rollout is graded"):
        intervene(ungraded)
    turns = create_run(tmp_path / "turns")
    first = pl.col("loss_mask").list.eval(pl.element() & (pl.int_range(pl.len()) > 0))
    turns.begin("rollout", config={}).write(0, table.with_columns(loss_mask=first))
    with pytest.raises(RunError, match="turns that the student did not write"):
        intervene(turns)


def test_a_grader_without_a_verdict_is_named(run) -> None:
    assert grade("none", "1", "1") is None
    with pytest.raises(RunError, match="'none' has no verdict"):
        intervene(run, num_tokens=1, num_continuations=1, grader="none", engine=Interrupted(9))


@pytest.mark.slow
def test_planted_errors_are_wrong_and_forks_are_not(tmp_path) -> None:
    """Forcing the teacher's token raises success at planted errors, by a margin that intervals
    show; at forks it does not."""
    run = arithmetic_run(tmp_path / "run", num_prompts=96, num_rollouts=4)
    student = arithmetic_pair()[0]
    rows = intervene(run, num_tokens=200, num_continuations=8, taxonomy=CUTS, student=student)
    labels = run.tokens().select(
        "rollout_id", "position", group=pl.col("planted_label").cast(pl.String)
    )
    table = intervention_effects(rows, labels.collect())
    planted = table.filter(group="planted_error", choice="teacher").row(0, named=True)
    fork = table.filter(group="fork", choice="teacher").row(0, named=True)
    assert planted["low"] > 0.05
    assert fork["low"] < 0 < fork["high"]
    assert fork["high"] < planted["difference"]
