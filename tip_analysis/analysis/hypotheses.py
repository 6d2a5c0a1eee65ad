"""Hypotheses that were written down before a run, tested together under one error rate.

A difference A − B is judged by its interval. `>`: supported above +margin, contradicted below it;
`<`: supported below −margin, contradicted above it; `≈`: supported within ±margin, contradicted
wholly outside. Anything else is not resolved.

Arms: paired differences over seeds, Student's t. Groups: resamples of prompts, expanded
percentiles. Correction, of m claims at confidence 1 − α: `bonferroni` judges each at 1 − α/m;
`holm` takes them from the clearest on, the k-th at 1 − α/(m − k + 1), and stops at the first that
is not resolved. `low` and `high` are the ends at the level that a claim was judged at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import polars as pl
from scipy import stats

from tip_analysis.analysis.ablation_tables import final_arms
from tip_analysis.analysis.arms import Arm
from tip_analysis.analysis.benchmarks import benchmarks_of, with_benchmark
from tip_analysis.analysis.bootstrap import (
    Floats,
    group_index,
    prompt_weights,
    sums_by_group,
    tail_probability,
)
from tip_analysis.analysis.groupings import with_group, with_rewards
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.registrations import QUADRANT, Hypothesis, Registration
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.names import Correction
from tip_analysis.core.run_folder import Run, RunLike, open_run

NUM_RESAMPLES = 5000
"""Resamples: enough for the far tails that many claims ask for."""
_LEVELS = 400


class Estimate(Protocol):
    """A difference whose interval can be had at any confidence."""

    @property
    def value(self) -> float:
        """The difference."""
        ...

    @property
    def size(self) -> int:
        """Seeds or prompts that it stands on."""
        ...

    def interval(self, confidence: float) -> tuple[float, float]:
        """Both ends; NaN where there is none."""
        ...


@dataclass(frozen=True)
class OverSeeds:
    """A paired difference over seeds: Student's t."""

    differences: Floats

    @property
    def value(self) -> float:
        """Mean difference."""
        return float(self.differences.mean()) if self.differences.size else math.nan

    @property
    def size(self) -> int:
        """Seeds."""
        return int(self.differences.size)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Both ends; NaN for fewer than two seeds."""
        if self.size < 2:
            return math.nan, math.nan
        error = float(self.differences.std(ddof=1)) / math.sqrt(self.size)
        half = error * float(stats.t.ppf((1.0 + confidence) / 2.0, self.size - 1))
        return self.value - half, self.value + half


@dataclass(frozen=True)
class OverPrompts:
    """A difference with its values in resamples of prompts: expanded percentiles."""

    value: float
    replicates: Floats
    size: int
    """Prompts."""

    def interval(self, confidence: float) -> tuple[float, float]:
        """Both ends; NaN for one prompt, or where too few resamples have both groups."""
        known = self.replicates[np.isfinite(self.replicates)]
        if self.size < 2 or known.size < self.replicates.size / 2:
            return math.nan, math.nan
        tail = tail_probability(self.size, confidence)
        low, high = np.quantile(known, [tail, 1.0 - tail])
        return float(low), float(high)


def judge_hypotheses(
    run: RunLike,
    registered: Registration,
    *,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> pl.DataFrame:
    """The verdict on every hypothesis, under one error rate for all.

    Args:
        run: a run folder with an ablation (for arms) and scored tokens (for groups).
        registered: as `read_hypotheses` gives it.
        taxonomy: whose cuts make the quadrants; measured once, on the whole run.
        num_resamples, seed: of prompts.

    Returns:
        A `result_tables.HypothesisTable` in the order of the file: claim, statement, difference,
        low, high (at `confidence`, the level that it was judged at), verdict (supported,
        contradicted, not resolved, not run), size (seeds or prompts).

    Raises:
        SchemaError: a figure is no number of the run's tokens, or an arm has several
            configurations.
        OptionError: a claim about arms names no benchmark where there are several.
    """
    folder = open_run(run)
    estimates = [
        _estimate(folder, claim, taxonomy, num_resamples, seed) for claim in registered.claims
    ]
    levels = _levels(registered, estimates)
    rows = []
    for claim, estimate, level in zip(registered.claims, estimates, levels, strict=True):
        low, high = (math.nan, math.nan) if estimate is None else estimate.interval(level.judged)
        rows.append(
            {
                "claim": claim.name,
                "statement": claim.words(),
                "difference": None if estimate is None else _known(estimate.value),
                "low": _known(low),
                "high": _known(high),
                "confidence": level.judged,
                "verdict": "not run" if estimate is None else level.verdict,
                "size": 0 if estimate is None else estimate.size,
            }
        )
    return pl.DataFrame(
        rows, schema_overrides=dict.fromkeys(["difference", "low", "high"], pl.Float64)
    )


def judge_difference(direction: str, margin: float, low: float, high: float) -> str:
    """What an interval says of a claim."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not resolved"
    supported, contradicted = {
        ">": (low > margin, high < margin),
        "<": (high < -margin, low > -margin),
        "≈": (low >= -margin and high <= margin, low > margin or high < -margin),
    }[direction]
    return "supported" if supported else "contradicted" if contradicted else "not resolved"


@dataclass(frozen=True)
class _Level:
    """How a claim was judged."""

    judged: float
    """Confidence of its interval."""
    verdict: str


