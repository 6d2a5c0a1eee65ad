"""Trajectories of an arm on the arithmetic pair: kept weights, fixed contexts, resumption."""

import polars as pl
import pytest
from instrument_runs import arithmetic_pair, arithmetic_run
from polars.testing import assert_frame_equal

from tip_analysis.analysis.arms import Arm
from tip_analysis.analysis.trajectories import placed_trajectory, trajectory_flow, with_facts
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.scoring.tracking import track
from tip_analysis.training.door import ablate
from tip_analysis.training.kept_weights import kept_arm, kept_steps

ARM = {
    "preset": "arithmetic",
    "arms": ["q3:0.2"],
    "seeds": [0],
    "num_steps": 4,
    "prompts_per_step": 2,
    "rollouts_per_prompt": 2,
    "num_samples": 1,
    "limit": 4,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = arithmetic_run(tmp_path_factory.mktemp("run") / "run", num_prompts=6)
    ablate(run, keep_every=2, **ARM)
    return run


def pair() -> dict:
    student, teacher = arithmetic_pair()
    return {"student": student, "teacher": teacher}


def test_weights_are_kept_at_the_first_some_and_the_last_step() -> None:
    assert kept_steps(2, 5) == [0, 2, 4, 5]
    assert kept_steps(10, 4) == [0, 4]


def test_the_first_step_is_the_token_table_and_later_ones_differ(run) -> None:
    rows = track(run, arm="q3:0.2", **pair())
    assert rows["step"].unique().sort().to_list() == [0, 2, 4]
    keys = ["rollout_id", "position"]
    first = rows.filter(step=0).sort(keys)
    scored = run.tokens().filter("loss_mask").collect().sort(keys)
    assert_frame_equal(
        first.select(*keys, "reverse_kl", "student_entropy"),
        scored.select(*keys, "reverse_kl", "student_entropy"),
        abs_tol=1e-4,
    )
    last = rows.filter(step=4).sort(keys)
    assert (first["reverse_kl"] - last["reverse_kl"]).abs().max() > 1e-3
    placed = with_facts(placed_trajectory(rows), run.tokens())
    assert trajectory_flow(placed).filter(step_from=0)["num_tokens"].sum() == first.height
    assert placed["selected"].any()


def test_a_step_that_was_lost_is_scored_again_to_the_same(run) -> None:
    rows = track(run, arm="q3:0.2", **pair())
    (key,) = [key for key in run.stages() if key.startswith("track")]
    run.stage(key).path(2).unlink()
    assert_frame_equal(track(run, arm="q3:0.2", **pair()), rows)


def test_weights_that_are_kept_are_not_trained_again_and_lost_ones_are(run) -> None:
    kept, _ = kept_arm(run, *_arm())
    path = kept.path(2)
    before = path.read_bytes()
    accuracy = run.ablations().select("accuracy").collect()
    ablate(run, keep_every=2, **ARM)
    assert path.read_bytes() == before
    path.unlink()
    ablate(run, keep_every=2, **ARM)
    assert path.read_bytes() == before
    assert run.ablations().select("accuracy").collect().equals(accuracy)


def _arm() -> tuple[Arm, int]:
    return Arm("q3", 0.2), 0


def test_what_was_not_kept_is_named_with_what_was(run) -> None:
    with pytest.raises(RunError, match=r"no kept weights of all .* but of q3:0.2 .seed 0.*--keep"):
        track(run, arm="all")
    with pytest.raises(OptionError, match="an arm such as"):
        track(run, arm="q3")
    with pytest.raises(OptionError, match="--limit"):
        track(run, arm="q3:0.2", limit=0)


def test_altered_weights_are_refused(run) -> None:
    kept, _ = kept_arm(run, *_arm())
    path = kept.path(4)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + b"\x7f")
    with pytest.raises(RunError, match="missing or was altered"):
        track(run, arm="q3:0.2", overwrite=True, **pair())
    path.write_bytes(sound)
    rows = track(run, arm="q3:0.2", **pair())
    assert rows.filter(pl.col("step") == 4).height
