"""What a step on one group of tokens does to the loss of another: from products per token.

Reads rows of `instrument_tables.InfluenceTable`: of every token t and source group a the product
⟨P ∇L_a, g_t⟩, ∇L_a from the other fold of prompts. L is the mean over rollouts of the mean over
tokens, L_a the part of it that is group a's, so that the L_a sum up to L and each row of the matrix
to ⟨P ∇L_a, ∇L⟩. With w_t a token's weight in L,

    K_ab = ⟨P ∇L_a, ∇L_b⟩ = Σ_{t in b} w_t ⟨P ∇L_a, g_t⟩,

the mean of both orders of the folds: with its own tokens inside ∇L_a, K_aa would be positive by
construction. A small step η on group a lowers L_b by η·K_ab. `cosine` is K_ab / √(K_aa K_bb), null
where a squared norm comes out negative; `per_token` is K_ab over the weights of both groups: the
effect of a unit of loss on a token of a on the mean loss of b's tokens.

Intervals resample prompts on both sides, to first order: in a resample with counts n_p, K_ab
changes by Σ_p (n_p − 1) times what p adds to either side, the other side held.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from tip_analysis.analysis.bootstrap import Floats, expanded_interval, prompt_weights
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.run_folder import Run

NUM_RESAMPLES = 1000
ALL = "all"
"""L itself, among the names of its groups."""
_KEYS = ("grouping", "preconditioner", "param_scope", "loss", "seed")
_NEEDED = ("source", "group", "prompt_id", "fold", "weight", "grad_dot_source")


def influence_matrix(
    rows: pl.DataFrame | pl.LazyFrame, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> pl.DataFrame:
    """The influence of every group on every group, raw, as a cosine and per token.

    Args:
        rows: rows of `InfluenceTable` of one grouping, preconditioner, scope, loss and seed.
        num_resamples, seed: of prompts.

    Returns:
        A `result_tables.InfluenceMatrix`: source, target, then influence, cosine and per_token,
        each with `_low` and `_high`, weight_source and weight_target (shares of L), num_tokens (of
        the target) and num_prompts.

    Raises:
        SchemaError: a column is missing, or the rows are of several configurations.
    """
    table = rows.lazy().collect()
    _check(table)
    names = groups_of(table)
    prompts = sorted(table["prompt_id"].unique())
    parts = _prompt_parts(table, names, prompts)
    fold = _folds(table, prompts)
    weights = prompt_weights(len(prompts), num_resamples, seed).astype(np.float64)
    value, again = _inner(parts, fold, weights)
    shares = _shares(table, names)
    scale = np.outer(shares, shares)
    with np.errstate(divide="ignore", invalid="ignore"):
        forms = {
            "influence": (value, again),
            "cosine": (_cosines(value), _cosines(again)),
            "per_token": (value / scale, again / scale),
        }
    return _table(table, names, forms, shares, len(prompts))


def _check(table: pl.DataFrame) -> None:
    require_columns(table.lazy(), [*_KEYS, *_NEEDED], "influence_matrix")
    found = table.select(_KEYS).unique().height
    if found != 1:
        raise SchemaError(
            f"influence_matrix is of one configuration, found {found}: filter by {', '.join(_KEYS)}"
        )


def groups_of(table: pl.DataFrame) -> list[str]:
    """The groups of a table: sources and groups of tokens, by name."""
    return sorted({*table["source"].unique(), *table["group"].unique()})


def _prompt_parts(table: pl.DataFrame, names: list[str], prompts: list[str]) -> Floats:
    """[A, B, P] Σ w_t ⟨P ∇L_a, g_t⟩ over the tokens of b in a prompt."""
    sums = (
        table.with_columns(part=pl.col("weight") * pl.col("grad_dot_source").fill_null(0.0))
        .group_by("source", "group", "prompt_id")
        .agg(pl.col("part").sum())
    )
    index = [
        sums[column].replace_strict(values, range(len(values)), return_dtype=pl.Int64).to_numpy()
        for column, values in (("source", names), ("group", names), ("prompt_id", prompts))
    ]
    parts = np.zeros((len(names), len(names), len(prompts)))
    parts[tuple(index)] = sums["part"].to_numpy()
    return parts


def _folds(table: pl.DataFrame, prompts: list[str]) -> np.ndarray:
    known = dict(table.select("prompt_id", "fold").unique().iter_rows())
    return np.array([known[prompt] for prompt in prompts])


def _inner(parts: Floats, fold: np.ndarray, weights: Floats) -> tuple[Floats, Floats]:
    """[A, B] inner products, and [R, A, B] in resamples."""
    swapped = parts.transpose(1, 0, 2)
    value, change = np.zeros(parts.shape[:2]), np.zeros((len(weights), *parts.shape[:2]))
    for one in (0, 1):
        as_target = np.where(fold == one, parts, 0.0)
        as_source = np.where(fold != one, swapped, 0.0)
        value += as_target.sum(-1) / 2
        change += np.einsum("rp,abp->rab", weights - 1.0, as_target + as_source) / 2
    return value, value + change


def _cosines(products: Floats) -> Floats:
    own = np.diagonal(products, axis1=-2, axis2=-1)
    norms = np.where(own > 0.0, own, np.nan)
    return products / np.sqrt(norms[..., :, None] * norms[..., None, :])


def _shares(table: pl.DataFrame, names: list[str]) -> Floats:
    """[A] the share of L that each group's tokens have, the mean over the folds."""
    one = table.filter(pl.col("source") == table["source"][0])
    sums = dict(one.group_by("group").agg(pl.col("weight").sum()).iter_rows())
    total = sum(sums.values())
    return np.array([sums.get(name, 0.0) / total for name in names])


