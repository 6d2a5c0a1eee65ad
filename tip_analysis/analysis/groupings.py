"""Groupings of tokens by name: place, frequency, kind, segment, turn, and whether the rollout was
right.

A grouping says which columns it reads; one whose columns a table lacks is not available there.
`reward` is a column of rollouts: `with_rewards` brings it to the tokens. `correct` is a reward
above ½. The first error of an incorrect rollout is the first token that was planted as an error
where labels are known (the arithmetic pair), else the first to which the teacher gives less than 1%
(`teacher_logprob`), a stand-in for what a judge would mark.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import polars as pl

from tip_analysis.core.errors import SchemaError, UnknownNameError
from tip_analysis.core.schema import LATER_COLUMNS

POSITION_EDGES = (0, 1, 4, 16, 64, 256, 1024)
"""First position of each group of positions."""


def token_kind(token: pl.Expr) -> pl.Expr:
    """What a token looks like: special, line break, space, number, punctuation, word start, word
    part or other.

    Only the text decides; the first that fits is taken. A leading space (also as `▁` or `Ġ`) starts
    a word.
    """
    bare = token.str.replace_all("^[ \u2581\u0120]+", "")
    return (
        pl.when(token.str.contains(r"^<[^<>\s]+>$"))
        .then(pl.lit("special"))
        .when(token.str.contains("[\n\u010a]"))
        .then(pl.lit("line break"))
        .when(bare.str.contains(r"^\s*$"))
        .then(pl.lit("space"))
        .when(bare.str.contains(r"^\p{N}[\p{N}.,]*$"))
        .then(pl.lit("number"))
        .when(bare.str.contains(r"^[\p{P}\p{S}]+$"))
        .then(pl.lit("punctuation"))
        .when(token.str.contains("^[ \u2581\u0120]") & bare.str.contains(r"^\p{L}"))
        .then(pl.lit("word start"))
        .when(bare.str.contains(r"^\p{L}"))
        .then(pl.lit("word part"))
        .otherwise(pl.lit("other"))
    )


_POSITION_NAMES = (
    *(
        f"{low}" if high == low + 1 else f"{low}–{high - 1}"
        for low, high in pairwise(POSITION_EDGES)
    ),
    f"{POSITION_EDGES[-1]}+",
)
_FREQUENCY_NAMES = (
    "rarest fifth",
    "second fifth",
    "middle fifth",
    "fourth fifth",
    "commonest fifth",
)
_KIND_NAMES = (
    "word start",
    "word part",
    "number",
    "punctuation",
    "space",
    "line break",
    "special",
    "other",
)


def position_group(position: pl.Expr) -> pl.Expr:
    """Which span of positions: 0, 1–3, 4–15, 16–63 …"""
    span = pl.sum_horizontal((position >= edge).cast(pl.Int8) for edge in POSITION_EDGES[1:])
    return span.replace_strict(dict(enumerate(_POSITION_NAMES)), return_dtype=pl.String)


def frequency_group(token_id: pl.Expr) -> pl.Expr:
    """Fifths of the table by how often their token occurs in it, from rarest to commonest; equal
    counts stay together."""
    count = pl.len().over(token_id).cast(pl.Float64)
    fifth = (
        ((count.rank("average") - 0.5) / pl.len() * len(_FREQUENCY_NAMES))
        .floor()
        .clip(0, len(_FREQUENCY_NAMES) - 1)
    )
    return fifth.cast(pl.Int8).replace_strict(
        dict(enumerate(_FREQUENCY_NAMES)), return_dtype=pl.String
    )


RELATIVE_NAMES = ("first fifth", "second fifth", "third fifth", "fourth fifth", "last fifth")
CORRECT_NAMES = ("correct", "incorrect", "ungraded")
ERROR_NAMES = (
    "correct",
    "incorrect, before the first error",
    "incorrect, from the first error on",
    "incorrect, no error found",
    "ungraded",
)
SEGMENT_NAMES = ("think", "answer", "tool_call", "other")
PART_NAMES = (
    "think",
    "call: name",
    "call: argument",
    "call: syntax",
    "tool_call",
    "answer",
    "other",
)
LARGEST_TURN = 8
TURN_NAMES = (*(f"turn {turn}" for turn in range(1, LARGEST_TURN)), f"turn {LARGEST_TURN}+")
REJECTED = math.log(0.01)
"""ln P_T of a token below which the teacher rejects it."""


def relative_position_group() -> pl.Expr:
    """Fifths of the rollout."""
    length = pl.col("position").max().over("rollout_id") + 1
    fifth = (pl.col("position") * len(RELATIVE_NAMES) // length).cast(pl.Int64)
    return fifth.replace_strict(dict(enumerate(RELATIVE_NAMES)), return_dtype=pl.String)


def correct_group() -> pl.Expr:
    """Whether the rollout's reward is above ½."""
    correct, incorrect, ungraded = map(pl.lit, CORRECT_NAMES)
    reward = pl.col("reward")
    return (
        pl.when(reward.is_null())
        .then(ungraded)
        .when(reward > 0.5)
        .then(correct)
        .otherwise(incorrect)
    )


