"""Selections of a run: scored tokens in, `masks/*.parquet` (`schema.MaskTable`) out, one shard for
each mask.

A mask is a pure function of the token table, the rule, ρ, the scope and the seed, so one that is
there already is kept.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from tip_analysis.analysis.measurements import (
    Measurement,
    Preference,
    measurement_hash,
    run_measurement,
    with_gradients,
)
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.retention import exact_ratio
from tip_analysis.analysis.rule_kind import columns_read, columns_weighed
from tip_analysis.analysis.rules import rule
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import to_masks
from tip_analysis.analysis.taxonomy import CutOptions, Taxonomy
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import Scope, SelectionScope
from tip_analysis.core.progress import track
from tip_analysis.core.run_folder import Run
from tip_analysis.core.table_files import read

CUT_NAMES = ("entropy_cut", "divergence_cut", "cut_scope")
"""Options of the cuts, as a mask's record names them."""


def write_masks(
    run: Run,
    *,
    rules: Sequence[str],
    retention_ratios: Sequence[float],
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seeds: Sequence[int] = (0,),
    normalization_scope: Scope | str = Scope.RUN,
    divergence_clip: float | None = None,
    cuts: CutOptions | None = None,
    measurement: Preference | None = None,
    overwrite: bool = False,
) -> pl.DataFrame:
    """Add one mask for every rule, ratio and (for rules that sample) seed.

    Args:
        run: a run folder with scored tokens.
        rules, retention_ratios, selection_scope, seeds: as in `selection.select_tokens`.
        normalization_scope, divergence_clip: as in `scores.add_scores`.
        cuts: `entropy_cut`, `divergence_cut`, `cut_scope` as in `Taxonomy`, for the rules that read
            quadrants; their masks' records name them.
        measurement: whose φ `gradient_oracle` selects by, where several were measured; by default
            the run's own preference. The mask's record names it.
        overwrite: make masks again that are there.

    Returns:
        The masks asked for, those that were there already included (`schema.MaskTable`).

    Raises:
        UnknownNameError, OptionError: a rule, ratio or scope is not valid.
        RunError: tokens are not scored, or a rule needs gradients that were not measured.
        SchemaError, OptionError: no such measurement, or several and none is preferred.
        ConfigurationMismatchError: a mask of that name was made with another normalization, from
            other tokens or from another measurement.
    """
    wanted = _wanted(rules, retention_ratios, seeds)
    how = {"normalization_scope": Scope(normalization_scope), "divergence_clip": divergence_clip}
    scope = SelectionScope(selection_scope)
    kinds = {name: (rule(name).needs_gradients, reads_quadrants(name)) for name in rules}
    tables = {
        (needs, quadrants): candidates(
            run,
            needs_gradients=needs,
            measurement=measurement,
            cuts=(cuts or {}) if quadrants else None,
            **how,
        )
        for needs, quadrants in set(kinds.values())
    }
    masks = []
    with track("selecting", len(wanted), unit="masks") as advance:
        for name, ratio, seed in wanted:
            key = {"rule": name, "retention_ratio": ratio, "selection_scope": scope}
            among = tables[kinds[name]]
            masks.append(_write_mask(run, key | {"seed": seed}, how, among, overwrite=overwrite))
            advance()
    return pl.concat(masks)


def _write_mask(
    run: Run, key: dict[str, Any], how: dict[str, Any], among: "Candidates", *, overwrite: bool
) -> pl.DataFrame:
    """One mask, made unless it is there."""
    config = key | how | among.recorded
    stage = run.begin("select", key=key, config=config, inputs=among.inputs, overwrite=overwrite)
    if not stage.is_whole(0):
        mask = to_masks(
            among.scored,
            rules=[key["rule"]],
            retention_ratios=[key["retention_ratio"]],
            selection_scope=key["selection_scope"],
            seeds=[key["seed"]],
        )
        stage.write(0, mask)
    mask = read(stage.path(0))
    stage.finish(num_selected=mask.height)
    return mask


@dataclass(frozen=True)
class Candidates:
    """The tokens that a rule selects among, and where they come from."""

    scored: pl.LazyFrame
    """Token table with scores, and with φ where the rule needs it."""
    inputs: dict[str, str]
    """Hashes of the tables that it was made from."""
    measurement: Measurement | None = None
    """Whose φ, where the rule needs it."""
    taxonomy: Taxonomy | None = None
    """Whose quadrants, where the rule reads them."""

    @property
    def recorded(self) -> dict[str, Any]:
        """What a mask's record says of the measurement and of the cuts; nothing without them."""
        found: dict[str, Any] = {}
        if self.measurement is not None:
            found["measurement"] = asdict(self.measurement)
        if self.taxonomy is not None:
            found |= {name: str(getattr(self.taxonomy, name)) for name in CUT_NAMES}
        return found


def candidates(
    run: Run,
    *,
    needs_gradients: bool,
    measurement: Preference | None = None,
    normalization_scope: Scope | str = Scope.RUN,
    divergence_clip: float | None = None,
    cuts: CutOptions | None = None,
) -> Candidates:
    """The tokens of a run that a rule selects among: all, or those whose gradients of the reverse
    KL were measured (`measurements.run_measurement`); with quadrants where `cuts` are given.

    Raises:
        RunError: tokens are not scored, or no gradients were measured.
        SchemaError, OptionError: no such measurement, or several and none is preferred.
    """
    chosen = run_measurement(run, wanted=measurement) if needs_gradients else None
    scored = add_scores(
        run.tokens(), normalization_scope=normalization_scope, divergence_clip=divergence_clip
    )
    inputs = {"tokens": run.table_hash("tokens")}
    if chosen is not None:
        scored = with_gradients(scored, run.gradients(), chosen)
        inputs["gradients"] = measurement_hash(run, chosen)
    taxonomy = None if cuts is None else Taxonomy(**cuts)
    if taxonomy is not None:
        scored = assign_quadrants(scored, cuts=taxonomy.measure(run.tokens()))
    return Candidates(scored.collect().lazy(), inputs, chosen, taxonomy)


def reads_quadrants(name: str) -> bool:
    """Whether a rule reads the quadrants that two cuts make."""
    return "quadrant" in columns_read(rule(name)) | columns_weighed(rule(name))


def recorded_measurements(run: Run) -> list[Measurement]:
    """The measurements whose φ some stored mask was made from, as `run.json` has them."""
    found = [
        Measurement(**stage["config"]["measurement"])
        for stage in run.stages().values()
        if stage["table"] == "masks" and stage["config"].get("measurement")
    ]
    return list(dict.fromkeys(found))


def _wanted(
    rules: Sequence[str], ratios: Sequence[float], seeds: Sequence[int]
) -> list[tuple[str, float, int]]:
    """Every (rule, ρ, seed) asked for, once: a rule that keeps all at ρ = 1, rules that do not
    sample under seed 0."""
    if not rules or not ratios or not seeds:
        raise OptionError("name at least one rule, one ratio and one seed")
    for ratio in ratios:
        exact_ratio(ratio)
    wanted = [
        (name, rule(name).retention(ratio), rule(name).seed(seed))
        for name in rules
        for ratio in ratios
        for seed in seeds
    ]
    return list(dict.fromkeys(wanted))
