"""Does an offline figure predict trained accuracy? Rankings against the arms of an ablation.

Reads rows of `RankingTable` and `AblationTable`; writes nothing. One point is one arm (a rule at a
ratio) with its figure and its accuracy, the mean over seeds. The interval of a Spearman correlation
over n arms is Fisher's z with the variance of Bonett and Wright (2000), (1 + ρ²/2) / (n − 3): it
takes the arms as the sample, which is what a statement about further rules needs. Perfect order is
taken as half way to the next value that n arms can have, so that it has an interval too.
"""

import math
from typing import Any

import numpy as np
import polars as pl
from scipy import stats

from tip_analysis.analysis.ablation_tables import final_arms
from tip_analysis.analysis.arms import arm_results
from tip_analysis.core.names import RankFigure, TokenUse

FEWEST_ARMS = 4
_Z = float(stats.norm.ppf(0.975))


def spearman_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Spearman's correlation [n] × [n] with both ends of its 95% interval; NaN where a column is
    constant or there are fewer than four points."""
    if len(first) < FEWEST_ARMS or not np.ptp(first) or not np.ptp(second):
        return math.nan, math.nan, math.nan
    found: Any = stats.spearmanr(first, second)
    value = float(found.statistic)
    count = len(first)
    largest = 1.0 - 6.0 / (count * (count**2 - 1))  # half way to the next smaller value
    held = min(max(value, -largest), largest)
    half = _Z * math.sqrt((1.0 + held**2 / 2.0) / (count - 3))
    return value, math.tanh(math.atanh(held) - half), math.tanh(math.atanh(held) + half)


def ranking_validity(rankings: pl.DataFrame, ablations: pl.DataFrame) -> pl.DataFrame:
    """Rank correlation of each offline figure with the accuracy of the arms that were trained.

    Args:
        rankings: rows of `RankingTable` of one measurement and selection scope.
        ablations: rows of `AblationTable`.

    Returns:
        A `result_tables.ValidityTable`: for every benchmark and figure, over the arms of each ratio
        that has at least four, and over all arms together (retention_ratio null), where a larger
        budget alone may do both. `verdict` says in words whether the figure predicts.
    """
    results = arm_results(final_arms(ablations)).select(
        "rule", "retention_ratio", "benchmark", "accuracy", "num_seeds"
    )
    selections = rankings.filter(pl.col("form") == str(TokenUse.SELECTION))
    points = selections.drop_nulls("value").join(results, on=["rule", "retention_ratio"])
    rows = []
    for (benchmark, figure), part in points.group_by("benchmark", "figure", maintain_order=True):
        ratios = [*sorted(part["retention_ratio"].unique()), None]
        for ratio in ratios:
            arms = part if ratio is None else part.filter(retention_ratio=ratio)
            rows.append((benchmark, str(figure), ratio, *_correlated(arms)))
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row").drop_nulls("spearman")


def _correlated(arms: pl.DataFrame) -> tuple[float | str | None, ...]:
    value, low, high = spearman_interval(arms["value"].to_numpy(), arms["accuracy"].to_numpy())
    ends = [end if math.isfinite(end) else None for end in (value, low, high)]
    seeds = min(arms["num_seeds"].to_list(), default=0)
    return (*ends, arms.height, seeds, _verdict(*ends))


def _verdict(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return "not resolved"
    if low > 0.0:
        return "predicts"
    return "predicts the opposite" if high < 0.0 else "not resolved"


_SCHEMA = {
    "benchmark": pl.String,
    "figure": pl.Enum(RankFigure),
    "retention_ratio": pl.Float64,
    **dict.fromkeys(["spearman", "low", "high"], pl.Float64),
    **dict.fromkeys(["num_arms", "num_seeds"], pl.Int64),
    "verdict": pl.String,
}


def validity_sentence(table: pl.DataFrame) -> str:
    """In plain words which figures predict accuracy, over all arms of the first benchmark."""
    pooled = table.filter(pl.col("retention_ratio").is_null())
    if pooled.is_empty():
        return (
            f"Fewer than {FEWEST_ARMS} arms were both ranked and trained: nothing can be said of"
            " whether a figure predicts accuracy."
        )
    first = pooled.filter(pl.col("benchmark") == pooled["benchmark"][0])
    best = first.sort("spearman", descending=True).row(0, named=True)
    ends = f"ρ = {best['spearman']:.2f} [{best['low']:.2f}, {best['high']:.2f}]"
    over = f"over {best['num_arms']} arms"
    predicting = first.filter(verdict="predicts")
    if predicting.is_empty():
        return (
            f"No offline figure is shown to predict trained accuracy {over}: the closest,"
            f" {best['figure']}, has {ends}."
        )
    names = ", ".join(map(str, predicting.sort("spearman", descending=True)["figure"]))
    return f"Trained accuracy is predicted {over} by {names}; the best has {ends}."
