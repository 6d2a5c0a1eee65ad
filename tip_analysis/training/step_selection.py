"""Which tokens of one training step carry loss: statistics off two hidden states, then a selection
rule.

The same rules and the same selector as for a stored token table (`selection.select_tokens`), on a
table of one step. Only the statistics that the rule reads are computed; a rule that reads none
(`all`, `random`, `position`) costs no pass at all.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from tip_analysis.analysis.rules import columns_read
from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.scores import SCORE_COLUMNS, add_scores
from tip_analysis.analysis.selection import select_tokens
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
from tip_analysis.rollouts.encoded import Rollout

KEY_COLUMNS = ("rollout_id", "prompt_id", "position", "batch_id", "token_id", "loss_mask")
"""What a row has without any statistic."""

Head = Callable[[Tensor], Tensor]
"""What makes logits [n, V] of n rows of whatever a model ends in, such as an `OutputHead`."""

SCORED_FROM = frozenset({"student_entropy_norm", "reverse_kl", "forward_kl"})
"""The statistics that `add_scores` reads."""

_SINGLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "student_entropy": lambda student, teacher: entropy(student),
    "student_entropy_norm": lambda student, teacher: entropy(student) / math.log(student.shape[-1]),
    "teacher_entropy": lambda student, teacher: entropy(teacher),
    "reverse_kl": lambda student, teacher: reverse_kl(student=student, teacher=teacher),
    "forward_kl": lambda student, teacher: forward_kl(student=student, teacher=teacher),
    "jsd": lambda student, teacher: jsd(student=student, teacher=teacher),
}
"""Statistics that can be had on their own; any other brings the whole of `token_statistics`."""


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
        columns = {*TokenTable.columns(), *SCORE_COLUMNS}
    if unknown := columns - set(TokenTable.columns()) - set(SCORE_COLUMNS):
        raise SchemaError(
            f"rule {rule!r} reads {', '.join(sorted(unknown))}, which no training step computes"
        )
    if columns & set(SCORE_COLUMNS):
        columns |= SCORED_FROM
    return frozenset(columns - set(SCORE_COLUMNS) - set(KEY_COLUMNS))


@torch.no_grad()
def step_statistics(
    columns: frozenset[str],
    *,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Head,
    teacher_head: Head,
    vocab_size: int,
) -> dict[str, np.ndarray]:
    """The named statistics of N tokens, each [N], from last hidden states [N, D] and [N, D_T].

    Raises:
        LogitsError: a statistic is NaN: the student has diverged, or a model answers nonsense.
    """

    def block(rows: slice) -> Columns:
        student = student_head(student_hidden[rows])[:, :vocab_size]
        teacher = teacher_head(teacher_hidden[rows])[:, :vocab_size].to(student.device)
        if columns <= _SINGLE.keys():
            return {name: _SINGLE[name](student, teacher) for name in sorted(columns)}
        every = token_statistics(student=student, teacher=teacher)
        return {name: value for name, value in every.items() if name in columns and value.ndim == 1}

    step = rows_per_block(vocab_size, device=student_hidden.device)
    found = in_blocks(student_hidden.shape[0], step, block)
    statistics = {name: values.cpu().numpy() for name, values in found.items()}
    for name, values in statistics.items():
        if values.dtype.kind == "f" and name != "w_local" and np.isnan(values).any():
            raise LogitsError(
                f"{name} is NaN at {int(np.isnan(values).sum())} of {len(values)} tokens: has"
                " training diverged?"
            )
    return statistics


def select_step(
    rollouts: Sequence[Rollout],
    statistics: dict[str, np.ndarray],
    *,
    step: int,
    rule: str,
    retention_ratio: float,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    normalization_scope: Scope | str = Scope.BATCH,
    divergence_clip: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Which of the N written tokens of a step's rollouts carry loss: [N] bool, in the order of
    rollouts and positions.

    Args:
        rollouts: those of the step.
        statistics: [N] each, of the written tokens.
        step: becomes `batch_id`: the tokens of one optimizer step share one normalisation.
        rule: name of a selection rule.
        retention_ratio: ρ.
        selection_scope: within what tokens compete.
        normalization_scope: whose tokens share one min-max.
        divergence_clip: quantile at which δ is clipped before its min-max.
        seed: of the sampling rules.
    """
    if rule_of(rule).keeps_all:
        return np.ones(sum(int(rollout.written.sum()) for rollout in rollouts), dtype=bool)
    scored = step_table(
        rollouts,
        statistics,
        step=step,
        normalization_scope=normalization_scope,
        divergence_clip=divergence_clip,
    )
    chosen = select_tokens(
        scored,
        rule=rule,
        retention_ratio=retention_ratio,
        selection_scope=selection_scope,
        seed=seed,
    ).select("selected")
    return chosen.collect()["selected"].to_numpy()


def step_table(
    rollouts: Sequence[Rollout],
    statistics: Mapping[str, np.ndarray],
    *,
    step: int,
    normalization_scope: str = "batch",
    divergence_clip: float | None = None,
) -> pl.LazyFrame:
    """The N written tokens of a step's rollouts as rows of the token table, in the order of
    rollouts and positions; scores are added where the statistics that they are made of are there.

    Args:
        rollouts: those of the step.
        statistics: [N] each, of the written tokens.
        step: becomes `batch_id`.
        normalization_scope: whose tokens share one min-max.
        divergence_clip: quantile at which δ is clipped before its min-max.
    """
    counts = [int(rollout.written.sum()) for rollout in rollouts]
    frame = pl.DataFrame(
        {
            "rollout_id": (
                np.repeat(np.array([r.rollout_id for r in rollouts], dtype=object), counts).tolist()
            ),
            "prompt_id": (
                np.repeat(np.array([r.prompt_id for r in rollouts], dtype=object), counts).tolist()
            ),
            "position": (
                np.concatenate([np.flatnonzero(r.written) for r in rollouts]).astype(np.int32)
            ),
            "token_id": np.concatenate(
                [np.array(r.response, dtype=np.int32)[r.written] for r in rollouts]
            ),
            **statistics,
        }
    ).with_columns(batch_id=pl.lit(step, pl.Int32), loss_mask=pl.lit(True))
    if not statistics.keys() >= SCORED_FROM:
        return frame.lazy()
    return add_scores(
        frame, normalization_scope=normalization_scope, divergence_clip=divergence_clip
    )
