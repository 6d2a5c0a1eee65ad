"""Which tokens of one training step carry loss: statistics off two hidden states, then a selection
rule.

The same rules and the same selector as for a stored token table (`selection.select_tokens`), on a
table of one step. Only the statistics that the rule reads are computed; a rule that reads none
(`all`, `random`, `position`) costs no pass at all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.rule_kind import columns_read
from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.score_functions import SCORE_COLUMNS
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.analysis.taxonomy import CutOptions, Taxonomy
from tip_analysis.analysis.weightings import NO_WEIGHTING, weigh_tokens, weighting_of
from tip_analysis.core.errors import LogitsError, OptionError, SchemaError
from tip_analysis.core.names import Scope, SelectionScope
from tip_analysis.core.schema import TokenTable
from tip_analysis.logits.blocks import Columns, in_blocks
from tip_analysis.logits.row_statistics import (
    entropy,
    forward_kl,
    jsd,
    reverse_kl,
    rows_per_block,
    token_statistics,
)
from tip_analysis.logits.top_tokens import largest
from tip_analysis.rollouts.encoded import Rollout

KEY_COLUMNS = ("rollout_id", "prompt_id", "position", "batch_id", "token_id", "loss_mask")
"""What a row has without any statistic."""

Head = Callable[[Tensor], Tensor]
"""What makes logits [n, V] of n rows of whatever a model ends in, such as an `OutputHead`."""

SCORED_FROM = frozenset({"student_entropy_norm", "reverse_kl", "forward_kl"})
"""The statistics that `add_scores` reads."""


def topk_overlap(student: Tensor, teacher: Tensor, k: int = 16) -> Tensor:
    """Share of the student's min(k, V) likeliest tokens that are among the teacher's, of logits
    [N, V] each: [N]."""
    ours, theirs = (largest(logits, k)[2] for logits in (student, teacher))
    return (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).float().mean(-1)


_SINGLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "student_entropy": lambda student, teacher: entropy(student),
    "student_entropy_norm": lambda student, teacher: entropy(student) / math.log(student.shape[-1]),
    "teacher_entropy": lambda student, teacher: entropy(teacher),
    "reverse_kl": lambda student, teacher: reverse_kl(student=student, teacher=teacher),
    "forward_kl": lambda student, teacher: forward_kl(student=student, teacher=teacher),
    "jsd": lambda student, teacher: jsd(student=student, teacher=teacher),
    "topk_overlap": topk_overlap,
}
"""Statistics that can be had on their own; any other brings the whole of `token_statistics`."""


QUADRANT_COLUMNS = frozenset({"student_entropy", "reverse_kl"})
"""What quadrants are made of."""

_MAY_BE_UNKNOWN = frozenset({"w_local", "k1_snr", "ier", "topk_bias", "topk_bias_no_tail"})
"""Statistics whose NaN says that a number is not told from rounding."""

_OF_TEXTS = frozenset(
    {
        "token",
        "artefact",
        "planted_label",
        "student_stop_mass",
        "teacher_stop_mass",
        "stop_mismatch",
    }
)
"""Columns of the token table that no training step has."""


def needed_statistics(rule: str) -> frozenset[str]:
    """The columns of the token table, beyond keys, that a rule's score is made of.

    Raises:
        UnknownNameError: there is no such rule.
        RuleError: it fails.
        SchemaError: it reads a column that no training step computes.
        OptionError: it needs gradients, which no training step measures.
    """
    chosen = rule_of(rule)
    if chosen.needs_gradients:
        raise OptionError(
            f"the rule {rule!r} needs measured gradients: train on its stored masks with mode"
            " offline"
        )
    columns = set(columns_read(chosen))
    if chosen.values and not columns:  # it does not say what it reads, and may read anything
        columns = {*TokenTable.columns(), *SCORE_COLUMNS} - _OF_TEXTS
    return statistics_for(columns, f"rule {rule!r}")


def weighting_statistics(weighting: str) -> frozenset[str]:
    """The same of a weighting.

    Raises:
        UnknownNameError, RuleError, SchemaError, OptionError: as `needed_statistics`.
    """
    kind = weighting_of(weighting)
    if kind.needs_gradients:
        raise OptionError(
            f"the weighting {weighting!r} needs measured gradients: train on rollouts where they"
            " were measured, with mode offline"
        )
    return statistics_for(set(kind.columns), f"weighting {weighting!r}")


def statistics_for(columns: set[str], reader: str) -> frozenset[str]:
    """The columns of the token table, beyond keys, that these columns, scores and quadrants are
    made of.

    Raises:
        SchemaError: a column that no training step computes.
    """
    made = {*SCORE_COLUMNS, "quadrant"}
    if unknown := columns - (set(TokenTable.columns()) - _OF_TEXTS) - made:
        raise SchemaError(
            f"{reader} reads {', '.join(sorted(unknown))}, which no training step computes"
        )
    if columns & set(SCORE_COLUMNS):
        columns = columns | SCORED_FROM
    if "quadrant" in columns:
        columns = columns | QUADRANT_COLUMNS
    return frozenset(columns - made - set(KEY_COLUMNS))


@torch.no_grad()
def step_statistics(
    columns: frozenset[str],
    *,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Head,
    teacher_head: Head,
    vocab_size: int,
    token_ids: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """The named statistics of N tokens, each [N] (top-k: [N, k]), from last hidden states [N, D]
    and [N, D_T]; those of the sampled token need `token_ids`, [N].

    Raises:
        LogitsError: a statistic is NaN: the student has diverged, or a model answers nonsense.
    """

    def block(rows: slice) -> Columns:
        student = student_head(student_hidden[rows])[:, :vocab_size]
        teacher = teacher_head(teacher_hidden[rows])[:, :vocab_size].to(student.device)
        if columns <= _SINGLE.keys():
            return {name: _SINGLE[name](student, teacher) for name in sorted(columns)}
        ids = None if token_ids is None else token_ids[rows].to(student.device)
        every = token_statistics(student=student, teacher=teacher, token_ids=ids)
        found = {name: value for name, value in every.items() if name in columns}
        own = sorted((columns & _SINGLE.keys()) - found.keys())  # no column of the token table
        return found | {name: _SINGLE[name](student, teacher) for name in own}

    step = rows_per_block(vocab_size, device=student_hidden.device)
    found = in_blocks(student_hidden.shape[0], step, block)
    statistics = {name: values.cpu().numpy() for name, values in found.items()}
    for name, values in statistics.items():
        unexpected = values.dtype.kind == "f" and name not in _MAY_BE_UNKNOWN
        if unexpected and np.isnan(values).any():
            raise LogitsError(
                f"{name} is NaN at {int(np.isnan(values).sum())} of {len(values)} tokens: has"
                " training diverged?"
            )
    return statistics


def select_step(
    rollouts: Sequence[Rollout],
    statistics: Mapping[str, np.ndarray],
    *,
    step: int,
    rule: str,
    retention_ratio: float,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    normalization_scope: Scope | str = Scope.BATCH,
    divergence_clip: float | None = None,
    cuts: CutOptions | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Which of the N written tokens of a step's rollouts carry loss: [N] bool, in the order of
    rollouts and positions; arguments as in `step_table` and `select_rows`."""
    if rule_of(rule).keeps_all:
        return np.ones(sum(int(rollout.written.sum()) for rollout in rollouts), dtype=bool)
    table = step_table(
        rollouts,
        statistics,
        step=step,
        normalization_scope=normalization_scope,
        divergence_clip=divergence_clip,
        cuts=cuts,
    )
    return select_rows(
        table,
        rule=rule,
        retention_ratio=retention_ratio,
        selection_scope=selection_scope,
        seed=seed,
    )


