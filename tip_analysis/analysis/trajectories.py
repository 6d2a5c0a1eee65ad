"""Importance through training: what became of fixed tokens from step to step of an arm.

Reads rows of `instrument_tables.TrajectoryTable` of one arm and seed, and the token table for the
scores before training. Quadrants have the cuts of the first step throughout: a token changes its
quadrant because its student changed, not because others did.

- Flow: tokens by quadrant at one kept step and at the next.
- Survival of Q3: of the tokens that are Q3 at the first step, the share that still is; its
  half-life is the step at which half are left, between kept steps on a straight line, and unknown
  where more than half are left at the last one. A token that comes back counts again.
- Rock tokens (arXiv 2605.09253): those above the divergence cut at every kept step.
- The realised fall of δ per token, first step less last, against each score before training (the
  target of arXiv 2605.26844), over selected tokens, the others, and all.

`selected` is whether the arm's rule selects the token before training; on policy, an arm trains on
fresh rollouts, and selects alike tokens there.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import polars as pl

from tip_analysis.analysis.arms import UNTRAINED, Arm
from tip_analysis.analysis.bootstrap import (
    Floats,
    expanded_interval,
    group_index,
    prompt_weights,
    sums_by_group,
    tail_probability,
)
from tip_analysis.analysis.correlations import RankedColumn, correlation_matrix
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import Quadrant

NUM_RESAMPLES = 500
PREDICTORS = ("student_entropy", "reverse_kl", "forward_kl", "soft_or", "q3_score", "teachability")
"""Scores before training that a fall of δ is set against."""
_PLACE = ["rollout_id", "position"]


def placed_trajectory(
    rows: pl.DataFrame | pl.LazyFrame, taxonomy: Taxonomy = DEFAULT_TAXONOMY
) -> pl.DataFrame:
    """The rows with `quadrant` under the cuts of the first step, in the order of steps.

    Raises:
        SchemaError: the rows are of several arms, or a step lacks tokens of another.
    """
    table = rows.lazy().collect()
    require_columns(table.lazy(), ["arm_key", "step", *_PLACE, "prompt_id"], "trajectories")
    if table["arm_key"].n_unique() != 1:
        raise SchemaError(
            f"a trajectory is of one arm and seed; found {table['arm_key'].n_unique()}: filter by"
            " arm_key"
        )
    sizes = table.group_by("step").len()
    if sizes["len"].n_unique() != 1:
        raise SchemaError("every step of a trajectory has the same tokens; found unequal numbers")
    batched = table.with_columns(loss_mask=pl.lit(True), batch_id=pl.lit(0, pl.Int32))
    first = batched.filter(pl.col("step") == pl.col("step").min())
    cuts = taxonomy.changed(cut_scope="run").measure(first)
    placed = assign_quadrants(batched, cuts=cuts).collect()
    return placed.drop("loss_mask", "batch_id").sort("step", *_PLACE)


def trajectory_flow(placed: pl.DataFrame) -> pl.DataFrame:
    """Tokens by quadrant at each kept step and at the next: a `result_tables.FlowTable`.

    Args:
        placed: `placed_trajectory`.

    Returns:
        step_from, step_to, quadrant_from, quadrant_to, num_tokens, share (of all tokens); one row
        for each of the 16 pairs and pair of steps.
    """
    steps = sorted(placed["step"].unique())
    parts = []
    for before, after in pairwise(steps):
        first = placed.filter(step=before).select(*_PLACE, quadrant_from="quadrant")
        second = placed.filter(step=after).select(*_PLACE, quadrant_to="quadrant")
        both = first.join(second, on=_PLACE)
        counts = both.group_by("quadrant_from", "quadrant_to").len("num_tokens")
        pairs = pl.DataFrame(
            [(str(a), str(b)) for a in Quadrant for b in Quadrant],
            schema={name: pl.Enum(Quadrant) for name in ("quadrant_from", "quadrant_to")},
            orient="row",
        )
        joined = pairs.join(
            counts, on=["quadrant_from", "quadrant_to"], how="left", maintain_order="left"
        )
        parts.append(
            joined.select(
                pl.lit(before, pl.Int64).alias("step_from"),
                pl.lit(after, pl.Int64).alias("step_to"),
                "quadrant_from",
                "quadrant_to",
                pl.col("num_tokens").fill_null(0).cast(pl.Int64),
                (pl.col("num_tokens").fill_null(0) / max(1, both.height)).alias("share"),
            )
        )
    if not parts:
        raise SchemaError("a flow needs at least two steps; found one")
    return pl.concat(parts)


def with_selected(
    placed: pl.DataFrame, tokens: pl.LazyFrame | pl.DataFrame, *, seed: int = 0
) -> pl.DataFrame:
    """Add `selected`: whether the arm's rule selects the token before training.

    Args:
        placed: `placed_trajectory`.
        tokens: the run's token table.
        seed: of a rule that samples.
    """
    rule, ratio = placed["rule"][0], placed["retention_ratio"][0]
    if rule == UNTRAINED:
        return placed.with_columns(selected=pl.lit(False))
    arm = Arm(rule, ratio)
    masks = select_tokens(
        add_scores(tokens), rule=arm.rule, retention_ratio=arm.retention_ratio, seed=seed
    )
    narrow = masks.select(*_PLACE, "selected").collect()
    return placed.join(narrow, on=_PLACE, how="left", maintain_order="left").with_columns(
        pl.col("selected").fill_null(False)
    )


def with_facts(
    placed: pl.DataFrame, tokens: pl.LazyFrame | pl.DataFrame, *, seed: int = 0
) -> pl.DataFrame:
    """Add `selected` (`with_selected`) and `planted_label`, which tell subsets apart."""
    labels = tokens.lazy().select(*_PLACE, "planted_label").collect()
    joined = placed.join(labels, on=_PLACE, how="left", maintain_order="left")
    return with_selected(joined, tokens, seed=seed)


def subsets(placed: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """All tokens; those that were selected and those that were not; planted errors where they are
    known."""
    parts = {"all": placed}
    if "selected" in placed.columns:
        parts["selected"] = placed.filter("selected")
        parts["not selected"] = placed.filter(~pl.col("selected"))
    if "planted_label" in placed.columns:
        planted = pl.col("planted_label").cast(pl.String) == "planted_error"
        parts["planted errors"] = placed.filter(planted.fill_null(False))
    return {name: part for name, part in parts.items() if part.height}


def q3_survival(
    placed: pl.DataFrame, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> pl.DataFrame:
    """Of the tokens that are Q3 at the first step, the share that still is at each: a
    `result_tables.SurvivalTable`.

    Args:
        placed: `placed_trajectory`, with `selected` (`with_selected`) and `planted_label` where
            they are to be told apart.
        num_resamples, seed: of prompts.

    Returns:
        tokens (all, selected, not selected, planted errors), step, share with low and high,
        num_tokens (Q3 at the first step), num_prompts, and half_life with half_life_low and
        half_life_high, the same on every row of a subset; null where more than half are left at
        the last step.
    """
    parts = [_survival(name, part, num_resamples, seed) for name, part in subsets(placed).items()]
    known = [part for part in parts if part is not None]
    if not known:
        raise SchemaError("no token is Q3 at the first step: there is nothing to follow")
    return pl.concat(known)


def _survival(
    name: str, placed: pl.DataFrame, num_resamples: int, seed: int
) -> pl.DataFrame | None:
    steps = sorted(placed["step"].unique())
    first = placed.filter(step=steps[0]).filter(pl.col("quadrant") == Quadrant.Q3)
    if first.is_empty():
        return None
    followed = placed.join(first.select(_PLACE), on=_PLACE, how="semi").sort("step", *_PLACE)
    still = (followed["quadrant"] == Quadrant.Q3).to_numpy().reshape(len(steps), -1).T
    prompts = group_index(followed.head(first.height)["prompt_id"])
    size = int(prompts.max()) + 1
    sums = sums_by_group(still.astype(np.float64), prompts, size)
    counts = sums_by_group(np.ones((len(prompts), 1)), prompts, size)
    weights = prompt_weights(size, num_resamples, seed)
    share = sums.sum(0) / counts.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        again = (weights @ sums) / (weights @ counts)
    interval = expanded_interval(share, again, size)
    half = half_life(steps, share)
    low, high = _half_life_interval(steps, again, size)
    return pl.DataFrame(
        {
            "tokens": name,
            "step": steps,
            "share": share,
            "low": interval.low,
            "high": interval.high,
            "num_tokens": first.height,
            "num_prompts": size,
            "half_life": half,
            "half_life_low": low,
            "half_life_high": high,
        },
        schema_overrides={
            "step": pl.Int64,
            **dict.fromkeys(["half_life", "half_life_low", "half_life_high"], pl.Float64),
        },
    ).with_columns(pl.when(pl.col(end).is_finite()).then(pl.col(end)) for end in ("low", "high"))


def half_life(steps: Sequence[int], share: Floats) -> float | None:
    """The step at which a falling share first is one half, on straight lines between steps; None
    where it never is."""
    below = np.flatnonzero(share <= 0.5)
    if not below.size:
        return None
    index = int(below[0])
    if index == 0:
        return float(steps[0])
    before, after = share[index - 1], share[index]
    part = (before - 0.5) / (before - after)
    return float(steps[index - 1] + part * (steps[index] - steps[index - 1]))


def _half_life_interval(
    steps: Sequence[int], again: Floats, num_prompts: int
) -> tuple[float | None, float | None]:
    """Both ends over resamples; None for an end beyond the last step."""
    if num_prompts < 2:
        return None, None
    found = [half_life(steps, row) for row in again if np.isfinite(row).all()]
    lives = np.array([math.inf if life is None else life for life in found])
    if lives.size < 2:
        return None, None
    tail = tail_probability(num_prompts)
    ends = np.quantile(lives, [tail, 1.0 - tail], method="inverted_cdf")
    low, high = (float(end) if math.isfinite(end) else None for end in ends)
    return low, high


def rock_tokens(
    placed: pl.DataFrame, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> pl.DataFrame:
    """Tokens above the divergence cut at every kept step, by subset: share of the tokens that are
    above it at the first step, with low and high, num_rocks, num_high, and rock_divergence (their
    share of Σδ at the last step)."""
    rows = []
    for name, part in subsets(placed).items():
        high = part.with_columns(high=pl.col("quadrant").is_in([Quadrant.Q1, Quadrant.Q3]))
        last = pl.col("step") == pl.col("step").max()
        by_token = high.group_by(*_PLACE, "prompt_id", maintain_order=True).agg(
            rock=pl.col("high").all(),
            begun=pl.col("high").sort_by("step").first(),
            divergence=pl.col("reverse_kl").filter(last).first().cast(pl.Float64),
        )
        rows.append({"tokens": name, **_rocks(by_token, num_resamples, seed)})
    return pl.DataFrame(rows)


def _rocks(by_token: pl.DataFrame, num_resamples: int, seed: int) -> dict[str, float | int | None]:
    prompts = group_index(by_token["prompt_id"])
    size = int(prompts.max()) + 1
    columns = by_token.select("rock", "begun").cast(pl.Float64).to_numpy()
    sums = sums_by_group(columns, prompts, size)
    weights = prompt_weights(size, num_resamples, seed)
    drawn = weights @ sums
    with np.errstate(invalid="ignore", divide="ignore"):
        value = sums[:, 0].sum() / sums[:, 1].sum()
        interval = expanded_interval(np.array([value]), (drawn[:, :1] / drawn[:, 1:]), size)
    total = by_token["divergence"].filter(by_token["divergence"].is_finite())
    rocks = by_token.filter("rock", pl.col("divergence").is_finite())["divergence"]
    ends = [float(each[0]) for each in (interval.value, interval.low, interval.high)]
    value, low, high = (end if math.isfinite(end) else None for end in ends)
    return {
        "share": value,
        "low": low,
        "high": high,
        "num_rocks": int(by_token["rock"].sum()),
        "num_high": int(by_token["begun"].sum()),
        "rock_divergence": _ratio(float(rocks.sum()), float(total.sum())),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def realised_falls(
    placed: pl.DataFrame,
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    predictors: Sequence[str] = PREDICTORS,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> pl.DataFrame:
    """Rank correlation of each score before training with the realised fall of δ, and the mean
    fall: a `result_tables.FallTable`.

    Args:
        placed: `placed_trajectory` with `selected`.
        tokens: the run's token table, whose scores are those before training.
        predictors: columns of the scored table; `teachability` is δ times the teacher's mass on
            the student's likeliest tokens.
        num_resamples, seed: of prompts.

    Returns:
        tokens (all, selected, not selected, planted errors), score, spearman with low and high,
        mean_fall (nats) with mean_fall_low and mean_fall_high, num_tokens, num_prompts.
    """
    falls = _falls(placed)
    scored = _scored(tokens, predictors)
    joined = falls.join(scored, on=_PLACE, how="inner")
    rows = []
    for name, part in subsets(joined).items():
        rows += _fall_rows(name, part, predictors, num_resamples, seed)
    return pl.DataFrame(rows)


def _falls(placed: pl.DataFrame) -> pl.DataFrame:
    """One row per token: δ at the first step less δ at the last; tokens of infinite δ left out."""
    keys = [name for name in ("prompt_id", "selected", "planted_label") if name in placed.columns]
    ordered = pl.col("reverse_kl").cast(pl.Float64).sort_by("step")
    by_token = placed.group_by(*_PLACE, *keys, maintain_order=True).agg(
        fall=ordered.first() - ordered.last()
    )
    return by_token.filter(pl.col("fall").is_finite())


def _scored(tokens: pl.LazyFrame | pl.DataFrame, predictors: Sequence[str]) -> pl.DataFrame:
    scored = add_scores(tokens).filter("loss_mask")
    mass = pl.col("teacher_mass_on_student_topk").cast(pl.Float64)
    made = scored.with_columns(teachability=pl.col("reverse_kl").cast(pl.Float64) * mass)
    return made.select(*_PLACE, *(pl.col(name).cast(pl.Float64) for name in predictors)).collect()


def _fall_rows(
    name: str, part: pl.DataFrame, predictors: Sequence[str], num_resamples: int, seed: int
) -> list[Mapping[str, object]]:
    prompts = group_index(part["prompt_id"])
    size = int(prompts.max()) + 1
    columns = [part["fall"].to_numpy(), *(part[score].to_numpy() for score in predictors)]
    ranked = [RankedColumn(np.nan_to_num(column, posinf=1e300)) for column in columns]
    fall = columns[0]

    def statistics(weights: Floats) -> Floats:
        ranks = np.stack([column.ranks(weights) for column in ranked])
        spearman = correlation_matrix(ranks, weights)[0, 1:]
        return np.append(spearman, fall @ weights / weights.sum())

    with np.errstate(invalid="ignore", divide="ignore"):
        value = statistics(np.ones(len(fall)))
        drawn = prompt_weights(size, num_resamples, seed).astype(np.float64)
        again = np.stack([statistics(row[prompts]) for row in drawn if row[prompts].sum() > 0])
    found = expanded_interval(value, again, size)
    ends = [[_known(v) for v in each] for each in (found.value, found.low, found.high)]
    mean = {
        "mean_fall": ends[0][-1],
        "mean_fall_low": ends[1][-1],
        "mean_fall_high": ends[2][-1],
        "num_tokens": part.height,
        "num_prompts": size,
    }
    return [
        {
            "tokens": name,
            "score": score,
            "spearman": ends[0][index],
            "low": ends[1][index],
            "high": ends[2][index],
            **mean,
        }
        for index, score in enumerate(predictors)
    ]


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
