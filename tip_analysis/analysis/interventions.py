"""The causal test of tokens: which are tested, and what replacing them did to success.

Reads the token table and rows of `instrument_tables.InterventionTable`; writes nothing. A test puts
the student's own token, the teacher's most likely one or a fresh sample in a token's place, and
lets the student finish the response n times; success is the mean reward. Δ is paired: both choices
of a token share their prompt, their context and the random numbers of their continuations, so that
equal tokens have a Δ of exactly 0.

Tests are drawn as many from each quadrant: at random from Q1, Q2 and Q3, and from Q4 as matched
controls, each the nearest Q4 token of the same rollout. What is said of a quadrant holds for its
tokens; what is said of all tests is of this sample, in which rare quadrants weigh more.
"""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from tip_analysis.analysis.bootstrap import (
    Floats,
    bootstrap_interval,
    expanded_interval,
    group_index,
    prompt_weights,
    sums_by_group,
)
from tip_analysis.analysis.correlations import RankedColumn
from tip_analysis.analysis.counter_random import random_exponentials
from tip_analysis.analysis.scores import add_scores
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.names import ForcedToken, Quadrant

NUM_RESAMPLES = 1000
SCORES = (
    "student_entropy",
    "reverse_kl",
    "forward_kl",
    "jsd",
    "soft_or",
    "q3_score",
    "teachability",
    "teacher_surprise",
)
"""Scores that are judged by whether they find the tokens whose replacement raises success."""
_PLACE = ["rollout_id", "position"]


