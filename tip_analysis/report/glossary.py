"""The words of the page and of the documentation, each with its meaning; headers of tables link to
them.

One list for both: the page's last section shows it, and the glossary of the documentation is made
from it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A word or sign, and what it means."""

    key: str
    """Its address in the page: `#word-KEY`."""
    name: str
    """As it is written."""
    meaning: str
    """Without a full stop."""
    columns: tuple[str, ...] = ()
    """Columns of the run's tables that hold it."""


TERMS = (
    Term(
        "arm", "arm", "one configuration of an ablation: a rule at a retention ratio, as `q3:0.1`"
    ),
    Term(
        "artefact",
        "artefact",
        "a token that only looks important, for a reason that says nothing about what the student"
        " knows",
    ),
    Term(
        "auc",
        "AUC",
        "the probability that a token of one class has a higher score than a token of the other;"
        " 0.5 is chance",
    ),
    Term(
        "best-at-k",
        "Best@k",
        "the share of problems that at least one of k samples solves; mean@k is the share of"
        " samples that are right",
    ),
    Term(
        "coverage",
        "coverage",
        "the share of something (Σφ, Q3, planted errors) that lies on the selected tokens",
    ),
    Term(
        "cramers-v",
        "Cramér’s V",
        "how strongly two groupings go together, from 0 (not at all) to 1",
    ),
    Term(
        "cross-fitted",
        "cross-fitted",
        "measured against the *other* half of the prompts, so that no token votes for itself",
    ),
    Term("cut", "cut", "the value above which entropy or divergence counts as high"),
    Term(
        "reverse-kl",
        "δ, reverse KL",
        "KL(P_S ‖ P_T) in nats: the token’s training loss",
        ("reverse_kl",),
    ),
    Term("delta-hat", "δ̂", "δ scaled to [0, 1]", ("divergence_hat",)),
    Term("forward-kl", "δ^fwd, forward KL", "KL(P_T ‖ P_S) in nats", ("forward_kl",)),
    Term(
        "entropy",
        "H, entropy",
        "−Σ p ln p in nats: how many tokens a model holds possible, on a log scale; 0 where it is"
        " sure of one",
        ("student_entropy", "teacher_entropy"),
    ),
    Term(
        "fork",
        "fork",
        "a position of the arithmetic pair where its grammar allows several next tokens: real"
        " uncertainty, by construction",
    ),
    Term(
        "h-hat",
        "h, ĥ",
        "the student’s entropy over ln |V|; the same, clipped and scaled to [0, 1]",
        ("student_entropy_norm", "entropy_hat"),
    ),
    Term(
        "interval",
        "interval",
        "where a value lies in 95 % of resamples of the prompts with all their rollouts",
    ),
    Term(
        "jaccard", "Jaccard index", "tokens that two selections share, over tokens that either has"
    ),
    Term("lift", "lift", "the share within a group over the share in the whole run"),
    Term("loss-mask", "loss mask", "true where the student wrote the token"),
    Term("m", "M", "‖∇_θ ℓ_t‖²: how hard a token’s loss pulls on the weights", ("grad_norm_sq",)),
    Term("mask", "mask", "the tokens that a rule selected"),
    Term(
        "measurement",
        "measurement",
        "one pass of `gradients` with its loss, parameter scope, method, probes and seed",
    ),
    Term("nats", "nats", "the unit of entropy and KL with natural logarithms; 1 nat is 1.44 bits"),
    Term("on-policy", "on-policy", "trained on what the student itself wrote, as it is now"),
    Term(
        "phi",
        "φ",
        "⟨∇L, ∇_θ ℓ_t⟩: how far a token’s gradient points downhill on the loss of all tokens",
        ("grad_dot_loss",),
    ),
    Term(
        "planted-error",
        "planted error",
        "a mistake that the arithmetic student was trained to make: ground truth for Q3",
    ),
    Term("probe", "probe", "a random direction along which a forward-mode pass measures gradients"),
    Term(
        "q3-score",
        "Q3 score",
        "forward KL × (1 − ĥ): large where the student is sure and the teacher expects something"
        " else",
        ("q3_score",),
    ),
    Term(
        "quadrant",
        "quadrant",
        "Q1 uncertain and disagreeing, Q2 uncertain and agreeing, Q3 confident and disagreeing,"
        " Q4 confident and agreeing: the student’s entropy above or below its cut, the reverse KL"
        " above or below its own",
    ),
    Term("rho", "ρ, retention ratio", "the share of written tokens that is selected, in (0, 1]"),
    Term(
        "response-token",
        "response token",
        "a token of the rollout after the prompt, the end-of-sequence token included",
    ),
    Term("rollout", "rollout", "one response that was sampled for a prompt"),
    Term("shard", "shard", "one Parquet file of a table; what is redone after an interruption"),
    Term("soft-or", "Soft-OR", "1 − (1 − ĥ)(1 − δ̂): high where either axis is", ("soft_or",)),
    Term(
        "spearman",
        "Spearman",
        "the correlation of ranks, from −1 to 1; *partial* where position and token frequency are"
        " held",
    ),
    Term("written-token", "written token", "a token under the loss mask: the student wrote it"),
)

HEADERS = {
    "quadrant": "quadrant",
    "95% interval": "interval",
    "student entropy": "entropy",
    "teacher entropy": "entropy",
    "reverse KL": "reverse-kl",
    "forward KL": "forward-kl",
    "share of Σ reverse KL": "reverse-kl",
    "entropy cut": "cut",
    "divergence cut": "cut",
    "entropy cut (nats)": "cut",
    "divergence cut (nats)": "cut",
    "planted errors": "planted-error",
    "of Σ‖g‖²": "m",
    "of Σφ": "phi",
    "Σφ / ΣM": "phi",
    "median φ/M": "phi",
    "φ < 0": "phi",
    "Spearman": "spearman",
    "Spearman with reward": "spearman",
    "partial": "spearman",
    "without probe noise": "probe",
    "ρ": "rho",
    "of Σφ in Q3 missed": "phi",
    "Cramér’s V": "cramers-v",
    "lift of Q3": "lift",
    "artefact": "artefact",
    "arm": "arm",
    "Best@k": "best-at-k",
    "held-out KL": "reverse-kl",
}
"""Header of a table: the term that it links to."""
