"""The arms of an ablation as they are compared: at their last step, under one configuration.

Reads rows of `tip_analysis.core.schema.AblationTable`; writes nothing.
"""

import polars as pl

from tip_analysis.analysis.arms import ALL, CHANGEABLE, UNTRAINED, Arm
from tip_analysis.analysis.benchmarks import (
    benchmarks_of,
    with_benchmark,
    with_mean_over_benchmarks,
)
from tip_analysis.analysis.claims import arm_summary, paired_difference
from tip_analysis.analysis.paper_claims import paper_differences_beside, paper_results
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.result_tables import PaperDifferenceTable

CONFIGURATION = (
    "mode",
    "loss",
    "weighting",
    "loss_normalizer",
    "loss_aggregation",
    "selection_scope",
    "num_steps",
)
"""Arms are compared only under one of each."""


def final_arms(table: pl.DataFrame) -> pl.DataFrame:
    """Rows of trained arms at their last step, under the configuration that most rows have; without
    the untrained student. An arm that names a loss or weighting of its own is compared whatever
    these are."""
    trained = table.filter(
        ~Arm(UNTRAINED).rows(), pl.col("step") == pl.col("num_steps"), pl.col("step") > 0
    )
    if trained.is_empty():
        return trained
    keys = {name: _shared(name) for name in CONFIGURATION if name in trained.columns}
    keyed = trained.with_columns(key.alias(f"_{name}") for name, key in keys.items())
    names = [f"_{name}" for name in keys]
    whole = keyed.drop_nulls(["_loss", *(["_weighting"] if "_weighting" in names else [])])
    counted = (keyed if whole.is_empty() else whole).group_by(names).len()
    most = counted.sort("len", *names, descending=[True] + [False] * len(names)).head(1)
    wanted = {name: value for name, value in most.row(0, named=True).items() if name in names}
    fits = [
        pl.col(name).is_null()
        if value is None
        else pl.col(name).is_null() | (pl.col(name) == value)
        for name, value in wanted.items()
    ]
    return keyed.filter(*fits).drop(names)


def _shared(name: str) -> pl.Expr:
    """What an arm has of the study's configuration; null where it has something of its own."""
    if name not in CHANGEABLE:
        return pl.col(name)
    return pl.when(~pl.col("rule").str.contains(f",{name}=", literal=True)).then(name)


def differences_from_all(arms: pl.DataFrame) -> pl.DataFrame:
    """Each arm's accuracy minus that of `all` on the same seeds, per benchmark and for their
    unweighted mean: an `ArmDifferenceTable` with `benchmark`."""
    arms = with_mean_over_benchmarks(arms, ["rule", "retention_ratio", "seed", "step"])
    rows = []
    for (benchmark,), ours in arms.group_by("benchmark", maintain_order=True):
        everything = ours.filter(ALL.rows())
        for (rule, ratio), part in ours.filter(~ALL.rows()).group_by(
            "rule", "retention_ratio", maintain_order=True
        ):
            difference, low, high, _ = paired_difference(part, everything, "accuracy")
            rows.append((rule, ratio, benchmark, difference, low, high))
    schema = {
        "rule": pl.String,
        "retention_ratio": pl.Float64,
        "benchmark": pl.String,
        **dict.fromkeys(("difference", "low", "high"), pl.Float64),
    }
    return pl.DataFrame(rows, schema=schema, orient="row").drop_nulls("difference")


def paper_differences_from_all(arms: pl.DataFrame) -> pl.DataFrame:
    """What the paper reports of these arms minus `all`: a `PaperDifferenceTable` with `benchmark`,
    the one of ours that a number may stand beside.

    Args:
        arms: rule, retention_ratio, benchmark.
    """
    arms = with_benchmark(arms)
    among = benchmarks_of(arms)
    parts = [pl.DataFrame(schema=polars_schema(PaperDifferenceTable) | {"benchmark": pl.String()})]
    keys = ["rule", "retention_ratio", "benchmark"]
    for rule, ratio, benchmark in arms.select(keys).unique(maintain_order=True).iter_rows():
        theirs = paper_differences_beside((Arm(rule, ratio), ALL), benchmark, among)
        named = pl.lit(rule).alias("rule"), pl.lit(ratio, pl.Float64).alias("retention_ratio")
        parts.append(theirs.select(*named, "difference", pl.lit(benchmark).alias("benchmark")))
    return pl.concat(parts)


