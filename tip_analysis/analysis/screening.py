"""The screen: how much of what looks important is an artefact.

Reads the token table (with `artefact`, which scoring fills in, and gradients where they were
measured) and answers, for each class of artefact: its share of every quadrant, of Σδ and of ΣM, and
of masks, with 95% intervals by resampling prompts. Masks are made twice, with all tokens and
without any artefact, and compared on the tokens that are none: an artefact moves other tokens'
ranks by setting the scale of the min-max.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from tip_analysis.analysis.arms import parse_arms
from tip_analysis.analysis.bootstrap import bootstrap_interval, group_index, sums_by_group
from tip_analysis.analysis.measurements import run_measurement, with_gradients
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy
from tip_analysis.core.contract_checks import polars_schema, require_columns, validate
from tip_analysis.core.names import Artefact, Quadrant, Scope, ScreenedPart
from tip_analysis.core.run_folder import Run, RunLike, open_run
from tip_analysis.core.schema import ScreenTable

ANY = "any"
"""All classes of artefact together."""
WORTH_A_WARNING = 0.05
"""Share of a quadrant or of a sum from which on a reader must know."""
RULES, RATIOS = ("entropy", "divergence", "soft_or", "q3"), (0.1, 0.2, 0.5)
SUMS = ("reverse_kl", "grad_norm_sq")
_OUTLIER_CHANGE = 0.1
_NEEDED = ("prompt_id", "batch_id", "loss_mask", "student_entropy", "artefact", *SUMS)
"""What quadrants and sums take; masks take what their rules do."""


def mark_outliers(tokens: pl.LazyFrame | pl.DataFrame, scope: Scope = Scope.RUN) -> pl.LazyFrame:
    """Fill `artefact` with `outlier` where one token alone sets the scale of δ̂.

    That is the largest finite δ of its normalization scope, where the range of δ without it is
    smaller by more than 10%; a token that is another artefact already stays that.
    """
    delta = pl.when("loss_mask", pl.col("reverse_kl").is_finite()).then(pl.col("reverse_kl"))
    ranked = tokens.lazy().with_columns(_delta=delta.cast(pl.Float64))
    column = pl.col("_delta")
    largest, second = (
        column.max(),
        column.sort(descending=True, nulls_last=True).get(1, null_on_oob=True),
    )
    change = (largest - second) / (largest - column.min())
    alone = (column == largest) & (change > _OUTLIER_CHANGE)
    if scope is Scope.BATCH:
        alone = alone.over("batch_id")
    label = pl.when(alone).then(pl.lit(str(Artefact.OUTLIER))).cast(pl.Enum(Artefact))
    return ranked.with_columns(artefact=pl.coalesce("artefact", label)).drop("_delta")


def screen_tokens(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    rules: Sequence[str] = RULES,
    ratios: Sequence[float] = RATIOS,
    num_resamples: int = 300,
    seed: int = 0,
) -> pl.DataFrame:
    """How much of each quadrant, of each sum and of each mask is artefact (method: artefacts).

    Args:
        tokens: the token table; with `grad_norm_sq` (M) where ΣM is to be screened too.
        taxonomy: cuts and normalization.
        rules, ratios: the masks that are screened.
        num_resamples: resamples of prompts behind each interval.
        seed: of the resamples, and of rules that sample.

    Returns:
        `schema.ScreenTable`: a row for every class of artefact that occurs and for `any`, in every
        part.

    Raises:
        SchemaError: a column is missing: tokens that were scored before artefacts were labelled.
    """
    tokens = tokens.lazy()
    require_columns(tokens, ["artefact", "loss_mask", "reverse_kl", "prompt_id"], "screen")
    scope = Scope(taxonomy.normalization_scope)
    present = tokens.collect_schema().names()
    needed = present if rules else [name for name in _NEEDED if name in present]
    marked = mark_outliers(tokens.select(needed), scope).filter("loss_mask").collect()
    if marked.is_empty():
        return pl.DataFrame(schema=polars_schema(ScreenTable))
    cuts = taxonomy.measure(marked)
    frame = assign_quadrants(marked, cuts=cuts).collect()
    masks = list(_masks(frame, taxonomy, rules, ratios, seed))
    rows = [
        row
        for part in (_quadrant_parts(frame), _sum_parts(frame), masks)
        for row in _shares(frame, part, num_resamples, seed)
    ]
    asked = {
        "entropy_cut": str(taxonomy.entropy_cut),
        "divergence_cut": str(taxonomy.divergence_cut),
    }
    table = pl.DataFrame([row | asked for row in rows], schema=polars_schema(ScreenTable))
    return validate(table, ScreenTable)


def screen(
    run: RunLike,
    *,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    rules: Sequence[str] = RULES,
    ratios: Sequence[float] = RATIOS,
    num_resamples: int = 300,
    seed: int = 0,
    overwrite: bool = False,
) -> pl.DataFrame:
    """Screen a run for artefacts, and add the result to its `screens/`.

    Args:
        run: a run folder with scored tokens.
        taxonomy, rules, ratios, num_resamples, seed: as in `screen_tokens`.
        overwrite: screen again what was screened already.

    Example:
        tip.screen("runs/mine").filter(pl.col("share") > 0.05)
    """
    run = open_run(run)
    inputs = {"tokens": run.table_hash("tokens")}
    if run.has("gradients"):
        inputs["gradients"] = run.table_hash("gradients")
    how: dict[str, Any] = {"rules": list(rules), "ratios": list(ratios)}
    how |= {"num_resamples": num_resamples, "seed": seed}
    config = {"taxonomy": taxonomy.arguments()} | how
    stage = run.begin("screen", config=config, inputs=inputs, overwrite=overwrite, additive=True)
    if not stage.is_whole(0):
        stage.write(0, screen_tokens(screened_tokens(run), taxonomy=taxonomy, **how))
    found = pl.read_parquet(stage.path(0), glob=False)
    stage.finish(num_artefacts=num_artefacts(found), warnings=warnings_of(found))
    return found


def screened_tokens(run: Run) -> pl.LazyFrame:
    """The token table, with M where gradients of the reverse KL were measured."""
    if not run.has("gradients"):
        return run.tokens()
    measured = with_gradients(run.tokens(), run.gradients(), run_measurement(run))
    keys = ["rollout_id", "position"]
    return run.tokens().join(
        measured.select(*keys, "grad_norm_sq"), on=keys, how="left", maintain_order="left"
    )


def num_artefacts(table: pl.DataFrame) -> int:
    """Tokens of a run that are artefacts, from its screen."""
    return int(table.filter(artefact=ANY, part=ScreenedPart.QUADRANT)["num_artefacts"].sum())


def warnings_of(table: pl.DataFrame) -> list[str]:
    """What a reader must know: artefacts that are more than 5% of a quadrant or of a sum."""
    worth = table.filter(
        pl.col("artefact") != ANY,
        pl.col("part") != ScreenedPart.MASK,
        pl.col("share") > WORTH_A_WARNING,
    )
    return [
        f"{row['share']:.1%} of {_PART_WORDS.get(row['name'], row['name'])} is an artefact:"
        f" {row['artefact']} ({row['num_artefacts']:,} of {row['num_tokens']:,} tokens)"
        for row in worth.sort("share", descending=True).iter_rows(named=True)
    ]


_PART_WORDS = {"reverse_kl": "the summed reverse KL", "grad_norm_sq": "the summed ‖g‖²"}

Part = tuple[ScreenedPart, str, np.ndarray, np.ndarray, float | None]
"""What it is, its name, which tokens belong to it [N] bool, what each weighs [N], Jaccard."""


def _quadrant_parts(frame: pl.DataFrame) -> list[Part]:
    ones = np.ones(frame.height)
    return [
        (ScreenedPart.QUADRANT, str(name), (frame["quadrant"] == name).fill_null(False).to_numpy(),
         ones, None)
        for name in Quadrant
    ]  # fmt: skip


def _sum_parts(frame: pl.DataFrame) -> list[Part]:
    parts: list[Part] = []
    for name in SUMS:
        if name in frame.columns:
            values = frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
            known = np.isfinite(values)
            parts.append((ScreenedPart.SUM, name, known, np.where(known, values, 0.0), None))
    return parts


def _masks(
    frame: pl.DataFrame,
    taxonomy: Taxonomy,
    rules: Sequence[str],
    ratios: Sequence[float],
    seed: int,
) -> Iterator[Part]:
    """Masks of all tokens, with how far they agree with those made without artefacts."""
    if not rules:
        return
    is_artefact = frame["artefact"].is_not_null().to_numpy()
    ones = np.ones(frame.height)
    others = _scored(frame.filter(pl.col("artefact").is_null()), taxonomy)
    scored = _scored(frame, taxonomy)
    for arm in parse_arms(rules, ratios):
        how = {"rule": arm.rule, "retention_ratio": arm.retention_ratio, "seed": seed}
        chosen = select_tokens(scored, **how).collect()["selected"].to_numpy()
        again = select_tokens(others, **how).collect()["selected"].to_numpy()
        before = chosen[~is_artefact]
        either = int((before | again).sum())
        agreement = int((before & again).sum()) / either if either else None
        yield ScreenedPart.MASK, str(arm), chosen, ones, agreement


def _scored(frame: pl.DataFrame, taxonomy: Taxonomy) -> pl.LazyFrame:
    return add_scores(
        frame,
        normalization_scope=taxonomy.normalization_scope,
        divergence_clip=taxonomy.divergence_clip,
    )


def _shares(
    frame: pl.DataFrame, parts: Sequence[Part], num_resamples: int, seed: int
) -> Iterator[dict[str, object]]:
    labels = frame["artefact"].cast(pl.String).fill_null("").to_numpy()
    prompts = group_index(frame["prompt_id"])
    size = int(prompts.max()) + 1
    for part, name, belongs, weights, agreement in parts:
        for label in (*sorted(set(labels) - {""}), ANY):
            fits = belongs & (labels != "" if label == ANY else labels == label)
            columns = np.column_stack([weights * fits, weights * belongs])
            sums = sums_by_group(columns, prompts, size)
            found = bootstrap_interval(
                sums[:, :1], sums[:, 1:], num_resamples=num_resamples, seed=seed
            )
            yield {
                "artefact": label,
                "part": part,
                "name": name,
                "num_tokens": int(belongs.sum()),
                "num_artefacts": int(fits.sum()),
                "share": _known(found.value[0]),
                "share_low": _known(found.low[0]),
                "share_high": _known(found.high[0]),
                "jaccard": agreement,
            }


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
