"""Which of a run's masks are compared side by side, and over which tokens."""

import polars as pl

from tip_analysis.analysis.mask_tables import MASK_KEYS, overlap
from tip_analysis.analysis.masks import recorded_measurements
from tip_analysis.analysis.measurements import Measurement
from tip_analysis.analysis.rules import keeps_all, known_rules
from tip_analysis.analysis.run_view import RunView
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.names import Loss

_PLACE = ["rollout_id", "position"]

MAX_MASKS = 48
"""Masks that are compared; of more, those of the first seeds and scope."""


def compared_masks(view: RunView, num_masks: int = MAX_MASKS) -> pl.DataFrame:
    """Rows of at most `num_masks` masks over `compared_tokens`."""
    keys = (
        view.run.masks().select(MASK_KEYS).unique().collect().sort("seed", *MASK_KEYS[:3])
    ).head(num_masks)
    wanted = view.run.masks().join(keys.lazy(), on=MASK_KEYS, how="semi", nulls_equal=True)
    if view.prompt_sample is not None:
        rollouts = view.sampled(view.raw).filter("loss_mask").select("rollout_id").unique()
        wanted = wanted.join(rollouts, on="rollout_id", how="semi")
    if comparing_measurements(view):  # only known tokens are left out: strangers are found later
        left_out = view.raw.join(compared_tokens(view), on=_PLACE, how="anti").select(_PLACE)
        wanted = wanted.join(left_out, on=_PLACE, how="anti")
    scope = pl.col("selection_scope").cast(pl.String)
    return wanted.collect().with_columns(scope).sort("rule", "retention_ratio", "seed")


def comparing_measurements(view: RunView) -> list[Measurement]:
    """The measurements that some mask's rule selected by: such a rule can choose among the measured
    tokens only, so that all rules are compared on those. Empty where no rule needs gradients."""
    if not (view.run.has("masks") and view.measurements):
        return []
    names = view.run.masks().select(pl.col("rule").unique()).collect()["rule"]
    if not any(rule.needs_gradients for rule in known_rules(names).values()):
        return []
    recorded = [one for one in recorded_measurements(view.run) if one in view.measurements]
    if recorded or Loss.REVERSE_KL not in view.losses:
        return recorded
    return [view.measurement()]


def compared_tokens(view: RunView) -> pl.LazyFrame:
    """The written tokens of the sampled prompts, with quadrants; only those with gradients where a
    rule selects by them (`comparing_measurements`)."""
    tokens = view.sampled(view.tokens).filter("loss_mask")
    for measurement in comparing_measurements(view):
        measured = measurement.rows(view.run.gradients()).select(_PLACE)
        tokens = tokens.join(measured, on=_PLACE, how="semi")
    return tokens


def tokens_with_alignment(view: RunView) -> pl.LazyFrame:
    """`compared_tokens`, with φ of the reverse KL where all of them have it."""
    tokens = compared_tokens(view)
    if Loss.REVERSE_KL not in view.losses:
        return tokens
    measured = view.sampled(view.measured()).filter("loss_mask")
    measured = measured.join(tokens.select(_PLACE), on=_PLACE, how="semi")
    same = measured.select(pl.len()).collect().item() == tokens.select(pl.len()).collect().item()
    return measured if same else tokens


def taxonomy_of_compared(view: RunView) -> Taxonomy:
    """The view's taxonomy; where only measured tokens are compared, with the cuts that the whole
    run has, so that Q3 is the same Q3 on every part of the page."""
    cuts = view.cuts
    whole = not comparing_measurements(view) or num_compared(view) == view.population.num_tokens
    if whole or cuts.entropy.value is None or cuts.divergence.value is None:
        return view.options.taxonomy
    return view.options.taxonomy.changed(
        entropy_cut=cuts.entropy.value, divergence_cut=cuts.divergence.value
    )


def num_compared(view: RunView) -> int:
    """How many tokens `compared_tokens` has."""
    return int(compared_tokens(view).select(pl.len()).collect().item())


def overlap_at_one_ratio(masks: pl.DataFrame) -> tuple[float, pl.DataFrame] | None:
    """The ρ that most rules have, and the overlap of all rules there, one seed and one scope each
    (an `OverlapTable`); None for fewer than two rules."""
    single = masks.filter(~keeps_all()).filter(
        pl.col("seed") == pl.col("seed").min().over("rule", "retention_ratio")
    )
    rules = (
        single.group_by("retention_ratio")
        .agg(pl.col("rule").n_unique())
        .sort("rule", "retention_ratio", descending=[True, False])
    )
    if rules.height == 0 or rules["rule"][0] < 2:
        return None
    ratio = rules["retention_ratio"][0]
    scope = single["selection_scope"][0]
    chosen = single.filter(pl.col("retention_ratio") == ratio, pl.col("selection_scope") == scope)
    return float(ratio), overlap(chosen)


def mean_composition(made: pl.DataFrame) -> pl.DataFrame:
    """`composition` with sampling rules averaged over their seeds, `all` left out: a
    `CompositionTable` of one row per rule, ρ and quadrant."""
    keys = ["rule", "retention_ratio", "quadrant"]
    rest = made.filter(~keeps_all())
    return rest.group_by(keys, maintain_order=True).agg(pl.col("share", "token_share").mean())