def first_error_group() -> pl.Expr:
    """Before or after the first error of an incorrect rollout."""
    correct, before, after, none, ungraded = map(pl.lit, ERROR_NAMES)
    planted = pl.col("planted_label").cast(pl.String) == "planted_error"
    labelled = pl.col("planted_label").is_not_null().any().over("rollout_id")
    is_error = pl.when(labelled).then(planted).otherwise(pl.col("teacher_logprob") < REJECTED)
    first = pl.when(is_error).then("position").min().over("rollout_id")
    reward = pl.col("reward")
    return (
        pl.when(reward.is_null())
        .then(ungraded)
        .when(reward > 0.5)
        .then(correct)
        .when(first.is_null())
        .then(none)
        .when(pl.col("position") < first)
        .then(before)
        .otherwise(after)
    )


def part_group() -> pl.Expr:
    """The segment, and within a tool call its part."""
    segment, part = pl.col("segment").cast(pl.String), pl.col("call_part").cast(pl.String)
    of_call = pl.format("call: {}", part)
    return pl.when(part.is_not_null()).then(of_call).otherwise(segment)


def turn_group() -> pl.Expr:
    """Which of the student's turns."""
    turn = pl.col("turn").clip(0, LARGEST_TURN - 1).cast(pl.Int64)
    return turn.replace_strict(dict(enumerate(TURN_NAMES)), return_dtype=pl.String)


@dataclass(frozen=True)
class Grouping:
    """How tokens are grouped."""

    columns: tuple[str, ...]
    """What it reads beside the tokens' keys."""
    group: Callable[[], pl.Expr]
    """The group of each token, over the rows that the student wrote."""
    names: tuple[str, ...]
    """Its groups, in order."""
    title: str
    """What it is called in a figure."""


GROUPINGS: dict[str, Grouping] = {
    "position": Grouping(
        ("position",),
        lambda: position_group(pl.col("position")),
        _POSITION_NAMES,
        "position in the response",
    ),
    "frequency": Grouping(
        ("token_id",),
        lambda: frequency_group(pl.col("token_id")),
        _FREQUENCY_NAMES,
        "how common the token is",
    ),
    "kind": Grouping(("token",), lambda: token_kind(pl.col("token")), _KIND_NAMES, "kind of token"),
    "relative_position": Grouping(
        ("position", "rollout_id"),
        relative_position_group,
        RELATIVE_NAMES,
        "place within the response",
    ),
    "segment": Grouping(
        ("segment",), lambda: pl.col("segment").cast(pl.String), SEGMENT_NAMES, "segment"
    ),
    "part": Grouping(("segment", "call_part"), part_group, PART_NAMES, "part of the turn"),
    "turn": Grouping(("turn",), turn_group, TURN_NAMES, "turn"),
    "correct": Grouping(("reward",), correct_group, CORRECT_NAMES, "whether the answer was right"),
    "first_error": Grouping(
        ("reward", "rollout_id", "position", "teacher_logprob", "planted_label"),
        first_error_group,
        ERROR_NAMES,
        "before and after the first error",
    ),
}
"""Every grouping by name."""


def grouping(name: str) -> Grouping:
    """The grouping of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in GROUPINGS:
        raise UnknownNameError("grouping", name, GROUPINGS)
    return GROUPINGS[name]


def available_groupings(tokens: pl.LazyFrame | pl.DataFrame) -> list[str]:
    """Those whose columns a table has; a column that came later and is null throughout counts as
    missing."""
    present = set(tokens.lazy().collect_schema().names())
    if later := sorted(present & LATER_COLUMNS["tokens"]):
        known = tokens.lazy().select(pl.col(later).is_not_null().any()).collect()
        present -= {name for name in later if not known[name].item()}
    return [name for name, one in GROUPINGS.items() if present >= set(one.columns)]


def with_rewards(
    tokens: pl.LazyFrame | pl.DataFrame, rollouts: pl.LazyFrame | pl.DataFrame
) -> pl.LazyFrame:
    """Tokens with their rollout's `reward`, in their order."""
    rewards = rollouts.lazy().select("rollout_id", pl.col("reward").cast(pl.Float64))
    return tokens.lazy().join(rewards, on="rollout_id", how="left", maintain_order="left")


def with_group(tokens: pl.DataFrame, name: str, column: str = "group") -> pl.DataFrame:
    """Tokens that the student wrote with their group, rows without one (null) left out.

    Raises:
        UnknownNameError: there is no such grouping.
        SchemaError: the table lacks what it reads.
    """
    chosen = available_grouping(tokens, name)
    return tokens.with_columns(chosen.group().alias(column)).drop_nulls(column)


def available_grouping(tokens: pl.LazyFrame | pl.DataFrame, name: str) -> Grouping:
    """The grouping of that name, whose columns the table has.

    Raises:
        UnknownNameError: there is no such grouping.
        SchemaError: the table lacks what it reads.
    """
    chosen, present = grouping(name), tokens.lazy().collect_schema().names()
    if missing := [each for each in chosen.columns if each not in present]:
        hint = "; `with_rewards` brings rewards to the tokens" if "reward" in missing else ""
        raise SchemaError(
            f"grouping {name!r} needs the column(s) {', '.join(missing)}, which the token table"
            f" lacks{hint}"
        )
    return chosen
