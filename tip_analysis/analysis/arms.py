"""The arms of an ablation, and what came out of them: a table with mean and standard deviation over
seeds.

Reads rows of `schema.AblationTable`. An arm is a selection rule with a retention ratio.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from tip_analysis.analysis.selection import exact_ratio
from tip_analysis.analysis.selection import rule as rule_of
from tip_analysis.core.errors import OptionError

UNTRAINED = "untrained"
"""Rule of the rows that tell how the student was before training."""


@dataclass(frozen=True, order=True)
class Arm:
    """What is compared."""

    rule: str
    retention_ratio: float = 1.0

    def __str__(self) -> str:
        return (
            self.rule
            if self.rule in ("all", UNTRAINED)
            else f"{self.rule} {self.retention_ratio:g}"
        )


PAPER_ARMS = (
    "all",
    "entropy:0.5:0.1",
    "soft_or:0.5:0.1",
    "soft_or_bottom:0.5",
    "q3:0.1",
    "divergence:0.1",
    "random:0.1",
    "entropy_sampling:0.5:0.1",
)
"""The arms that the claims of Section 7 need, as `parse_arms` reads them, with a random control."""


def parse_arms(rules: Sequence[str], ratios: Sequence[float]) -> list[Arm]:
    """Arms of rules and retention ratios: each rule at each ratio, except where it brings its own,
    as `q3:0.1:0.2`.

    `all` gives one arm whatever the ratios; an arm that is named twice is there once.

    Raises:
        UnknownNameError: there is no such rule.
        OptionError: a ratio is outside (0, 1], or there is none.
    """
    arms: dict[Arm, None] = {}
    for entry in rules:
        name, *own = entry.split(":")
        rule_of(name)
        if name == "all":
            arms[Arm("all")] = None
            continue
        chosen = [_ratio(text, entry) for text in own] or list(ratios)
        if not chosen:
            raise OptionError(
                f"rule {name!r} needs a retention ratio: give --ratios, or write it as {name}:0.1"
            )
        for ratio in chosen:
            exact_ratio(ratio)
            arms[Arm(name, float(ratio))] = None
    if not arms:
        raise OptionError("an ablation needs at least one rule")
    return list(arms)


def _ratio(text: str, entry: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(
            f"expected retention ratios after the rule's name, as in q3:0.1:0.2; found {entry!r}"
        ) from error


def arm_results(ablations: pl.DataFrame | pl.LazyFrame, *, step: int | None = None) -> pl.DataFrame:
    """One row per arm: mean and standard deviation over seeds of what its last evaluation found.

    Args:
        ablations: rows of the ablation table.
        step: evaluation step to show; by default the last of each arm.

    Returns:
        rule, retention_ratio, mode, step, num_seeds; accuracy and best_at_k with `_std` (null for
        one seed; over seeds, sample standard deviation); accuracy_se (of one seed, over problems
        and samples: root mean square); heldout_reverse_kl, tokens_trained and tokens_seen (means),
        token_share (of the tokens that were seen), train_loss, step_time_s, and peak_memory_bytes
        (largest). The untrained student first, then in order of falling accuracy.
    """
    frame = ablations.lazy().collect()
    keys = ["rule", "retention_ratio", "mode", "seed"]
    if step is not None:
        frame = frame.filter(pl.col("step") == step)
    last = frame.sort("step").group_by(*keys, maintain_order=True).last()
    table = last.group_by("rule", "retention_ratio", "mode").agg(
        pl.col("step").max(),
        num_seeds=pl.len().cast(pl.Int64),
        accuracy=pl.col("accuracy").mean(),
        accuracy_std=pl.col("accuracy").std(),
        accuracy_se=pl.col("accuracy_se").pow(2).mean().sqrt(),
        best_at_k=pl.col("best_at_k").mean(),
        best_at_k_std=pl.col("best_at_k").std(),
        heldout_reverse_kl=pl.col("heldout_reverse_kl").mean(),
        tokens_trained=pl.col("tokens_trained").mean(),
        tokens_seen=pl.col("tokens_seen").mean(),
        token_share=pl.col("tokens_trained").sum() / pl.col("tokens_seen").sum(),
        train_loss=pl.col("train_loss").mean(),
        step_time_s=pl.col("step_time_s").mean(),
        peak_memory_bytes=pl.col("peak_memory_bytes").max(),
    )
    untrained = pl.col("rule") == UNTRAINED
    return table.with_columns(pl.col("token_share").fill_nan(None)).sort(
        ~untrained, -pl.col("accuracy"), "rule", "retention_ratio"
    )


def problem_rows(ablations: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
    """One row per arm, seed, step and problem: rule, retention_ratio, seed, step, problem_id,
    mean_reward, best_reward."""
    columns = {
        "problem_ids": "problem_id",
        "problem_accuracy": "mean_reward",
        "problem_best": "best_reward",
    }
    chosen = ablations.lazy().select("rule", "retention_ratio", "seed", "step", *columns)
    return chosen.explode(*columns).rename(columns).collect()


def arms_of(ablations: pl.DataFrame | pl.LazyFrame) -> Iterable[Arm]:
    """The arms that a table has rows of, the untrained student left out."""
    rows = ablations.lazy().select("rule", "retention_ratio").unique(maintain_order=True).collect()
    return [Arm(rule, ratio) for rule, ratio in rows.iter_rows() if rule != UNTRAINED]
