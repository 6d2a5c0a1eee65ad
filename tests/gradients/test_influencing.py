"""Influence on the arithmetic pair: rows of a run, and what a real step does."""

import copy

import numpy as np
import polars as pl
import pytest
import torch
from instrument_runs import arithmetic_pair, arithmetic_run

from tip_analysis.analysis.influences import (
    assumption_2,
    influence_columns,
    influence_matrix,
    recorded_norms,
)
from tip_analysis.analysis.measurements import run_measurement
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core import result_tables as contracts
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.result_tables import checked
from tip_analysis.gradients.influencing import influence
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.output_head import OutputHead
from tip_analysis.scoring.scorer import Scorer

CUTS = Taxonomy(0.3, 0.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return arithmetic_run(tmp_path_factory.mktemp("run") / "run", num_prompts=10, gradients=True)


def pair() -> dict:
    student, teacher = arithmetic_pair()
    return {"student": student, "teacher": teacher}


def test_rows_are_kept_and_summed_up(run) -> None:
    rows = influence(run, taxonomy=CUTS, **pair())
    assert influence(run, taxonomy=CUTS).equals(rows)  # no model is loaded
    matrix = checked(influence_matrix(rows, num_resamples=50), contracts.InfluenceMatrix)
    names = sorted(rows["group"].unique())
    assert matrix.height == len(names) ** 2
    wide = influence_columns(rows)
    assert wide.height == rows.height / len(names)
    tokens = run.tokens().filter("loss_mask").collect()
    assert wide.height == tokens.height
    q3 = wide.filter(group="Q3")
    for fold in (0, 1):
        weights = rows.filter(source=names[0], fold=fold)["weight"]
        assert weights.sum() == pytest.approx(1.0)
    one = matrix.filter(source="Q4", target="Q3").row(0, named=True)
    assert one["influence"] == pytest.approx((q3["influence_Q4"] * q3["weight"]).sum() / 2)
    assert one["per_token"] == pytest.approx(
        one["influence"] / (one["weight_source"] * one["weight_target"])
    )
    measured = run_measurement(run).rows(run.gradients())
    table = checked(assumption_2(rows, measured, recorded_norms(run, rows)), contracts.DroppedTable)
    assert set(table["group"]) == {*names, "all"}
    assert (table["norm_sq"] > 0).all()
    assert table["kept"].null_count() == 0


def test_a_lost_shard_is_made_again_to_the_same(run) -> None:
    rows = influence(run, taxonomy=CUTS, **pair())
    (key,) = [key for key in run.stages() if key.startswith("influence")]
    run.stage(key).path(1).unlink()
    again = influence(run, taxonomy=CUTS, **pair())
    assert again.drop("grad_dot_source").equals(rows.drop("grad_dot_source"))
    found, known = again["grad_dot_source"], rows["grad_dot_source"]
    assert (found - known).abs().max() <= 1e-6 * known.abs().max()


def test_other_groupings_and_what_a_run_lacks(run) -> None:
    rows = influence(run, grouping="correct", **pair())
    assert set(rows["group"]) <= {"correct", "incorrect", "ungraded"}
    if "segment" not in run.tokens().collect_schema().names():
        with pytest.raises(SchemaError, match="segment"):
            influence(run, grouping="segment")
    with pytest.raises(OptionError, match="--limit"):
        influence(run, limit=0)


def test_a_small_step_changes_each_groups_loss_as_predicted(run) -> None:
    """SGD on one group's tokens of one fold changes the losses of the other fold's groups by
    −η ⟨∇L_a, ∇L_b⟩: correlation at least 0.95 over all pairs."""
    rows = influence(run, taxonomy=CUTS, **pair())
    predicted, realised = realised_changes(run, rows, rate=1e-3)
    assert len(predicted) >= 9
    assert np.corrcoef(predicted, realised)[0, 1] >= 0.95


def realised_changes(run, rows: pl.DataFrame, rate: float) -> tuple[list[float], list[float]]:
    """Predicted and realised change of every group's loss in fold 1 after a step on each group's
    tokens of fold 0."""
    student, teacher = arithmetic_pair()
    rollouts = run.rollouts().collect()
    places = rows.filter(source=rows["source"][0])
    names = sorted(places["group"].unique())
    before = group_losses(student, teacher, rollouts, places, names)
    predicted, realised = [], []
    for name in names:
        stepped = step_on(student, teacher, rollouts, places.filter(group=name, fold=0), rate)
        after = group_losses(stepped, teacher, rollouts, places, names)
        for target in names:
            along = rows.filter(source=name, group=target, fold=1)
            predicted.append(-rate * (along["grad_dot_source"] * along["weight"]).sum())
            realised.append(after[target] - before[target])
    return predicted, realised


def group_losses(student, teacher, rollouts, places, names) -> dict[str, float]:
    """Σ w δ over each group's tokens in fold 1, scored as the package scores."""
    tokens = Scorer(student, teacher, compile=False).token_table(rollouts)
    joined = places.filter(fold=1).join(tokens, on=["rollout_id", "position"])
    loss = pl.col("weight") * pl.col("reverse_kl").cast(pl.Float64)
    return {name: joined.filter(group=name).select(loss.sum()).item() for name in names}


def step_on(student, teacher, rollouts, places, rate: float) -> LanguageModel:
    """A copy of the student after one plain step, by torch's own backward pass."""
    network = copy.deepcopy(student.model).requires_grad_(True)
    chosen = {
        str(name): part.select("position", "weight").rows()
        for (name,), part in places.group_by("rollout_id")
    }
    for row in rollouts.iter_rows(named=True):
        if row["rollout_id"] not in chosen:
            continue
        ids = torch.tensor([[*row["prompt_token_ids"], *row["response_token_ids"]]])
        start = len(row["prompt_token_ids"]) - 1
        with torch.no_grad():
            theirs = teacher.model(input_ids=ids).logits[0].log_softmax(-1)
        ours = network(input_ids=ids).logits[0].log_softmax(-1)
        size = min(ours.shape[-1], theirs.shape[-1])
        loss = sum(
            weight
            * (
                ours[start + t, :size].exp() * (ours[start + t, :size] - theirs[start + t, :size])
            ).sum()
            for t, weight in chosen[row["rollout_id"]]
        )
        loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad)
    network.requires_grad_(False)
    return LanguageModel(student.name, network, student.tokenizer, OutputHead(network))
