"""Position, frequency and kind of token against the quadrant, and rewards against quadrant
shares."""

import math

import numpy as np
import polars as pl
import pytest
from scipy import stats
from synthetic import make_tables

from tip_analysis.analysis.groupings import frequency_group, position_group, token_kind
from tip_analysis.analysis.groups import association, group_effects, reward_effects
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.core.errors import SchemaError, UnknownNameError
from tip_analysis.core.names import Quadrant


@pytest.fixture(scope="module")
def tables():
    return make_tables(num_prompts=8, rollouts_per_prompt=4, mean_length=25)


def frame(quadrants: list[str], **columns: list) -> pl.DataFrame:
    """Tokens of two prompts whose quadrants under cuts at 1 nat are those given."""
    size = len(quadrants)
    return pl.DataFrame(
        {
            "rollout_id": [f"{'ab'[i % 2]}/0" for i in range(size)],
            "prompt_id": ["ab"[i % 2] for i in range(size)],
            "position": [i // 2 for i in range(size)],
            "batch_id": [0] * size,
            "loss_mask": [True] * size,
            "student_entropy": [2.0 if q in ("Q1", "Q2") else 0.0 for q in quadrants],
            "reverse_kl": [2.0 if q in ("Q1", "Q3") else 0.0 for q in quadrants],
            "token": ["x"] * size,
            "token_id": [0] * size,
            **columns,
        }
    )


CUTS = {"entropy_cut": 1.0, "divergence_cut": 1.0, "num_resamples": 20}


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        (" the", "word start"),
        ("\u2581the", "word start"),
        ("\u0120the", "word start"),
        ("able", "word part"),
        (" naïve", "word start"),
        ("你", "word part"),
        (" سلام", "word start"),
        ("12", "number"),
        (" 3.14", "number"),
        ("+", "punctuation"),
        (" ...", "punctuation"),
        ("=", "punctuation"),
        (" ", "space"),
        ("\u0120", "space"),
        ("\n", "line break"),
        (".\n\n", "line break"),
        ("<|im_end|>", "special"),
        ("<eos>", "special"),
        ("<", "punctuation"),
        ("", "space"),
        ("\x01", "other"),
        ("👍", "punctuation"),
    ],
)
def test_kinds_of_tokens(token: str, kind: str) -> None:
    assert pl.select(token_kind(pl.lit(token))).item() == kind


def test_spans_of_positions() -> None:
    table = pl.DataFrame({"position": [0, 1, 3, 4, 15, 16, 1023, 1024, 9999]})
    groups = table.select(position_group(pl.col("position"))).to_series().to_list()
    assert groups == ["0", "1–3", "1–3", "4–15", "4–15", "16–63", "256–1023", "1024+", "1024+"]


def test_fifths_of_frequency() -> None:
    ids = [0] * 50 + [1] * 30 + list(range(2, 22))
    groups = (
        pl.DataFrame({"token_id": ids})
        .select(frequency_group(pl.col("token_id")))
        .to_series()
        .to_list()
    )
    assert groups == ["fourth fifth"] * 50 + ["second fifth"] * 30 + ["rarest fifth"] * 20


def test_effects_by_eye() -> None:
    tokens = frame(
        ["Q1", "Q1", "Q3", "Q3", "Q4", "Q4", "Q4", "Q1"],
        token=["+", "+", "+", "+", " a", " a", " a", " a"],
    )
    table = group_effects(tokens, grouping="kind", **CUTS)
    assert table["group"].unique(maintain_order=True).to_list() == ["word start", "punctuation"]
    row = table.filter(group="punctuation", quadrant="Q3").row(0, named=True)
    assert (row["share"], row["lift"], row["composition"], row["num_tokens"]) == (0.5, 2.0, 1.0, 2)
    row = table.filter(group="word start", quadrant="Q1").row(0, named=True)
    assert (row["share"], row["lift"], row["composition"]) == (
        0.25,
        pytest.approx(0.25 / 0.375),
        pytest.approx(1 / 3),
    )
    assert table.filter(quadrant="Q2")["lift"].null_count() == 2


