"""What a tracker is told of a training step: quadrant shares, mean divergence by quadrant, what was
selected.

`step_metrics` takes a step's table, `log_step` the logits of a loop of the user's own. Neither
keeps or writes anything. Cuts are measured on the tokens given: shares are those of a step, and
move with its cuts.
"""

import math
from collections.abc import Mapping

import numpy as np
import polars as pl
import torch
from torch import Tensor

from tip_analysis.analysis.selection import select_tokens
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import Quadrant, SelectionScope
from tip_analysis.training.step_selection import step_statistics

METRIC_COLUMNS = frozenset({"student_entropy", "student_entropy_norm", "reverse_kl", "forward_kl"})
"""The statistics that `step_metrics` reads, where Soft-OR is to be compared with."""


def step_metrics(
    tokens: pl.LazyFrame, selected: np.ndarray, taxonomy: Taxonomy | None = None
) -> dict[str, float]:
    """Shares and means of one step's tokens.

    Args:
        tokens: rows of the token table, all of them written by the student.
        selected: [N] bool, which of them carry loss.
        taxonomy: the cuts; by default median entropy and mean divergence of these tokens.

    Returns:
        `share_q1` … `share_q4` of the tokens; `divergence_q1` …, mean reverse KL in nats (NaN
        where the quadrant is empty, infinite values left out); `selected_share` of the tokens;
        `selected_share_q1` …, of each quadrant's tokens (NaN where it is empty);
        `student_entropy` and `reverse_kl`, means in nats.
    """
    cuts = (taxonomy or Taxonomy()).measure(tokens)
    delta = pl.col("reverse_kl").cast(pl.Float64)
    finite = pl.when(delta.is_finite()).then(delta)
    frame = tokens.select(
        "student_entropy",
        finite=finite,
        quadrant=cuts.quadrant(),
        selected=pl.lit(pl.Series(selected, dtype=pl.Boolean)),
    ).collect()
    found = {
        "selected_share": _mean(frame["selected"]),
        "student_entropy": _mean(frame["student_entropy"]),
        "reverse_kl": _mean(frame["finite"]),
    }
    for quadrant in Quadrant:
        within = frame.filter(pl.col("quadrant") == quadrant.value)
        name = quadrant.value.lower()
        found[f"share_{name}"] = within.height / frame.height if frame.height else math.nan
        found[f"divergence_{name}"] = _mean(within["finite"])
        found[f"selected_share_{name}"] = _mean(within["selected"])
    return found


def soft_or_overlap(
    scored: pl.LazyFrame,
    selected: np.ndarray,
    *,
    retention_ratio: float,
    selection_scope: SelectionScope | str,
) -> float:
    """Jaccard overlap, in [0, 1], of a selection with that of Soft-OR at the same ρ and scope.

    Args:
        scored: rows of the token table with the columns of `add_scores`.
        selected: [N] bool.
        retention_ratio: ρ.
        selection_scope: within what tokens compete.
    """
    other = select_tokens(
        scored, rule="soft_or", retention_ratio=retention_ratio, selection_scope=selection_scope
    )
    theirs = other.select("selected").collect()["selected"].to_numpy()
    union = int((selected | theirs).sum())
    return float((selected & theirs).sum() / union) if union else math.nan


def _mean(values: pl.Series) -> float:
    found = values.cast(pl.Float64).mean()
    return math.nan if found is None else float(found)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def log_step(
    student_logits: Tensor,
    teacher_logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    *,
    written: Tensor | None = None,
    entropy_cut: str | float = "median",
    divergence_cut: str | float = "mean",
) -> dict[str, float]:
    """What a training loop of your own may tell its tracker of a step.

    Args:
        student_logits: [..., V]; at each place, those that predict the id there (the shift by one
            is the caller's).
        teacher_logits: [..., V] likewise. Heads padded to different sizes are cut to the smaller.
        ids: [...] token ids; one below 0 (−100 in labels) marks a place where the student wrote
            nothing: prompt, tool output, padding.
        mask: [...] which tokens carry loss; any that is not 0 does.
        written: [...] which tokens the student wrote, where `ids` does not say so by ids below 0.
        entropy_cut: as in `assign_quadrants`, measured on this step's tokens.
        divergence_cut: likewise.

    Returns:
        As `step_metrics`: `share_q1` … `share_q4`, `divergence_q1` … (nats), `selected_share`,
        `selected_share_q1` …, `student_entropy`, `reverse_kl`.

    Raises:
        OptionError: shapes do not fit, no token was written, or one that was not carries loss.
        LogitsError: a written token's logits hold NaN.

    Example:
        wandb.log(tip.log_step(student_logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:], mask))
    """
    keep = _written(ids, written)
    _check_shapes(student_logits, teacher_logits, ids, mask, keep)
    carries = mask.to(keep.device) != 0
    if bool((carries & ~keep).any()):
        raise OptionError(
            "the mask holds tokens that the student did not write: expected it to lie within"
            " `written` (by default the ids that are not negative)"
        )
    taxonomy = Taxonomy(entropy_cut, divergence_cut)
    statistics = _statistics(student_logits, teacher_logits, keep)
    frame = pl.DataFrame(statistics).with_columns(batch_id=pl.lit(0), loss_mask=pl.lit(True))
    return step_metrics(frame.lazy(), carries[keep].cpu().numpy(), taxonomy)


def _written(ids: Tensor, written: Tensor | None) -> Tensor:
    return ids >= 0 if written is None else written.to(ids.device).bool()


def _check_shapes(
    student: Tensor, teacher: Tensor, ids: Tensor, mask: Tensor, keep: Tensor
) -> None:
    shapes = {
        "student_logits": student.shape[:-1],
        "teacher_logits": teacher.shape[:-1],
        "mask": mask.shape,
        "written": keep.shape,
    }
    for name, shape in shapes.items():
        if shape != ids.shape:
            raise OptionError(
                f"{name} has the shape {list(shape)} without its vocabulary, but ids has"
                f" {list(ids.shape)}: they must be the same"
            )
    if not bool(keep.any()):
        raise OptionError("no token of this step was written by the student: nothing to measure")


def _statistics(student: Tensor, teacher: Tensor, keep: Tensor) -> Mapping[str, np.ndarray]:
    """Entropy and reverse KL of the tokens that are kept, [N] each, a block of rows at a time."""
    rows = keep.reshape(-1).nonzero()[:, 0].to(student.device)
    ours, theirs = student.flatten(0, -2), teacher.flatten(0, -2)
    return step_statistics(
        frozenset({"student_entropy", "reverse_kl"}),
        student_hidden=rows,  # a row's number stands for its hidden state
        teacher_hidden=rows.to(teacher.device),
        student_head=lambda numbers: ours[numbers],
        teacher_head=lambda numbers: theirs[numbers],
        vocab_size=min(student.shape[-1], teacher.shape[-1]),
    )
