"""A run as flat files for other tools: tokens with scores and quadrants, masks, and labels that
trainers read.

Written: `tokens.parquet` (every token column, the scores, `quadrant`), `rollouts.parquet`, and
where they were made `vocabulary.parquet`, `gradients.parquet`, `masks.parquet` (one row per
selected token) and `labels/RULE-RATIO-SCOPE-SEED.parquet`: one row per rollout with `input_ids` and
`labels` (−100 where a token is not selected), as most trainers take them, and `selected`, one bool
per response token.
"""

from pathlib import Path

import polars as pl

from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy
from tip_analysis.core.atomic_files import write_atomically
from tip_analysis.core.errors import OptionError
from tip_analysis.core.run_folder import Run

IGNORED = -100
"""The label that cross-entropy losses leave out."""


def export_run(
    run: Run, folder: Path, taxonomy: Taxonomy = DEFAULT_TAXONOMY, *, overwrite: bool = False
) -> dict[Path, int]:
    """Write a run's tables as flat Parquet files; tables larger than memory stream.

    Args:
        run: a run folder with scored tokens.
        folder: where the files go.
        taxonomy: how tokens are scored and put into quadrants.
        overwrite: replace files that are there.

    Returns:
        Each file with its number of rows.

    Raises:
        OptionError: `folder` holds files already.
        RunError: tokens are not scored.
    """
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise OptionError(
            f"{folder} is not empty; name another folder, or --overwrite what it holds"
        )
    tokens = run.tokens()
    scored = add_scores(tokens, normalization=taxonomy.normalization(tokens))
    tables = {
        "tokens": assign_quadrants(scored, cuts=taxonomy.measure(tokens)),
        "rollouts": run.rollouts(),
    }
    tables |= {
        name: run.table(name)
        for name in ("vocabulary", "gradients", "masks", "ablations", "evaluations")
        if run.has(name)
    }
    if run.has("masks"):
        tables |= {
            f"labels/{name}": labels
            for name, labels in mask_labels(run.rollouts(), run.masks()).items()
        }
    return {
        path: _write(path, frame)
        for name, frame in tables.items()
        for path in [folder / f"{name}.parquet"]
    }


def mask_labels(rollouts: pl.LazyFrame, masks: pl.LazyFrame) -> dict[str, pl.LazyFrame]:
    """For each mask one row per rollout: `rollout_id`, `input_ids`, `labels`, `selected`."""
    keys = ["rule", "retention_ratio", "selection_scope", "seed"]
    found = masks.select(keys).unique().sort(keys).collect().iter_rows(named=True)
    return {
        f"{key['rule']}-{key['retention_ratio']:g}-{key['selection_scope']}-{key['seed']}": _labels(
            rollouts, masks.filter(*[pl.col(name) == value for name, value in key.items()])
        )
        for key in found
    }


def _labels(rollouts: pl.LazyFrame, mask: pl.LazyFrame) -> pl.LazyFrame:
    num_response = pl.col("response_token_ids").list.len()
    tokens = (
        rollouts.select(
            "rollout_id", "response_token_ids", position=pl.int_ranges(num_response, dtype=pl.Int32)
        )
        .filter(num_response > 0)
        .explode("response_token_ids", "position")
        .join(
            mask.select("rollout_id", "position", selected=pl.lit(True)),
            on=["rollout_id", "position"],
            how="left",
            maintain_order="left",
        )
        .with_columns(pl.col("selected").fill_null(False))
        .with_columns(label=pl.when("selected").then("response_token_ids").otherwise(IGNORED))
        .group_by("rollout_id", maintain_order=True)
        .agg("label", "selected")
    )
    ignored_prompt = pl.lit(IGNORED, pl.Int32).repeat_by(pl.col("prompt_token_ids").list.len())
    return rollouts.join(tokens, on="rollout_id", how="left", maintain_order="left").select(
        "rollout_id",
        input_ids=pl.col("prompt_token_ids").list.concat("response_token_ids"),
        labels=ignored_prompt.list.concat(pl.col("label").fill_null([])),
        selected=pl.col("selected").fill_null([]),
    )


def _write(path: Path, frame: pl.LazyFrame) -> int:
    write_atomically(path, frame.sink_parquet)
    return pl.scan_parquet(path).select(pl.len()).collect().item()