def _table(
    table: pl.DataFrame,
    names: list[str],
    forms: dict[str, tuple[Floats, Floats]],
    shares: Floats,
    num_prompts: int,
) -> pl.DataFrame:
    size = len(names)
    one = table.filter(pl.col("source") == table["source"][0])
    counts = dict(one.group_by("group").len().iter_rows())
    columns: dict[str, object] = {
        "source": [name for name in names for _ in names],
        "target": names * size,
    }
    for form, (value, again) in forms.items():
        interval = expanded_interval(
            value.ravel(), again.reshape(len(again), size * size), num_prompts
        )
        columns |= {
            form: interval.value,
            f"{form}_low": interval.low,
            f"{form}_high": interval.high,
        }
    columns |= {
        "weight_source": np.repeat(shares, size),
        "weight_target": np.tile(shares, size),
        "num_tokens": [counts.get(name, 0) for name in names] * size,
        "num_prompts": [num_prompts] * (size * size),
    }
    return pl.DataFrame(columns).with_columns(
        pl.when(pl.col(pl.Float64).is_finite()).then(pl.col(pl.Float64))
    )


def influence_columns(rows: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
    """One row per token: rollout_id, position, group, weight, and `influence_A`, ⟨P ∇L_a, g_t⟩, for
    every source group."""
    table = rows.lazy().collect()
    _check(table)
    wide = table.pivot(
        on="source",
        index=["rollout_id", "position", "prompt_id", "group", "weight"],
        values="grad_dot_source",
        maintain_order=True,
    )
    return wide.rename({name: f"influence_{name}" for name in table["source"].unique()})


def assumption_2(
    rows: pl.DataFrame | pl.LazyFrame,
    gradients: pl.DataFrame | pl.LazyFrame,
    norms: Mapping[str, Sequence[float]],
) -> pl.DataFrame:
    """What Assumption 2 drops: ‖Σ w_t g_t‖² against Σ w_t² ‖g_t‖², of each group and of L.

    L is here the mean of both folds' losses, so that a token's weight in it is half of that in its
    fold.

    Args:
        rows: rows of `InfluenceTable` of one configuration, without a preconditioner.
        gradients: rollout_id, position, grad_norm_sq of one measurement of the same loss and
            parameters.
        norms: of each group, and of `all`, the norm ‖∇L_a‖ in each fold (the stage's summary).

    Returns:
        A `result_tables.DroppedTable`: group (`all` for L), norm_sq (‖∇L_a‖²), kept (Σ w² ‖g‖²),
        dropped (norm_sq − kept: the products of different tokens), kept_share, num_tokens. `kept`
        is null where a token has no measured norm.

    Raises:
        SchemaError: a column is missing, or the rows are of several configurations.
    """
    table = rows.lazy().collect()
    _check(table)
    names = groups_of(table)
    across, _ = _inner(
        _prompt_parts(table, names, prompts := sorted(table["prompt_id"].unique())),
        _folds(table, prompts),
        np.ones((1, len(prompts))),
    )
    own = dict(zip(names, np.diagonal(across), strict=True)) | {ALL: across.sum()}
    kept = _kept(table, gradients.lazy().select("rollout_id", "position", "grad_norm_sq").collect())
    rows_of = [
        {
            "group": name,
            "norm_sq": (norms[name][0] ** 2 + norms[name][1] ** 2) / 4 + own[name] / 2,
            **kept[name],
        }
        for name in (*names, ALL)
        if name in norms and name in kept
    ]
    frame = pl.DataFrame(rows_of, schema_overrides={"kept": pl.Float64})
    return frame.with_columns(
        dropped=pl.col("norm_sq") - pl.col("kept"), kept_share=pl.col("kept") / pl.col("norm_sq")
    )


def _kept(table: pl.DataFrame, gradients: pl.DataFrame) -> dict[str, dict[str, float | int | None]]:
    """Σ (w/2)² ‖g‖² and the number of tokens, of each group and of all."""
    one = table.filter(pl.col("source") == table["source"][0])
    joined = one.join(gradients, on=["rollout_id", "position"], how="left").with_columns(
        square=(pl.col("weight") / 2).pow(2) * pl.col("grad_norm_sq")
    )
    parts = {str(name): part for (name,), part in joined.group_by("group")} | {ALL: joined}
    return {
        name: {
            "kept": None if part["square"].null_count() else float(part["square"].sum()),
            "num_tokens": part.height,
        }
        for name, part in parts.items()
    }


def configurations(rows: pl.DataFrame) -> list[pl.DataFrame]:
    """Rows of `InfluenceTable` apart by grouping, preconditioner, scope, loss and seed."""
    return rows.partition_by(*_KEYS, maintain_order=True)


def recorded_norms(run: Run, rows: pl.DataFrame) -> dict[str, list[float]]:
    """‖∇L_a‖ of each group and of `all` in both folds, from the record of the stage that wrote
    these rows; empty where it is not on record."""
    wanted = rows.select(_KEYS).row(0, named=True)
    for stage in run.stages().values():
        config, shards = stage["config"], list(stage["shards"].values())
        same = all(str(config.get(name)) == str(value) for name, value in wanted.items())
        if stage["table"] == "influences" and same and shards:
            return shards[0].get("norms", {})
    return {}
