"""Quadrants, shares and rank correlations over 1, 10 and 100 million token rows: this package
against plain pandas.

    python benchmarks/analysis.py --out benchmarks/results/analysis.json
    python benchmarks/analysis.py --rows 1000000 --pandas-rows 1000000 --rounds 1

Each measurement runs in a fresh process over Parquet shards of a million rows in a temporary
folder; time is that of the work, imports left out; peak memory is that of the whole process. Rounds
of the two are interleaved; ratios are of medians. Both give the quadrant of every token, tokens,
rollouts and prompts of each quadrant, and Spearman's correlations of entropy and both divergences.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

from measuring import fresh_process, write_results

SHARD_ROWS = 1_000_000
ROLLOUT_TOKENS = 250
COLUMNS = ["student_entropy", "reverse_kl", "forward_kl"]


def write_shard(folder: Path, index: int, rows: int) -> None:
    """A shard of rollouts of 250 tokens, four a prompt, with the columns that the analysis
    reads."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(index)
    rollouts = max(1, rows // ROLLOUT_TOKENS)
    of_row = np.arange(rows) // ROLLOUT_TOKENS % rollouts
    entropy = rng.gamma(0.3, size=rows).astype(np.float32)
    divergence = (rng.gamma(0.4, size=rows) * (0.3 + entropy)).astype(np.float32)
    prompts = pl.Series([f"p{index:04d}-{rollout // 4:05d}" for rollout in range(rollouts)])
    names = prompts + pl.Series([f"/{rollout % 4}" for rollout in range(rollouts)])
    table = {
        "rollout_id": names.gather(of_row),
        "prompt_id": prompts.gather(of_row),
        "position": pl.Series(np.arange(rows) % ROLLOUT_TOKENS, dtype=pl.Int32),
        "batch_id": pl.Series(of_row // 32, dtype=pl.Int32),
        "loss_mask": pl.repeat(True, rows, eager=True),
        "student_entropy": entropy,
        "reverse_kl": divergence,
        "forward_kl": (divergence * rng.lognormal(0.0, 0.5, size=rows)).astype(np.float32),
    }
    pl.DataFrame(table).write_parquet(folder / f"{index:05d}.parquet")


def with_package(folder: Path) -> dict:
    """The survey of this package, streaming or not as it decides."""
    import polars as pl

    from tip_analysis.analysis.survey import survey_tokens

    start = time.perf_counter()
    survey = survey_tokens(pl.scan_parquet(folder / "*.parquet"), columns=COLUMNS)
    seconds = time.perf_counter() - start
    error = survey.correlations["spearman_error"].max()
    correlations = survey.correlations["spearman"].to_list()
    return {
        "seconds": seconds,
        "method": survey.method,
        "shares": survey.shares["share"].to_list(),
        "correlations": correlations,
        "stated_error": error,
    }


def with_pandas(folder: Path) -> dict:
    """The same with plain pandas, as one would write it in a notebook."""
    import pandas as pd

    start = time.perf_counter()
    frame = pd.read_parquet(folder, columns=["rollout_id", "prompt_id", "loss_mask", *COLUMNS])
    frame = frame[frame["loss_mask"]]
    high_entropy = frame["student_entropy"] > frame["student_entropy"].median()
    high_divergence = frame["reverse_kl"] > frame["reverse_kl"].mean()
    frame = frame.assign(
        quadrant=1 + 2 * (~high_entropy).astype("int8") + (~high_divergence).astype("int8")
    )
    grouped = frame.groupby("quadrant")
    table = grouped.agg({"rollout_id": "nunique", "prompt_id": "nunique"}).assign(
        num_tokens=grouped.size()
    )
    correlations = frame[COLUMNS].corr(method="spearman").to_numpy()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "method": "pandas",
        "shares": (table["num_tokens"] / len(frame)).tolist(),
        "correlations": [float(correlations[i, j]) for i in range(3) for j in range(i + 1, 3)],
        "stated_error": 0.0,
    }


ENGINES = {"package": with_package, "pandas": with_pandas}


def measure(engine: str, folder: Path) -> dict:
    """One engine in a fresh process."""
    try:
        return {"engine": engine, **fresh_process(__file__, "--worker", engine, "--folder", folder)}
    except SystemExit as failure:
        return {"engine": engine, "failed": str(failure)}


def run(rows: int, engines: list[str], rounds: int) -> dict:
    """All rounds at one size, with medians and ratios."""
    with tempfile.TemporaryDirectory(prefix="tip-analysis-") as name:
        folder = Path(name)
        for index in range(-(-rows // SHARD_ROWS)):
            write_shard(folder, index, min(SHARD_ROWS, rows - index * SHARD_ROWS))
        results = [measure(engine, folder) for _ in range(rounds) for engine in engines]
    summary: dict = {"rows": rows, "rounds": results}
    for engine in engines:
        done = [
            result for result in results if result["engine"] == engine and "failed" not in result
        ]
        if done:
            summary[engine] = {
                "seconds": statistics.median(result["seconds"] for result in done),
                "peak_mb": max(result["peak_mb"] for result in done),
                "method": done[0]["method"],
                "stated_error": done[0]["stated_error"],
            }
    if {"package", "pandas"} <= set(summary):
        ours, theirs = (
            next(r for r in results if r["engine"] == engine and "failed" not in r)
            for engine in ENGINES
        )
        summary["times_faster"] = summary["pandas"]["seconds"] / summary["package"]["seconds"]
        summary["memory_ratio"] = summary["package"]["peak_mb"] / summary["pandas"]["peak_mb"]
        summary["largest_share_difference"] = max(
            abs(a - b) for a, b in zip(ours["shares"], theirs["shares"], strict=True)
        )
        pairs = zip(ours["correlations"], theirs["correlations"], strict=True)
        summary["largest_correlation_difference"] = max(abs(a - b) for a, b in pairs)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1_000_000, 10_000_000, 100_000_000],
        help="table sizes",
    )
    parser.add_argument(
        "--pandas-rows",
        type=int,
        nargs="*",
        default=[1_000_000, 10_000_000],
        help="sizes at which pandas runs too",
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds a size")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        result = ENGINES[options.worker](options.folder)
        print(
            json.dumps(
                result | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
            )
        )
        return
    sizes = []
    for rows in options.rows:
        summary = run(
            rows, [*(["pandas"] if rows in options.pandas_rows else []), "package"], options.rounds
        )
        sizes.append(summary)
        for engine in ("package", "pandas"):
            if engine in summary:
                part = summary[engine]
                print(
                    f"{rows:>12,} rows  {engine:8} {part['seconds']:7.2f} s  {part['peak_mb']:7.0f}"
                    f" MB  {part['method']}"
                )
        if "times_faster" in summary:
            print(
                f"{'':17} {summary['times_faster']:.1f} times faster, {summary['memory_ratio']:.2f}"
                " of the memory"
            )
    write_results(options.out, options, sizes=sizes)


if __name__ == "__main__":
    main()
