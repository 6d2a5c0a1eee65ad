"""The arms of an ablation, and what came out of them: a table with mean and standard deviation over
seeds.

Reads rows of `schema.AblationTable`. An arm is a selection rule with a retention ratio; it may also
name a loss and a weighting of its own, in place of the study's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import polars as pl

from tip_analysis.analysis.benchmarks import (
    MEAN_OVER_BENCHMARKS,
    benchmarks_of,
    with_benchmark,
    with_mean_over_benchmarks,
)
from tip_analysis.analysis.retention import exact_ratio
from tip_analysis.analysis.rules import is_number, known_rules
from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.weightings import weighting_of
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import TrainingLoss

UNTRAINED = "untrained"
"""Rule of the rows that tell how the student was before training."""


@dataclass(frozen=True, order=True)
class Arm:
    """What is compared: a selection rule at a retention ratio, spelled `q3:0.1`; with a weighting
    or a loss of its own, `soft_or:0.5,weighting=ta_opd` or `all,loss=k1`.

    ρ is what was given, and is compared exactly: 0.1 is 0.1 wherever it was typed.
    """

    rule: str
    """The rule, and what the arm changes: `all,loss=k1`. Tables call this the arm's rule."""
    retention_ratio: float = 1.0

    @property
    def base_rule(self) -> str:
        """The selection rule alone."""
        return self.rule.split(",", maxsplit=1)[0]

    @property
    def changes(self) -> dict[str, str]:
        """What it has of its own in place of the study's: `loss`, `weighting`."""
        return _changes(self.rule.split(",")[1:], self.rule)

    @property
    def is_untrained(self) -> bool:
        """Whether it is the student as it was."""
        return self.rule == UNTRAINED

    @property
    def has_ratio(self) -> bool:
        """Whether ρ means anything: not where nothing is trained, nor where all is kept."""
        base = self.base_rule
        known = known_rules([base])
        return not (self.is_untrained or (base in known and known[base].keeps_all))

    def __str__(self) -> str:
        ratio = repr(float(self.retention_ratio)).removesuffix(".0")
        base, comma, changes = self.rule.partition(",")
        return (f"{base}:{ratio}" if self.has_ratio else base) + comma + changes

    @classmethod
    def parse(cls, text: str) -> Self:
        """The arm that a text spells: `str(Arm.parse(text))` is the text. Where the rule's name
        ends, `split_entry` says.

        Raises:
            OptionError: it names no ratio, several, or none in (0, 1].
        """
        head, comma, changes = text.partition(",")
        rule, ratios = split_entry(head)
        arm = cls(rule + comma + changes, *(_ratio(ratio, text) for ratio in ratios[:1]))
        if len(ratios) != int(arm.has_ratio):
            raise OptionError(f"expected an arm such as q3:0.1 or all; found {text!r}")
        return arm

    def rows(self) -> pl.Expr:
        """Which rows of a table with `rule` and `retention_ratio` are this arm's."""
        same = pl.col("rule") == self.rule
        return (
            same & (pl.col("retention_ratio") == self.retention_ratio) if self.has_ratio else same
        )


def _changes(parts: Sequence[str], text: str) -> dict[str, str]:
    """`loss=k1` and `weighting=ta_opd` as a mapping, in the order in which arms spell them."""
    found: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if name not in CHANGEABLE or not equals or name in found:
            raise OptionError(
                f"expected {' or '.join(f'{name}=…' for name in CHANGEABLE)} after the comma, each"
                f" once, as in all,loss=k1; found {text!r}"
            )
        found[name] = CHANGEABLE[name](value)
    return {name: found[name] for name in CHANGEABLE if name in found}


CHANGEABLE: dict[str, Callable[[str], str]] = {
    "weighting": lambda name: weighting_of(name).name,
    "loss": lambda name: str(TrainingLoss(name)),
}
"""What an arm may have of its own, and how its name is checked."""

ALL = Arm("all")
"""Training on every token: what the other arms are compared with."""

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


def split_entry(text: str) -> tuple[str, list[str]]:
    """A rule's name and the ratios that a text puts after it: `q3:0.1:0.2` is `q3` with `0.1` and
    `0.2`.

    A name may hold colons itself, as `quadrant:Q3` does: the longest beginning that is the name of
    a rule is the rule, and what follows it are ratios, so `quadrant:Q3:0.5` is `quadrant:Q3` at
    0.5. Where no beginning is a rule's name (a table may come from elsewhere), the numbers at the
    end are ratios, and what stands before them is the name.
    """
    parts = text.split(":")
    ends = range(len(parts), 0, -1)
    named = known_rules(":".join(parts[:end]) for end in ends)
    lengths = [end for end in ends if ":".join(parts[:end]) in named]
    end = lengths[0] if lengths else _without_numbers(parts)
    return ":".join(parts[:end]), parts[end:]