def _levels(registered: Registration, estimates: Sequence[Estimate | None]) -> list[_Level]:
    """The level and verdict of every claim under the correction; those that were not run count as
    tested, so that leaving an arm out gains nothing."""
    alpha, total = 1.0 - registered.confidence, len(estimates)
    if registered.correction is Correction.BONFERRONI:
        confidence = 1.0 - alpha / total
        return [
            _Level(confidence, _verdict(claim, estimate, confidence))
            for claim, estimate in zip(registered.claims, estimates, strict=True)
        ]
    smallest = [
        _smallest_alpha(claim, estimate)
        for claim, estimate in zip(registered.claims, estimates, strict=True)
    ]
    levels: dict[int, _Level] = {}
    stopped = False
    for place, index in enumerate(sorted(range(total), key=lambda index: smallest[index])):
        confidence = 1.0 - alpha / (total - place)
        verdict = _verdict(registered.claims[index], estimates[index], confidence)
        stopped = stopped or verdict == "not resolved"
        levels[index] = _Level(confidence, "not resolved" if stopped else verdict)
    return [levels[index] for index in range(total)]


def _verdict(claim: Hypothesis, estimate: Estimate | None, confidence: float) -> str:
    if estimate is None:
        return "not resolved"
    return judge_difference(claim.direction, claim.margin, *estimate.interval(confidence))


def _smallest_alpha(claim: Hypothesis, estimate: Estimate | None) -> float:
    """The smallest α, on a grid, at which the claim is decided either way; 2 where at none."""
    grid = np.geomspace(1e-6, 0.999, _LEVELS)
    for alpha in grid:
        if _verdict(claim, estimate, 1.0 - float(alpha)) != "not resolved":
            return float(alpha)
    return 2.0


def _estimate(
    run: Run, claim: Hypothesis, taxonomy: Taxonomy, num_resamples: int, seed: int
) -> Estimate | None:
    """The difference that a claim is about; None where an arm or a group is not there."""
    if claim.grouping is None:
        return _between_arms(run, claim)
    return _between_groups(run, claim, taxonomy, num_resamples, seed)


def _between_arms(run: Run, claim: Hypothesis) -> OverSeeds | None:
    if not run.has("ablations"):
        return None
    arms = with_benchmark(final_arms(run.ablations().collect()))
    benchmarks = benchmarks_of(arms)
    if claim.benchmark is None and len(benchmarks) > 1:
        raise OptionError(
            f"claim {claim.name!r}: the arms were evaluated on {', '.join(benchmarks)}; name one"
            " with `benchmark`"
        )
    chosen = claim.benchmark or (benchmarks[0] if benchmarks else "")
    arms = arms.filter(pl.col("benchmark") == chosen)
    sides = [
        arms.filter(Arm.parse(side).rows()).select("seed", pl.col(claim.figure).cast(pl.Float64))
        for side in (claim.first, claim.second)
    ]
    if any(side["seed"].is_duplicated().any() for side in sides):
        raise SchemaError(f"claim {claim.name!r}: an arm has several rows for one seed")
    both = sides[0].join(sides[1], on="seed", suffix="_b").drop_nulls().sort("seed")
    if both.is_empty():
        return None
    return OverSeeds((both[claim.figure] - both[f"{claim.figure}_b"]).to_numpy())


def _between_groups(
    run: Run, claim: Hypothesis, taxonomy: Taxonomy, num_resamples: int, seed: int
) -> OverPrompts | None:
    tokens = run.tokens()
    schema = tokens.collect_schema()
    if claim.figure not in schema or not (
        schema[claim.figure].is_numeric() or schema[claim.figure] == pl.Boolean
    ):
        raise SchemaError(f"claim {claim.name!r}: {claim.figure!r} is no number of the token table")
    value = pl.col(claim.figure).cast(pl.Float64).alias("_value")
    if claim.grouping == QUADRANT:
        placed = assign_quadrants(tokens, cuts=taxonomy.measure(tokens)).filter("loss_mask")
        named = placed.select(
            "prompt_id", value, group=pl.col("quadrant").cast(pl.String)
        ).collect()
    else:
        joined = with_rewards(tokens, run.rollouts()).filter("loss_mask").with_columns(value)
        named = with_group(joined.collect(), str(claim.grouping)).select(
            "prompt_id", "_value", "group"
        )
    named = named.filter(pl.col("_value").is_finite())
    return _difference_of_means(named, claim, num_resamples, seed)


def _difference_of_means(
    named: pl.DataFrame, claim: Hypothesis, num_resamples: int, seed: int
) -> OverPrompts | None:
    inside = [
        (named["group"] == side).fill_null(False).to_numpy() for side in (claim.first, claim.second)
    ]
    if not all(mask.any() for mask in inside):
        return None
    values = named["_value"].to_numpy()
    prompts = group_index(named["prompt_id"])
    size = int(prompts.max()) + 1
    columns = [part for mask in inside for part in (values * mask, mask.astype(np.float64))]
    sums = sums_by_group(np.column_stack(columns), prompts, size)

    def difference(totals: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return totals[..., 0] / totals[..., 1] - totals[..., 2] / totals[..., 3]

    drawn = prompt_weights(size, num_resamples, seed) @ sums
    return OverPrompts(float(difference(sums.sum(0))), difference(drawn), size)


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
