"""A teacher of whom only the most likely tokens are known: from a store, or from behind a server.

Known of a row q are the probabilities of some tokens K (the top k, and perhaps the sampled one) and
with them the mass of all others, q_tail = 1 − Σ_K q. A divergence D of the student's row p from it
takes all others as one token, the tail:

    D(p̄, q̄),  p̄ = (p_i for i in K, Σ_{i∉K} p_i),  q̄ = (q_i for i in K, q_tail)

That is the same as a tail of q shaped like the student's, which is how it is computed: the very
function of the exact scorer reads it off q_i = q_tail · p_i / p_tail. By the data-processing
inequality it is a lower bound of D(p, q), for both KL divergences, Jensen-Shannon and Hellinger
(`LOWER_BOUNDS`). Numbers without such a bound are null (`NOT_BOUNDED`), as is what the teacher's
own row would say and nobody told.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tip_analysis.core.names import Approximation
from tip_analysis.logits.blocks import Columns

LOWER_BOUNDS = ("reverse_kl", "forward_kl", "jsd", "hellinger")
"""Columns that are bounded from below."""
NOT_BOUNDED = (
    "teacher_mass_on_student_topk",
    "reverse_kl_logit_grad_norm",
    "forward_kl_logit_grad_norm",
    "logit_curvature",
    "w_local",
    "k1_variance",
    "k1_variance_centred",
    "k1_snr",
    "ier",
    "topk_bias",
    "topk_bias_no_tail",
    "teacher_stop_mass",
    "stop_mismatch",
)
"""Columns that are null."""
OF_THE_TEACHER = (
    "teacher_topk_ids",
    "teacher_topk_logprobs",
    "teacher_entropy",
    "teacher_top1_prob",
    "teacher_logprob",
)
"""Columns that the teacher's row gives on its own: exact where they are kept."""


def not_available(own: Sequence[str]) -> list[str]:
    """Columns that are null where only `own` is known of the teacher beside its top tokens."""
    return [*NOT_BOUNDED, *(name for name in OF_THE_TEACHER if name not in own)]


def marks_of(own: Sequence[str]) -> dict[str, Any]:
    """What the record of a token table says of columns that are not exact."""
    return {
        "approximate": Approximation.TOP_K,
        "lower_bounds": list(LOWER_BOUNDS),
        "not_available": not_available(own),
    }


@dataclass(frozen=True)
class TopKSide:
    """The teacher's side as some of its tokens and the mass of all others."""

    columns: Columns
    """`teacher_topk_ids` and `teacher_topk_logprobs` [N, k], falling; `log_tail_mass` [N];
    `known_ids` and `known_logprobs` [N, K] where more is known than the top k; and `own`."""
    own: Sequence[str] = OF_THE_TEACHER
    """Columns that are known of the teacher itself."""

    def logits(self, rows: slice, student_logits: Tensor) -> Tensor:
        """ln of a distribution [n, V] that has the known tokens and tail mass, its tail shaped like
        the student's."""
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        known = "known" if "known_ids" in self.columns else "teacher_topk"
        ids, logprobs, log_tail_mass = (
            self.columns[name][rows].to(student_logits.device)
            for name in (f"{known}_ids", f"{known}_logprobs", "log_tail_mass")
        )
        rest = student_logits.to(dtype).scatter(1, ids.long(), -math.inf)
        mass = rest.logsumexp(-1, keepdim=True)
        shape = rest - mass
        if not bool(mass.isfinite().all()):  # a student without a tail: evenly
            unknown = torch.ones_like(rest).scatter(1, ids.long(), 0.0)
            even = -unknown.sum(1, keepdim=True).clamp(min=1.0).log()
            shape = torch.where(mass.isfinite(), shape, even)
        return (shape + log_tail_mass.to(dtype).unsqueeze(1)).scatter(
            1, ids.long(), logprobs.to(dtype)
        )

    def settle(self, columns: Columns) -> Columns:
        """The columns with the teacher's own put in, and without those that are not known."""
        top_k = columns["student_topk_ids"].shape[1]
        own = {name: self.columns[name] for name in self.own}
        own |= {name: column[:, :top_k] for name, column in own.items() if column.ndim == 2}
        agree = columns["student_topk_ids"][:, 0] == own["teacher_topk_ids"][:, 0]
        missing = not_available(self.own)
        kept = {name: column for name, column in columns.items() if name not in missing}
        return kept | own | {"top1_agree": agree}