def arm_accuracies(table: pl.DataFrame) -> pl.DataFrame:
    """Accuracy of each arm at its last step, mean over seeds, and of the student before training,
    per benchmark and for their unweighted mean: an `ArmAccuracyTable` with `benchmark`.

    Args:
        table: rows of the ablation table.
    """
    arms = final_arms(table)
    shown = arm_summary(arms).select(
        "rule", "retention_ratio", pl.col("mean").alias("accuracy"), "low", "high", "benchmark"
    )
    before = with_benchmark(table).filter(
        pl.col("step") == 0, pl.col("benchmark").is_in(benchmarks_of(arms))
    )
    untrained = (
        with_mean_over_benchmarks(before, ["arm_key", "seed"])
        .group_by("benchmark", maintain_order=True)
        .agg(pl.col("accuracy").mean())
    )
    rows = [(UNTRAINED, 1.0, value, None, None, name) for name, value in untrained.iter_rows()]
    return pl.concat([shown, pl.DataFrame(rows, shown.schema, orient="row")])


def claim_effects(judged: pl.DataFrame) -> pl.DataFrame:
    """The effects of `claims_table` that could be measured, each named in words: a
    `ClaimEffectTable`."""
    where = pl.concat_str(pl.lit(", "), pl.col("benchmark").str.slice(0, 24))
    several = pl.col("benchmark").n_unique() > 1
    words = pl.concat_str(
        "claim",
        pl.when(several).then(where).otherwise(pl.lit("")),
        pl.lit(": "),
        "arm_a",
        pl.lit(" "),
        "relation",
        pl.lit(" "),
        "arm_b",
    )
    return judged.filter(pl.col("effect").is_not_null()).select(
        words.alias("claim"),
        "effect",
        "low",
        "high",
        pl.when(pl.col("relation") != ">").then("margin").alias("margin"),
        pl.col("verdict").cast(pl.String),
    )


def arm_costs(arms: pl.DataFrame) -> pl.DataFrame:
    """What each arm cost and came to beside its accuracy, means over seeds, per benchmark and for
    their unweighted mean: rule, retention_ratio, benchmark, best_at_k, majority_at_k,
    heldout_reverse_kl, tokens_trained, step_time_s, peak_memory_bytes."""
    means = ("best_at_k", "majority_at_k", "heldout_reverse_kl", "tokens_trained", "step_time_s")
    keys = ["rule", "retention_ratio", "benchmark"]
    arms = with_mean_over_benchmarks(arms, ["rule", "retention_ratio", "seed"])
    return arms.group_by(keys, maintain_order=True).agg(pl.col(*means, "peak_memory_bytes").mean())


def relative_memory(arms: pl.DataFrame) -> pl.DataFrame:
    """Peak memory of each arm over that of training on all tokens (of the most that any arm took,
    where that was not run): a `MemoryTable`."""
    by_arm = arms.group_by("rule", "retention_ratio", maintain_order=True)
    memory = by_arm.agg(memory=pl.col("peak_memory_bytes").mean())
    whole = memory.filter(ALL.rows())["memory"].mean() or memory["memory"].max()
    return memory.with_columns((pl.col("memory") / whole).alias("relative_memory"))


def paper_memory() -> pl.DataFrame:
    """The paper's peak memory over that of training on all tokens, pair by pair: a
    `MemoryTable`."""
    theirs = paper_results().filter(pl.col("metric") == "peak memory GB")
    full = theirs.filter(ALL.rows()).select("pair", pl.col("mean").alias("whole"))
    share = (pl.col("mean") / pl.col("whole")).alias("relative_memory")
    return theirs.join(full, on="pair").with_columns(share)
