"""Selection rules: from a scored token table to a mask of k = max(1, ⌊ρ·m⌋) tokens (Sections 6 and
7, Appendix B).

Reads the token table with the columns of `add_scores`; `to_masks` makes rows of
`tip_analysis.core.schema.MaskTable`. `RULES` is a flat registry: a rule is a score and whether it
is sampled. Adding one takes `register_rule`, or an entry point in the group `tip_analysis.rules`.

Tokens compete within a rollout (Eq. 8), a batch or the run; m counts those that the student wrote.
Ties go to the earlier position, then to the smaller `rollout_id` (as text). Sampling is Gumbel
top-k without replacement, from a counter-based generator keyed by (seed, rollout_id, position) in
integer and correctly rounded float arithmetic only: a mask is a pure function of table, rule, ρ,
scope and seed, whatever the row order, the process or the version of a library. For a given rule,
scope and seed the mask of a smaller ρ lies inside that of a larger one.

Deviations from the paper: `random` is a control that it lacks; `all` ignores ρ.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from hashlib import blake2b
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import polars as pl

from tip_analysis.analysis import scores as importance
from tip_analysis.analysis.scores import TokenColumns
from tip_analysis.core.errors import OptionError, SchemaError, UnknownNameError
from tip_analysis.core.names import SelectionScope
from tip_analysis.core.schema import MaskTable, require_columns, validate

SCOPE_COLUMNS: dict[SelectionScope, str | None] = {
    SelectionScope.ROLLOUT: "rollout_id",
    SelectionScope.BATCH: "batch_id",
    SelectionScope.RUN: None,
}
"""The column whose equal values compete."""

ENTRY_POINT_GROUP = "tip_analysis.rules"


@dataclass(frozen=True)
class Rule:
    """How tokens are chosen: the k with the largest score, or k drawn with probability ∝ score."""

    name: str
    score: Callable[[Any], Any]
    """From the columns of the table to one number a token: a polars expression, or values."""
    sampled: bool = False
    """The score is a weight ≥ 0, and tokens are drawn without replacement."""
    description: str = ""
    complete: bool = True
    """Every token has this score by the table's contract; elsewhere it is checked."""


def _uniform(columns: TokenColumns) -> pl.Expr:
    return pl.lit(1.0) + 0.0 * columns["position"]


def _soft_or_bottom(columns: TokenColumns) -> pl.Expr:
    return -importance.soft_or(columns)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("all", _uniform, description="every token, whatever ρ"),
        Rule(
            "random", _uniform, sampled=True, description="uniform without replacement: the control"
        ),
        Rule("entropy", importance.entropy, description="top-k of student entropy"),
        Rule(
            "entropy_sampling",
            importance.entropy,
            sampled=True,
            description="sampled in proportion to student entropy",
        ),
        Rule(
            "soft_or",
            importance.soft_or,
            description="top-k of Soft-OR of entropy and divergence (Eq. 8)",
        ),
        Rule(
            "soft_or_bottom",
            _soft_or_bottom,
            description="the lowest-scoring k of Soft-OR: the paper's control",
        ),
        Rule(
            "q3",
            importance.q3,
            description="top-k of forward KL × (1 − normalised entropy): overconfident and wrong",
        ),
        Rule("divergence", importance.divergence, description="top-k of reverse KL alone"),
        Rule("forward_kl", importance.forward_kl, description="top-k of forward KL alone"),
        Rule("jsd", importance.jsd, description="top-k of Jensen-Shannon divergence alone"),
        Rule("hellinger", importance.hellinger, description="top-k of Hellinger distance alone"),
        Rule(
            "entropy_jsd_sampling",
            importance.entropy_jsd,
            sampled=True,
            description="sampled in proportion to student entropy × Jensen-Shannon divergence",
        ),
        Rule(
            "teachability",
            importance.teachability,
            description="top-k of reverse KL × teacher's mass on the student's likeliest tokens",
            complete=False,
        ),
        Rule("position", importance.earliness, description="the first k tokens of the response"),
        Rule("teacher_entropy", importance.teacher_entropy, description="top-k of teacher entropy"),
        Rule(
            "gradient_oracle",
            importance.descent_alignment,
            description="top-k of φ = ⟨∇L, g⟩, where gradients were measured: an upper reference",
            complete=False,
        ),
    )
}
"""Every rule by name; those of entry points join when `rule` or `rule_names` is first called."""