def select_rows(
    table: pl.LazyFrame,
    *,
    rule: str,
    retention_ratio: float,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seed: int = 0,
) -> np.ndarray:
    """Which of the N written tokens of a step carry loss: [N] bool, in the order of the table.

    Args:
        table: as `step_table` gives it.
        rule: name of a selection rule.
        retention_ratio: ρ.
        selection_scope: within what tokens compete.
        seed: of the rules that draw.
    """
    chosen = select_tokens(
        table,
        rule=rule,
        retention_ratio=retention_ratio,
        selection_scope=selection_scope,
        seed=seed,
    ).select("selected")
    return chosen.collect()["selected"].to_numpy()


def select_and_weigh(
    table: pl.LazyFrame, *, weighting: str, rule: str, **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the N written tokens of a step carry loss, [N] bool, and how much each weighs, [N].

    Args:
        table: as `step_table` gives it.
        weighting: name of a weighting, or `none`.
        rule: name of a selection rule.
        how: as in `select_rows`.
    """
    if rule_of(rule).keeps_all:
        selected = np.ones(table.select(pl.len()).collect().item(), dtype=bool)
    else:
        selected = select_rows(table, rule=rule, **how)
    if weighting == NO_WEIGHTING:
        return selected, np.ones(len(selected))
    return selected, weigh_step(table, weighting=weighting, rule=rule, **how)


def weigh_step(
    table: pl.LazyFrame,
    *,
    weighting: str,
    rule: str,
    retention_ratio: float,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seed: int = 0,
) -> np.ndarray:
    """How much each of the N written tokens of a step weighs, [N] ≥ 0, in the order of the
    table."""
    weighed = weigh_tokens(
        table,
        weighting=weighting,
        rule=rule,
        retention_ratio=retention_ratio,
        selection_scope=selection_scope,
        seed=seed,
    )
    return weighed.select("weight").collect()["weight"].to_numpy()


def step_table(
    rollouts: Sequence[Rollout],
    statistics: Mapping[str, np.ndarray],
    *,
    step: int,
    normalization_scope: Scope | str = Scope.BATCH,
    divergence_clip: float | None = None,
    cuts: CutOptions | None = None,
) -> pl.LazyFrame:
    """The N written tokens of a step's rollouts as rows of the token table, in the order of
    rollouts and positions, with scores and quadrants where the statistics allow.

    Args:
        rollouts: those of the step.
        statistics: [N] each, of the written tokens.
        step: becomes `batch_id`: the tokens of one optimizer step share one normalisation.
        normalization_scope: whose tokens share one min-max.
        divergence_clip: quantile at which δ is clipped before its min-max.
        cuts: where the quadrants lie, measured on the tokens of the step.
    """
    frame = pl.DataFrame(
        {
            "rollout_id": _repeated(rollouts, [r.rollout_id for r in rollouts]),
            "prompt_id": _repeated(rollouts, [r.prompt_id for r in rollouts]),
            "position": np.concatenate([np.flatnonzero(r.written) for r in rollouts]),
            "token_id": np.concatenate([r.written_tokens for r in rollouts]),
            **{name: _column(values) for name, values in statistics.items()},
        },
        schema_overrides={"position": pl.Int32, "token_id": pl.Int32},
    ).with_columns(batch_id=pl.lit(step, pl.Int32), loss_mask=pl.lit(True))
    table = frame.lazy()
    if statistics.keys() >= SCORED_FROM:
        table = add_scores(
            table, normalization_scope=normalization_scope, divergence_clip=divergence_clip
        )
    if statistics.keys() >= QUADRANT_COLUMNS:
        table = assign_quadrants(table, cuts=Taxonomy(**(cuts or {})).measure(frame))
    return table


def _repeated(rollouts: Sequence[Rollout], values: Sequence[str]) -> list[str]:
    counts = [rollout.num_tokens for rollout in rollouts]
    return np.repeat(np.array(values, dtype=object), counts).tolist()


def _column(values: np.ndarray) -> pl.Series:
    """A statistic as polars holds it: an unknown number is null, a row of ids is a list."""
    series = pl.Series(values)
    if values.ndim == 2:
        return series.arr.to_list()
    return series.fill_nan(None) if series.dtype.is_float() else series