def _without_numbers(parts: Sequence[str]) -> int:
    """How many parts are left when the numbers at the end are taken off; at least one."""
    end = len(parts)
    while end > 1 and is_number(parts[end - 1]):
        end -= 1
    return end


def parse_arms(rules: Sequence[str], ratios: Sequence[float]) -> list[Arm]:
    """Arms of rules and retention ratios: each rule at each ratio, except where it brings its own,
    as `q3:0.1:0.2` (`split_entry`); after a comma, what the arm has of its own, as in
    `all,loss=k1`.

    A rule that keeps all gives one arm whatever the ratios; an arm that is named twice is there
    once.

    Raises:
        UnknownNameError: there is no such rule.
        OptionError: a ratio is outside (0, 1], or there is none.
    """
    arms: dict[Arm, None] = {}
    for entry in rules:
        head, *changes = entry.split(",")
        base, own = split_entry(head)
        rule_of(base)
        changed = _changes(changes, entry)
        name = ",".join([base, *(f"{key}={value}" for key, value in changed.items())])
        if not Arm(name).has_ratio:
            arms[Arm(name)] = None
            continue
        chosen = [_ratio(text, entry) for text in own] or list(ratios)
        if not chosen:
            raise OptionError(
                f"rule {base!r} needs a retention ratio: give --ratios, or write it as {base}:0.1"
            )
        arms |= dict.fromkeys(Arm(name, _checked(ratio)) for ratio in chosen)
    if not arms:
        raise OptionError("an ablation needs at least one rule")
    return list(arms)


def _checked(ratio: float) -> float:
    exact_ratio(ratio)
    return float(ratio)


def _ratio(text: str, entry: str) -> float:
    try:
        return _checked(float(text))
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(
            f"expected retention ratios after the rule's name, as in q3:0.1:0.2; found {entry!r}"
        ) from error


def arm_results(ablations: pl.DataFrame | pl.LazyFrame, *, step: int | None = None) -> pl.DataFrame:
    """One row per arm and benchmark: mean and standard deviation over seeds of what its last
    evaluation found; with several benchmarks, also of their unweighted mean, labelled as such.

    Args:
        ablations: rows of the ablation table.
        step: evaluation step to show; by default the last of each arm.

    Returns:
        rule, retention_ratio, mode, benchmark, step, num_seeds; accuracy and best_at_k with `_std`
        (null for one seed; over seeds, sample standard deviation); accuracy_se (of one seed, over
        problems and samples: root mean square); heldout_reverse_kl, tokens_trained and tokens_seen
        (means), token_share (of the tokens that were seen), train_loss, step_time_s, and
        peak_memory_bytes (largest). Benchmark by benchmark, the untrained student first, then by
        falling accuracy.
    """
    frame = ablations.lazy().collect()
    frame = with_benchmark(frame)
    keys = ["rule", "retention_ratio", "mode", "seed"]
    if step is not None:
        frame = frame.filter(pl.col("step") == step)
    last = frame.sort("step").group_by(*keys, "benchmark", maintain_order=True).last()
    last = with_mean_over_benchmarks(last, keys)
    table = last.group_by("rule", "retention_ratio", "mode", "benchmark").agg(
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
    order = pl.Enum([*benchmarks_of(frame), MEAN_OVER_BENCHMARKS])
    return table.with_columns(pl.col("token_share").fill_nan(None)).sort(
        pl.col("benchmark").cast(order), ~untrained, -pl.col("accuracy"), "rule", "retention_ratio"
    )


def problem_rows(ablations: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
    """One row per arm, seed, step, benchmark and problem: rule, retention_ratio, seed, step,
    benchmark, problem_id, mean_reward, best_reward."""
    columns = {
        "problem_ids": "problem_id",
        "problem_accuracy": "mean_reward",
        "problem_best": "best_reward",
    }
    table = with_benchmark(ablations.lazy().collect())
    keys = ["rule", "retention_ratio", "seed", "step", "benchmark"]
    chosen = table.select(*keys, *columns)
    return chosen.explode(*columns).rename(columns)


def arms_of(ablations: pl.DataFrame | pl.LazyFrame) -> Iterable[Arm]:
    """The arms that a table has rows of, the untrained student left out."""
    rows = ablations.lazy().select("rule", "retention_ratio").unique(maintain_order=True).collect()
    arms = (Arm(rule, ratio) for rule, ratio in rows.iter_rows())
    return [arm for arm in arms if not arm.is_untrained]