def draw_tests(placed: pl.DataFrame, num_tokens: int, *, seed: int = 0) -> pl.DataFrame:
    """The tokens to test, as many from each quadrant as there are.

    Args:
        placed: tokens that may be tested, with `quadrant`; their order does not matter.
        num_tokens: how many.
        seed: of the draw, which depends on nothing else but the tokens.

    Returns:
        rollout_id, position, prompt_id, stratum (the quadrant), sorted by rollout and position.

    Raises:
        OptionError: `num_tokens` is below 1.
        SchemaError: a column is missing, or no token may be tested.
    """
    if num_tokens < 1:
        raise OptionError(f"num_tokens must be at least 1; found {num_tokens}")
    require_columns(placed.lazy(), [*_PLACE, "prompt_id", "quadrant"], "draw_tests")
    if placed.is_empty():
        raise SchemaError("no token may be tested: graded rollouts with scored tokens are needed")
    draw = random_exponentials(placed["rollout_id"], placed["position"], seed)
    ordered = placed.with_columns(_draw=pl.Series(draw)).sort("_draw", *_PLACE)
    quota = -(-num_tokens // 4)
    drawn = [
        ordered.filter(pl.col("quadrant") == name).head(quota)
        for name in (Quadrant.Q1, Quadrant.Q2, Quadrant.Q3)
    ]
    solved = ordered.filter(pl.col("quadrant") == Quadrant.Q4)
    chosen = pl.concat([*drawn, _controls(pl.concat(drawn), solved, quota)])
    rest = ordered.join(chosen.select(_PLACE), on=_PLACE, how="anti", maintain_order="left")
    chosen = pl.concat([chosen, rest.head(max(0, num_tokens - chosen.height))])
    tests = chosen.sort("_draw").head(num_tokens) if chosen.height > num_tokens else chosen
    return tests.select(*_PLACE, "prompt_id", stratum="quadrant").sort(_PLACE)


def _controls(drawn: pl.DataFrame, solved: pl.DataFrame, quota: int) -> pl.DataFrame:
    """For drawn tokens in turn the nearest Q4 token of the same rollout that is not taken yet."""
    free: dict[str, list[int]] = {}
    for rollout_id, position in solved.select(_PLACE).iter_rows():
        free.setdefault(rollout_id, []).append(position)
    taken: list[tuple[str, int]] = []
    for rollout_id, position in drawn.sort("_draw").select(_PLACE).iter_rows():
        if len(taken) == quota:
            break
        if near := free.get(rollout_id):
            best = min(near, key=lambda other: (abs(other - position), other))
            near.remove(best)
            taken.append((rollout_id, best))
    keys = pl.DataFrame(taken, schema={name: solved.schema[name] for name in _PLACE}, orient="row")
    return keys.join(solved, on=_PLACE, how="left", maintain_order="left").select(solved.columns)


def token_outcomes(rows: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
    """One row per tested token: its mean success under each choice, and Δ against the student's
    own.

    Returns:
        rollout_id, position, prompt_id, stratum, success_student, success_teacher, success_fresh,
        teacher_delta, fresh_delta, teacher_differs (whether the teacher's choice is another token).
    """
    table = rows.lazy().collect()
    require_columns(table.lazy(), [*_PLACE, "choice", "reward", "test_key"], "token_outcomes")
    if table["test_key"].n_unique() != 1:
        raise SchemaError(
            f"tests of one configuration are needed, found {table['test_key'].n_unique()}: filter"
            " by test_key"
        )
    wide = table.group_by(*_PLACE, "prompt_id", "stratum", maintain_order=True).agg(
        *(
            pl.col("reward")
            .filter(pl.col("choice") == choice)
            .cast(pl.Float64)
            .mean()
            .alias(f"success_{choice}")
            for choice in ForcedToken
        ),
        *(
            pl.col("forced_token_id").filter(pl.col("choice") == choice).first().alias(choice)
            for choice in (ForcedToken.STUDENT, ForcedToken.TEACHER)
        ),
    )
    own = pl.col("success_student")
    return wide.with_columns(
        teacher_delta=pl.col("success_teacher") - own,
        fresh_delta=pl.col("success_fresh") - own,
        teacher_differs=pl.col("student") != pl.col("teacher"),
    ).drop("student", "teacher")


def intervention_effects(
    rows: pl.DataFrame | pl.LazyFrame,
    groups: pl.DataFrame | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> pl.DataFrame:
    """Mean paired Δ success of each group of tested tokens.

    Args:
        rows: rows of `InterventionTable` of one configuration.
        groups: rollout_id, position, group; by default the quadrant that a token was drawn from.
        num_resamples, seed: of prompts.

    Returns:
        A `result_tables.EffectTable`: group (and `all`), choice (teacher, fresh), success_student,
        difference with low and high, num_tokens, num_prompts, differing_share (of the group's
        tokens whose forced token is another one than the student's; null for fresh samples).
    """
    tokens = token_outcomes(rows)
    if groups is None:
        tokens = tokens.with_columns(group=pl.col("stratum").cast(pl.String))
    else:
        tokens = tokens.join(groups.select(*_PLACE, "group"), on=_PLACE, how="inner")
    names = sorted(tokens["group"].drop_nulls().unique())
    parts = [(name, tokens.filter(pl.col("group") == name)) for name in names]
    return pl.DataFrame(
        [
            _effect(name, part, choice, num_resamples, seed)
            for name, part in [*parts, ("all", tokens)]
            for choice in (ForcedToken.TEACHER, ForcedToken.FRESH)
            if part.height
        ],
        schema_overrides={"choice": pl.Enum(ForcedToken), "differing_share": pl.Float64},
    )


def _effect(
    name: str, part: pl.DataFrame, choice: ForcedToken, num_resamples: int, seed: int
) -> dict[str, object]:
    prompts = group_index(part["prompt_id"])
    size = int(prompts.max()) + 1
    columns = np.column_stack([part[f"{choice}_delta"].to_numpy(), np.ones(part.height)])
    sums = sums_by_group(columns, prompts, size)
    found = bootstrap_interval(sums[:, :1], sums[:, 1:], num_resamples=num_resamples, seed=seed)
    return {
        "group": name,
        "choice": str(choice),
        "success_student": part["success_student"].mean(),
        "difference": _known(found.value[0]),
        "low": _known(found.low[0]),
        "high": _known(found.high[0]),
        "num_tokens": part.height,
        "num_prompts": size,
        "differing_share": part["teacher_differs"].cast(pl.Float64).mean()
        if choice is ForcedToken.TEACHER
        else None,
    }


def intervention_aucs(
    rows: pl.DataFrame | pl.LazyFrame,
    tokens: pl.DataFrame | pl.LazyFrame,
    *,
    scores: Sequence[str] = SCORES,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> pl.DataFrame:
    """How well each score finds the tokens whose replacement by the teacher's raises success.

    Args:
        rows: rows of `InterventionTable` of one configuration.
        tokens: the token table.
        scores: columns of the scored table, or `teachability` (δ times the teacher's mass on the
            student's likeliest tokens), `teacher_surprise` (−ln P_T of the student's token).
        num_resamples, seed: of prompts.

    Returns:
        A `result_tables.AucTable`: score, auc with low and high (null where all tests are of one
        kind), num_raised, num_tokens.
    """
    tested = token_outcomes(rows)
    joined = tested.join(_scored(tokens, scores), on=_PLACE, how="inner")
    raised = (joined["teacher_delta"] > 0).to_numpy()
    prompts = group_index(joined["prompt_id"])
    size = int(prompts.max()) + 1
    ranked = [RankedColumn(np.nan_to_num(joined[name].to_numpy(), posinf=1e300)) for name in scores]

    def statistics(weights: Floats) -> Floats:
        return np.array([weighted_auc(column, raised, weights) for column in ranked])

    value = statistics(np.ones(joined.height))
    drawn = prompt_weights(size, num_resamples, seed).astype(np.float64)
    found = expanded_interval(value, np.stack([statistics(row[prompts]) for row in drawn]), size)
    return pl.DataFrame(
        {
            "score": list(scores),
            "auc": [_known(each) for each in found.value],
            "low": [_known(each) for each in found.low],
            "high": [_known(each) for each in found.high],
            "num_raised": int(raised.sum()),
            "num_tokens": joined.height,
        },
        schema_overrides=dict.fromkeys(["auc", "low", "high"], pl.Float64),
    )


def weighted_auc(column: RankedColumn, positive: np.ndarray, weights: Floats) -> float:
    """Area under the ROC curve of rows repeated as often as their weight says; NaN without both
    kinds."""
    above = weights * positive
    count, rest = above.sum(), weights.sum() - above.sum()
    if count <= 0 or rest <= 0:
        return math.nan
    ranks = column.ranks(weights)
    return float((above @ ranks - count * (count + 1.0) / 2.0) / (count * rest))


def _scored(tokens: pl.DataFrame | pl.LazyFrame, scores: Sequence[str]) -> pl.DataFrame:
    delta = pl.col("reverse_kl").cast(pl.Float64)
    made = add_scores(tokens).with_columns(
        teachability=delta * pl.col("teacher_mass_on_student_topk").cast(pl.Float64),
        teacher_surprise=-pl.col("teacher_logprob").cast(pl.Float64),
    )
    return made.select(*_PLACE, *(pl.col(name).cast(pl.Float64) for name in scores)).collect()


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