def register_rule(
    name: str,
    score: Callable[[Any], Any],
    *,
    sampled: bool = False,
    description: str = "",
    overwrite: bool = False,
) -> Rule:
    """Add a selection rule.

    Args:
        name: What users call it.
        score: From the columns of the scored table to one number a token: `lambda df: df["jsd"] *
            df["position"]`. It is first given columns as polars expressions, so that large tables
            stream; a function that needs values (numpy, control flow) is given the collected
            DataFrame instead.
        sampled: Draw k tokens with probability ∝ score (a weight ≥ 0) instead of taking the k
            largest.
        description: One line for lists of rules.
        overwrite: Replace a rule of that name.

    Raises:
        OptionError: the name is empty or taken.
    """
    if not name or name != name.strip():
        raise OptionError(f"a rule needs a name without spaces around it; found {name!r}")
    if name in RULES and not overwrite:
        raise OptionError(
            f"there is a rule {name!r} already; choose another name, or pass overwrite=True"
        )
    described = description or (score.__doc__ or "").strip().split("\n")[0]
    RULES[name] = Rule(name, score, sampled, described, complete=False)
    return RULES[name]


@cache
def _load_entry_points() -> None:
    """Each entry point of the group names a rule and points at its score, or at a `Rule`."""
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in RULES:
            continue
        loaded = entry.load()
        if isinstance(loaded, Rule):
            RULES[entry.name] = loaded
        else:
            register_rule(entry.name, loaded)


def rule_names() -> list[str]:
    """Names of all rules, those of entry points included."""
    _load_entry_points()
    return list(RULES)


def rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UnknownNameError: there is none; the message lists the valid names.
    """
    _load_entry_points()
    if name not in RULES:
        raise UnknownNameError("selection rule", name, RULES)
    return RULES[name]


def exact_ratio(retention_ratio: float) -> Fraction:
    """ρ as the fraction that was meant, so that ⌊ρ·m⌋ is exact: 0.1 is 1/10 and 0.1·30 is 3.

    The fraction with a denominator up to 10⁶ within 10⁻¹² of ρ, else up to 10⁹ the nearest one.

    Raises:
        OptionError: ρ is outside (0, 1].
    """
    if not 0.0 < retention_ratio <= 1.0:
        raise OptionError(f"retention_ratio must lie in (0, 1]; found {retention_ratio}")
    written = Fraction(retention_ratio)
    simple = written.limit_denominator(10**6)
    return (
        simple
        if simple > 0 and abs(simple - written) < Fraction(1, 10**12)
        else written.limit_denominator(10**9)
    )


def num_selected(num_tokens: int, retention_ratio: float) -> int:
    """k = max(1, ⌊ρ·m⌋); 0 where there is no token."""
    return min(num_tokens, max(1, int(exact_ratio(retention_ratio) * num_tokens)))


def random_exponentials(rollout_ids: pl.Series, positions: pl.Series, seed: int) -> np.ndarray:
    """One Exp(1) variate per token, a pure function of (seed, rollout_id, position).

    A rollout's key is the first 8 bytes of BLAKE2b of "seed/rollout_id"; a token's 64 bits are
    SplitMix64 at (key, position); the upper 53 make u in (0, 1), and the variate is −ln u.

    Args:
        rollout_ids: [N] text.
        positions: [N] integers.
        seed: Any integer.

    Returns:
        [N] float64 > 0.
    """
    unique = rollout_ids.unique(maintain_order=True)
    digests = [
        blake2b(f"{seed}/{name}".encode(), digest_size=8, person=b"tip-select").digest()
        for name in unique
    ]
    keys = pl.Series([int.from_bytes(digest, "little") for digest in digests], dtype=pl.UInt64)
    key = rollout_ids.replace_strict(unique, keys, return_dtype=pl.UInt64).to_numpy()
    bits = _splitmix64(
        key + (positions.cast(pl.UInt64).to_numpy() + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    )
    return _negative_log(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014), modulo 2⁶⁴."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _negative_log(u: np.ndarray) -> np.ndarray:
    """−ln u for u in (0, 1), to 3e-16 relative, by correctly rounded operations alone.

    A library's log may differ in its last bit between versions and CPUs, and would then
    change a near tie. With u = m·2^e, m in [√½, √2) and z = (m − 1)/(m + 1): ln u = e·ln 2 + 2·Σ
    z^(2j+1)/(2j+1).
    """
    mantissa, exponent = np.frexp(u)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    z = (mantissa - 1.0) / (mantissa + 1.0)
    square = z * z
    series = np.full_like(z, 1.0 / 23.0)
    for odd in range(21, 0, -2):
        series = series * square + 1.0 / odd
    return -((exponent - low) * 0.6931471805599453 + 2.0 * z * series)


def score_tokens(scored: pl.LazyFrame, chosen: Rule) -> pl.LazyFrame:
    """Add `_score`, the rule's score as Float64, by expression where the rule allows it, else from
    collected values.

    Raises:
        SchemaError: a column that the rule needs is missing, a token that the student wrote has no
            score (null or NaN), or the rule gives something that is no column of numbers.
        OptionError: the weight of a sampling rule is negative.
    """
    columns = TokenColumns(scored.collect_schema(), f"rule {chosen.name!r}")
    frame: pl.LazyFrame
    try:
        score = chosen.score(columns)
    except (AttributeError, TypeError):
        score = None
    if isinstance(score, pl.Expr):
        frame = scored.with_columns(score.cast(pl.Float64).alias("_score"))
    else:
        table = scored.collect()
        values = chosen.score(table)
        if not isinstance(values, pl.Expr):
            values = pl.Series(values)
            if len(values) != table.height:
                raise SchemaError(
                    f"rule {chosen.name!r} must give one score a token ({table.height}); found"
                    f" {len(values)}"
                )
        frame = table.lazy().with_columns(values.cast(pl.Float64).alias("_score"))
    if not chosen.complete:
        _check_scores(frame, chosen)
    return frame


def _check_scores(frame: pl.LazyFrame, chosen: Rule) -> None:
    score = pl.col("_score")
    missing = score.is_null() | score.is_nan()
    counts = (
        frame.filter("loss_mask")
        .select(
            missing.sum().alias("missing"),
            pl.len().alias("tokens"),
            pl.col("rollout_id").filter(missing).n_unique().alias("rollouts"),
            (score < 0).sum().alias("negative"),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    if counts["missing"]:
        raise SchemaError(
            f"rule {chosen.name!r} needs a score for every token that the student wrote;"
            f" {counts['missing']} of {counts['tokens']}, in {counts['rollouts']} rollout(s), have"
            " none: keep only the rollouts that have it, or score in full"
        )
    if chosen.sampled and counts["negative"]:
        raise OptionError(
            f"rule {chosen.name!r} samples, so its score is a weight ≥ 0; {counts['negative']} are"
            " negative"
        )


def rank_tokens(
    scored: pl.LazyFrame | pl.DataFrame,
    *,
    rule: str,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seed: int = 0,
) -> pl.LazyFrame:
    """Add `selection_rank` (from 0, the first to be selected; null where `loss_mask` is false) and
    `num_competing` (m).

    The mask at ρ is `selection_rank` < k, so one ranking serves every ρ.

    Raises:
        UnknownNameError: there is no such rule.
        OptionError: the scope is not valid.
        SchemaError: a column is missing, or a score.
    """
    chosen = _rule_of(rule)
    selection_scope = SelectionScope(selection_scope)
    scored = scored.lazy()
    group = SCOPE_COLUMNS[selection_scope]
    require_columns(
        scored,
        ["rollout_id", "position", "loss_mask", *([group] if group else [])],
        f"rule {rule!r}",
    )
    frame = score_tokens(scored, chosen)
    priority = (
        pl.when(pl.col("_score") == 0.0).then(0.0).otherwise(pl.col("_score"))
    )  # −0 is 0, as a divisor too
    if chosen.sampled:
        exponential = pl.struct("rollout_id", "position").map_batches(
            lambda keys: pl.Series(
                random_exponentials(
                    keys.struct.field("rollout_id"), keys.struct.field("position"), seed
                )
            ),
            return_dtype=pl.Float64,
            is_elementwise=True,
        )
        frame = frame.with_columns(exponential.alias("_exponential"))
        priority = -pl.col("_exponential") / priority  # −inf at weight 0
    frame = frame.with_columns(pl.when("loss_mask").then(priority).alias("_score"))
    order = [-pl.col("_score"), pl.col("position"), pl.col("rollout_id")]
    keys = ["loss_mask", group] if group else ["loss_mask"]
    rank = pl.int_range(pl.len(), dtype=pl.Int64).over(
        keys, order_by=order[: 2 if selection_scope == "rollout" else 3]
    )
    return frame.with_columns(
        pl.when("loss_mask").then(rank).alias("selection_rank"),
        pl.when("loss_mask").then(pl.len().over(keys)).cast(pl.Int64).alias("num_competing"),
    ).drop("_score", "_exponential", strict=False)


_rule_of = rule


def select_tokens(
    scored: pl.LazyFrame | pl.DataFrame,
    *,
    rule: str,
    retention_ratio: float,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seed: int = 0,
) -> pl.LazyFrame:
    """Add `selected`: whether a token is among the k = max(1, ⌊ρ·m⌋) that the rule chooses in its
    scope.

    Args:
        scored: The token table with the columns of `add_scores` (and `grad_dot_loss` for
            `gradient_oracle`).
        rule: Name of a rule (`rule_names`).
        retention_ratio: ρ in (0, 1]; `all` selects everything whatever ρ.
        selection_scope: `rollout`, `batch` or `run`: whose tokens compete.
        seed: Of the sampling rules; others ignore it.

    Returns:
        The rows in their order with `selected`, false where `loss_mask` is false.

    Raises:
        UnknownNameError: there is no such rule.
        OptionError: ρ or the scope is not valid.
        SchemaError: a column is missing, or a score.
    """
    ratio = Fraction(1) if rule == "all" else exact_ratio(retention_ratio)
    exact_ratio(retention_ratio)
    ranked = rank_tokens(scored, rule=rule, selection_scope=selection_scope, seed=seed)
    return ranked.with_columns(_within(ratio).alias("selected")).drop(
        "selection_rank", "num_competing"
    )


def _within(ratio: Fraction) -> pl.Expr:
    """Whether `selection_rank` < max(1, ⌊ρ·m⌋), in integers."""
    k = pl.max_horizontal(
        pl.col("num_competing") * ratio.numerator // ratio.denominator, pl.lit(1, pl.Int64)
    )
    return (pl.col("selection_rank") < k).fill_null(False)


def masks_by_part(
    parts: Iterable[pl.LazyFrame],
    *,
    rules: Sequence[str],
    retention_ratios: Sequence[float],
    seeds: Sequence[int] = (0,),
) -> Iterator[pl.DataFrame]:
    """`to_masks` in scope `rollout`, part by part: for tables larger than memory.

    Args:
        parts: Scored tokens of whole rollouts, such as the shards of a run, each with `add_scores`
            under one `Normalization` that was measured on all of them.
        rules, retention_ratios, seeds: As in `to_masks`.

    Yields:
        The mask rows of each part; together they are those of `to_masks`.
    """
    for part in parts:
        yield to_masks(part, rules=rules, retention_ratios=retention_ratios, seeds=seeds)


def to_masks(
    scored: pl.LazyFrame | pl.DataFrame,
    *,
    rules: Sequence[str],
    retention_ratios: Sequence[float],
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seeds: Sequence[int] = (0,),
) -> pl.DataFrame:
    """Rows of the mask table, one per selected token, for every rule, ratio and seed.

    A rule that does not sample gives one mask, under the first seed; `all` gives one, at ρ = 1.

    Raises:
        UnknownNameError, OptionError, SchemaError: as `select_tokens`.
    """
    scored = scored.lazy()
    parts = []
    for name in rules:
        ratios = [1.0] if name == "all" else list(dict.fromkeys(retention_ratios))
        for seed in dict.fromkeys(seeds if _rule_of(name).sampled else list(seeds)[:1]):
            fractions = [exact_ratio(ratio) for ratio in ratios]
            ranked = rank_tokens(scored, rule=name, selection_scope=selection_scope, seed=seed)
            narrow = ranked.select(
                "rollout_id", "position", "selection_rank", "num_competing"
            ).collect()
            for ratio, fraction in zip(ratios, fractions, strict=True):
                parts.append(
                    narrow.filter(_within(fraction)).select(
                        pl.lit(name).alias("rule"),
                        pl.lit(float(ratio)).alias("retention_ratio"),
                        pl.lit(str(selection_scope), pl.Enum(SelectionScope)).alias(
                            "selection_scope"
                        ),
                        pl.lit(seed, pl.Int64).alias("seed"),
                        "rollout_id",
                        "position",
                    )
                )
    if not parts:
        raise OptionError("no mask was asked for; name at least one rule, retention ratio and seed")
    return validate(pl.concat(parts), MaskTable)
