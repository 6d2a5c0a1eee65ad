"""Selections of a run: scored tokens in, `masks/*.parquet` (`schema.MaskTable`) out, one shard for
each mask.

A mask is a pure function of the token table, the rule, ρ, the scope and the seed, so one that is
there already is kept.
"""

from collections.abc import Sequence

import polars as pl

from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import exact_ratio, rule, to_masks
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.names import Loss
from tip_analysis.core.progress import track
from tip_analysis.core.run_folder import Run

NEEDS_GRADIENTS = ("gradient_oracle",)
"""Rules that select among the tokens whose gradients were measured, and no others."""


def write_masks(
    run: Run,
    *,
    rules: Sequence[str],
    retention_ratios: Sequence[float],
    selection_scope: str = "rollout",
    seeds: Sequence[int] = (0,),
    normalization_scope: str = "run",
    divergence_clip: float | None = None,
    overwrite: bool = False,
) -> pl.DataFrame:
    """Add one mask for every rule, ratio and (for rules that sample) seed.

    Returns:
        The masks asked for, those that were there already included (`schema.MaskTable`).

    Raises:
        UnknownNameError, OptionError: a rule, ratio or scope is not valid.
        RunError: tokens are not scored, or a rule needs gradients that were not measured.
        ConfigurationMismatchError: a mask of that name was made with another normalization or from
            other tokens.
    """
    wanted = _wanted(rules, retention_ratios, seeds)
    scores = add_scores(
        run.tokens(), normalization_scope=normalization_scope, divergence_clip=divergence_clip
    ).collect()
    tables = {False: (scores.lazy(), {"tokens": run.table_hash("tokens")})}
    if needing := [name for name in rules if name in NEEDS_GRADIENTS]:
        measured = (
            scores.lazy()
            .join(
                measured_alignment(run, needing[0]),
                on=["rollout_id", "position"],
                maintain_order="left",
            )
            .collect()
        )
        tables[True] = (
            measured.lazy(),
            tables[False][1] | {"gradients": run.table_hash("gradients")},
        )
    masks = []
    with track("selecting", len(wanted), unit="masks") as advance:
        for name, ratio, seed in wanted:
            key = {
                "rule": name,
                "retention_ratio": ratio,
                "selection_scope": selection_scope,
                "seed": seed,
            }
            normalization = {
                "normalization_scope": normalization_scope,
                "divergence_clip": divergence_clip,
            }
            scored, inputs = tables[name in NEEDS_GRADIENTS]
            stage = run.begin(
                "select", key=key, config=key | normalization, inputs=inputs, overwrite=overwrite
            )
            if not stage.is_whole(0):
                mask = to_masks(
                    scored,
                    rules=[name],
                    retention_ratios=[ratio],
                    selection_scope=selection_scope,
                    seeds=[seed],
                )
                stage.write(0, mask)
                stage.finish(num_selected=mask.height)
            masks.append(pl.read_parquet(stage.path(0)))
            advance()
    return pl.concat(masks)


def measured_alignment(run: Run, purpose: str) -> pl.LazyFrame:
    """φ_t of each token under the reverse KL, over the widest parameter scope that was measured.

    Raises:
        RunError: no gradients were measured.
    """
    if not run.has("gradients"):
        raise RunError(
            f"{purpose} needs gradient norms; `tip-analysis gradients {run.path}` measures them"
        )
    measured = run.gradients().filter(pl.col("loss") == Loss.REVERSE_KL.value)
    scopes = measured.select(pl.col("param_scope").unique()).collect()["param_scope"].to_list()
    if not scopes:
        raise RunError(
            f"{purpose} needs gradients of the reverse KL; `tip-analysis gradients {run.path}`"
            " measures them"
        )
    scope = "all" if "all" in scopes else sorted(scopes)[0]
    of_token = measured.filter(pl.col("param_scope") == scope).group_by("rollout_id", "position")
    return of_token.agg(pl.col("grad_dot_loss").first())


def _wanted(
    rules: Sequence[str], ratios: Sequence[float], seeds: Sequence[int]
) -> list[tuple[str, float, int]]:
    """Every (rule, ρ, seed) asked for, once: `all` at ρ = 1, rules that do not sample under seed
    0."""
    if not rules or not ratios or not seeds:
        raise OptionError("name at least one rule, one ratio and one seed")
    for ratio in ratios:
        exact_ratio(ratio)
    wanted = [
        (name, 1.0 if name == "all" else float(ratio), seed if rule(name).sampled else 0)
        for name in rules
        for ratio in ratios
        for seed in seeds
    ]
    return list(dict.fromkeys(wanted))
