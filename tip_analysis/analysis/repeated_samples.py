"""What k graded samples of each problem say beside their mean: pass@j and majority@k, with
intervals, per benchmark.

Reads rewards [P, k] and answers, from the evaluation table (`schema.EvaluationTable`) or as arrays;
writes nothing. A sample is correct where its reward is at least 1.

- pass@j, j ≤ k: the chance that one of j samples is correct, by the unbiased estimate
  1 − C(k − c, j) / C(k, j) of c correct ones (Chen et al. 2021); j = k is Best@k of 0/1 rewards.
- majority@k: whether the commonest answer among all k is correct. Correct samples are one answer,
  however they are written; of the others, equal texts are. Answers that are as common share the
  verdict, so that a tie of two counts ½; samples without an answer do not vote.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import polars as pl
from scipy import stats

from tip_analysis.analysis.accuracy import rewards_by_problem
from tip_analysis.analysis.benchmarks import with_benchmark
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import OptionError

_CORRECT = object()
DEFAULT_PASS_AT = (1, 2, 4, 8, 16)
"""Every j of pass@j that is shown, up to the number of samples."""


def num_correct(rewards: np.ndarray) -> np.ndarray:
    """Correct samples of each problem, [P], of rewards [P, k]."""
    return (rewards >= 1.0).sum(1)


def pass_at(correct: np.ndarray, num_samples: int, j: int) -> np.ndarray:
    """pass@j of each problem, [P] in [0, 1].

    Args:
        correct: [P] correct samples of each problem.
        num_samples: k.
        j: at most k.

    Raises:
        OptionError: j is not from 1 to k.
    """
    if not 1 <= j <= num_samples:
        raise OptionError(f"pass@j of {num_samples} samples needs 1 ≤ j ≤ {num_samples}; found {j}")
    whole = math.comb(num_samples, j)
    return np.array([1.0 - math.comb(num_samples - int(c), j) / whole for c in correct])


def majority(rewards: np.ndarray, answers: Sequence[str | None]) -> np.ndarray | None:
    """majority@k of each problem, [P] in [0, 1]; None where no sample has an answer.

    Args:
        rewards: [P, k].
        answers: [P·k], problem by problem.
    """
    if all(answer is None for answer in answers):
        return None
    k = rewards.shape[1]
    return np.array(
        [
            _share_of_votes(row, answers[i * k : (i + 1) * k])
            for i, row in enumerate(rewards.tolist())
        ]
    )


def mean_majority(rewards: np.ndarray, answers: Sequence[str | None]) -> float | None:
    """Mean over problems of `majority`; None where no sample has an answer."""
    found = majority(rewards, answers)
    return None if found is None else float(found.mean())


def _share_of_votes(rewards: Sequence[float], answers: Sequence[str | None]) -> float:
    votes: Counter[object] = Counter(
        _CORRECT if reward >= 1.0 else answer
        for reward, answer in zip(rewards, answers, strict=True)
        if answer is not None or reward >= 1.0
    )
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return float(_CORRECT in winners) / len(winners)


def sample_metrics(
    evaluations: pl.DataFrame | pl.LazyFrame,
    *,
    by: Sequence[str] = ("model",),
    pass_ats: Sequence[int] = DEFAULT_PASS_AT,
) -> pl.DataFrame:
    """mean@k, Best@k, majority@k and pass@j of each model on each benchmark, never pooled.

    Args:
        evaluations: rows of the evaluation table.
        by: what tells one evaluation from another.
        pass_ats: j of pass@j; those above the number of samples are left out.

    Returns:
        `by`, benchmark, metric, value, low, high (95 % t over problems, null for one problem),
        num_problems, num_samples. Without answers there is no row of majority@k.

    Raises:
        SchemaError: a column is missing, or problems have unequal numbers of samples.
    """
    frame = with_benchmark(evaluations.lazy().collect())
    require_columns(
        frame.lazy(), [*by, "problem_id", "seed", "sample_index", "reward"], "sample_metrics"
    )
    keys = [*by, "benchmark"]
    rows = [
        dict(zip(keys, key, strict=True)) | row
        for key, group in frame.group_by(keys, maintain_order=True)
        for row in _metrics(group, pass_ats)
    ]
    return pl.DataFrame(rows)


def _metrics(group: pl.DataFrame, pass_ats: Sequence[int]) -> list[dict[str, object]]:
    rewards = rewards_by_problem(group)
    ordered = group.sort("problem_id", "seed", "sample_index")
    answers = ordered["answer"].to_list() if "answer" in group.columns else [None] * group.height
    k = rewards.shape[1]
    found: dict[str, np.ndarray | None] = {
        f"mean@{k}": rewards.mean(1),
        f"Best@{k}": rewards.max(1),
        f"majority@{k}": majority(rewards, answers),
    }
    correct = num_correct(rewards)
    found |= {f"pass@{j}": pass_at(correct, k, j) for j in pass_ats if j <= k}
    return [
        {"metric": name, **mean_with_interval(values), "num_samples": k}
        for name, values in found.items()
        if values is not None
    ]


def mean_with_interval(values: np.ndarray) -> dict[str, float | int | None]:
    """value, low, high (95 % t over problems) and num_problems of [P] values."""
    count, mean = len(values), float(values.mean())
    if count < 2:
        return {"value": mean, "low": None, "high": None, "num_problems": count}
    half = float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return {"value": mean, "low": mean - half, "high": mean + half, "num_problems": count}


def arm_pass_at(ablations: pl.DataFrame, j: int) -> pl.DataFrame:
    """pass@j of each evaluation of an ablation: its rows of the ablation table with `pass_at_j`,
    the mean over problems.

    Raises:
        OptionError: j is above the number of samples of some evaluation.
    """
    values = [
        float(pass_at(np.array(row["problem_correct"]), row["num_samples"], j).mean())
        for row in ablations.select("problem_correct", "num_samples").iter_rows(named=True)
    ]
    return ablations.with_columns(pl.Series("pass_at_j", values, dtype=pl.Float64))