@pytest.mark.parametrize("grouping", ["position", "frequency", "kind"])
def test_effects_equal_counting(tables, grouping: str) -> None:
    table = group_effects(tables.tokens, grouping=grouping, num_resamples=10)
    column, group = {
        "position": ("position", position_group),
        "frequency": ("token_id", frequency_group),
        "kind": ("token", token_kind),
    }[grouping]
    counted = (
        assign_quadrants(tables.tokens).with_columns(group(pl.col(column)).alias("group")).collect()
    )
    for row in table.iter_rows(named=True):
        members = counted.filter(pl.col("group") == row["group"])
        both = members.filter(pl.col("quadrant") == row["quadrant"]).height
        assert row["num_tokens"] == both
        assert row["share"] == pytest.approx(both / members.height)
        overall = counted.filter(pl.col("quadrant") == row["quadrant"]).height
        assert row["composition"] == pytest.approx(both / overall)
        assert row["lift"] == pytest.approx(both / members.height / (overall / counted.height))
    assert table.group_by("group").agg(pl.col("share").sum())["share"].to_list() == pytest.approx(
        [1.0] * (table.height // 4)
    )


def test_association_is_one_when_the_group_is_the_quadrant_and_zero_when_it_tells_nothing() -> None:
    quadrants = ["Q1", "Q1", "Q3", "Q3"] * 4
    same = frame(quadrants, token=["+" if q == "Q1" else " a" for q in quadrants])
    row = association(same, **CUTS).filter(grouping="kind").row(0, named=True)
    assert row["explained"] == pytest.approx(1.0)
    assert row["cramers_v"] == pytest.approx(1.0)
    apart = frame(quadrants, token=["+", "+", "+", "+", " a", " a", " a", " a"] * 2)
    row = association(apart, **CUTS).filter(grouping="kind").row(0, named=True)
    assert row["explained"] == pytest.approx(0.0, abs=1e-12)
    assert row["cramers_v"] == pytest.approx(0.0, abs=1e-12)


def test_association_equals_its_definition(tables) -> None:
    row = association(tables.tokens, num_resamples=5).filter(grouping="kind").row(0, named=True)
    counted = (
        assign_quadrants(tables.tokens)
        .with_columns(token_kind(pl.col("token")).alias("group"))
        .collect()
    )
    table = (
        counted.group_by("group", "quadrant")
        .len()
        .pivot(on="quadrant", index="group", values="len")
        .fill_null(0)
    )
    counts = table.drop("group").to_numpy().astype(float)
    joint = counts / counts.sum()
    information = sum(
        joint[i, j] * math.log(joint[i, j] / (joint[i].sum() * joint[:, j].sum()))
        for i, j in np.argwhere(joint > 0)
    )
    assert row["explained"] == pytest.approx(information / stats.entropy(joint.sum(0)))
    assert row["cramers_v"] == pytest.approx(
        stats.contingency.association(counts.astype(int), method="cramer")
    )


def test_rewards_against_shares(tables) -> None:
    table = reward_effects(tables.tokens, tables.rollouts, num_resamples=10)
    quadrants = assign_quadrants(tables.tokens).collect()
    shares = {
        q: quadrants.group_by("rollout_id").agg((pl.col("quadrant") == q).mean().alias("share"))
        for q in Quadrant
    }
    for row in table.iter_rows(named=True):
        joined = shares[row["quadrant"]].join(
            tables.rollouts.select("rollout_id", "reward"), on="rollout_id"
        )
        good, bad = (
            joined.filter(pl.col("reward") > 0.5)["share"].mean(),
            joined.filter(pl.col("reward") <= 0.5)["share"].mean(),
        )
        assert row["share_rewarded"] == pytest.approx(good)
        assert row["share_unrewarded"] == pytest.approx(bad)
        assert row["difference"] == pytest.approx(good - bad)
        assert row["spearman"] == pytest.approx(
            stats.spearmanr(joined["share"], joined["reward"]).statistic
        )


def test_errors(tables) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'position'"):
        group_effects(tables.tokens, grouping="positions")
    with pytest.raises(SchemaError, match="none has a reward"):
        reward_effects(tables.tokens, tables.rollouts.with_columns(reward=pl.lit(None, pl.Float32)))
    with pytest.raises(SchemaError, match="token_id"):
        group_effects(tables.tokens.drop("token_id"), grouping="frequency")
