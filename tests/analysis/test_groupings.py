"""Groupings of tokens: each by hand on a few rows."""

import polars as pl
import pytest
from synthetic import make_tables

from tip_analysis.analysis.groupings import GROUPINGS, available_groupings, with_group, with_rewards
from tip_analysis.analysis.groups import association, group_effects
from tip_analysis.core.errors import SchemaError, UnknownNameError

LABELS = ["plain", "plain", "planted_error", "plain", "planted_error"]


def rollout(name: str, reward: float | None, labels=LABELS, teacher=None) -> pl.DataFrame:
    size = len(labels)
    return pl.DataFrame(
        {
            "rollout_id": [name] * size,
            "position": range(size),
            "reward": [reward] * size,
            "planted_label": labels,
            "teacher_logprob": teacher or [-0.1] * size,
        },
        schema_overrides={"reward": pl.Float64, "planted_label": pl.String},
    )


def groups_of(table: pl.DataFrame, name: str) -> dict[str, list[str]]:
    found = with_group(table, name)
    return {key[0]: part["group"].to_list() for key, part in found.group_by("rollout_id")}


def test_before_and_after_the_first_planted_error() -> None:
    table = pl.concat(
        [rollout("right", 1.0), rollout("wrong", 0.0), rollout("none", None),
         rollout("clean", 0.0, ["plain"] * 5)]
    )  # fmt: skip
    found = groups_of(table, "first_error")
    before, after = "incorrect, before the first error", "incorrect, from the first error on"
    assert found["right"] == ["correct"] * 5
    assert found["wrong"] == [before, before, after, after, after]
    assert found["none"] == ["ungraded"] * 5
    assert found["clean"] == ["incorrect, no error found"] * 5


def test_without_labels_the_first_error_is_what_the_teacher_rejects() -> None:
    table = rollout("wrong", 0.0, [None] * 4, [-0.1, -4.0, -5.0, -9.0])
    assert groups_of(table, "first_error")["wrong"] == [
        "incorrect, before the first error",
        "incorrect, before the first error",
        "incorrect, from the first error on",
        "incorrect, from the first error on",
    ]  # ln 0.01 = −4.6


def test_correct_is_a_reward_above_one_half() -> None:
    table = pl.concat([rollout(str(reward), reward) for reward in (0.0, 0.5, 0.51, 1.0)])
    assert {name: set(groups) for name, groups in groups_of(table, "correct").items()} == {
        "0.0": {"incorrect"},
        "0.5": {"incorrect"},
        "0.51": {"correct"},
        "1.0": {"correct"},
    }


def test_relative_positions_are_fifths_of_the_rollout() -> None:
    table = pl.concat([rollout("ten", 1.0, ["plain"] * 10), rollout("three", 1.0, ["plain"] * 3)])
    found = groups_of(table, "relative_position")
    names = ["first", "second", "third", "fourth", "last"]
    assert found["ten"] == [f"{name} fifth" for name in names for _ in range(2)]
    assert found["three"] == ["first fifth", "second fifth", "fourth fifth"]


def test_segments_and_turns_where_a_run_has_them() -> None:
    table = rollout("one", 1.0).with_columns(
        segment=pl.Series(["think", "think", "answer", None, "tool_call"]),
        turn=pl.Series([0, 0, 1, 7, 20]),
    )
    assert groups_of(table, "segment")["one"] == ["think", "think", "answer", "tool_call"]
    assert groups_of(table, "turn")["one"] == ["turn 1", "turn 1", "turn 2", "turn 8+", "turn 8+"]
    assert {"segment", "turn"} <= set(available_groupings(table))


def test_a_grouping_that_a_run_lacks_is_refused_by_name() -> None:
    tokens = make_tables(num_prompts=2).tokens
    assert "correct" not in available_groupings(tokens)
    with pytest.raises(SchemaError, match="`with_rewards` brings rewards"):
        group_effects(tokens, grouping="correct", num_resamples=2)
    with pytest.raises(UnknownNameError, match="relative_position"):
        group_effects(tokens, grouping="place")


def test_every_grouping_takes_part_in_statistics() -> None:
    tables = make_tables(num_prompts=4)
    tokens = with_rewards(tables.tokens, tables.rollouts)
    names = available_groupings(tokens)
    assert {"position", "frequency", "kind", "relative_position", "correct", "first_error"} <= set(
        names
    )
    told = association(tokens, num_resamples=4)
    assert told["grouping"].to_list() == names
    for name in names:
        table = group_effects(tokens, grouping=name, num_resamples=4)
        assert set(table["group"]) <= set(GROUPINGS[name].names)
        assert table["num_tokens"].sum() == tables.tokens.height


def test_columns_that_are_null_throughout_are_no_grouping() -> None:
    tokens = make_tables(num_prompts=2, mean_length=10).tokens
    assert {"segment", "turn"} <= set(available_groupings(tokens))
    assert "part" not in available_groupings(tokens)  # no tool was called
    later = ("turn", "segment", "call_part")
    before = tokens.with_columns(pl.lit(None, tokens.schema[name]).alias(name) for name in later)
    names = available_groupings(before)
    assert not {"segment", "turn", "part"} & set(names)
    assert association(before, among=names, num_resamples=2)["grouping"].to_list() == names


def test_parts_of_a_turn() -> None:
    table = pl.DataFrame(
        {
            "rollout_id": ["a"] * 5,
            "segment": ["think", "tool_call", "tool_call", "answer", "other"],
            "call_part": [None, "name", "argument", None, None],
        }
    )
    assert groups_of(table, "part")["a"] == [
        "think", "call: name", "call: argument", "answer", "other",
    ]  # fmt: skip
