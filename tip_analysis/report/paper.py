"""What the paper itself reports, for comparison: always shown as the paper's, never mixed with
measurements.

Worked examples of Appendix B.5 (entropy in nats, probabilities in percent as printed). The quadrant
ranges are those of `quadrants.PAPER_RANGES`; the result tables are in `data/tip_paper_results.csv`.
"""

from dataclasses import dataclass

from tip_analysis.analysis.paper_preset import PAPER_RANGES

TopTokens = tuple[tuple[str, float], ...]

CITATION = "TIP: Token Importance in On-Policy Distillation, arXiv 2604.14084"


@dataclass(frozen=True)
class WorkedExample:
    """One token of Appendix B.5."""

    number: int
    quadrant: str
    student_entropy: float
    forward_kl: float
    score: float | None
    """The paper's overconfidence score δ^fwd·(1 − ĥ), nats; printed for Q3 only."""
    student_top: TopTokens
    teacher_top: TopTokens


WORKED_EXAMPLES = (
    WorkedExample(
        1,
        "Q3",
        0.02,
        5.27,
        5.24,
        (("k", 99.8), ("x", 0.1), ("e", 0.0), ("a", 0.0), ("z", 0.0)),
        (("2", 49.9), ("k", 30.3), ("x", 8.7), ("e", 6.8), ("z", 2.8)),
    ),
    WorkedExample(
        2,
        "Q1",
        1.82,
        5.31,
        None,
        (("off", 54.4), ("missing", 15.6), ("the", 9.5), ("not", 4.5), ("replaced", 3.1)),
        (
            ("written", 40.3),
            ("increased", 35.6),
            ("off", 7.9),
            ("decreased", 2.9),
            ("incremented", 2.0),
        ),
    ),
    WorkedExample(
        3,
        "Q3",
        0.40,
        3.54,
        3.27,
        (("0", 91.2), ("8", 4.0), ("2", 3.5), ("4", 0.7), ("6", 0.5)),
        (("6", 60.0), ("2", 25.0), ("8", 6.3), ("9", 3.8), ("0", 3.0)),
    ),
    WorkedExample(
        4,
        "Q3",
        0.12,
        5.58,
        5.44,
        (("B", 98.2), ("(B", 1.0), ("\\'", 0.2), ("^", 0.2), ("C", 0.1)),
        (("A", 52.4), ("(A", 11.7), ("C", 11.7), ("B", 6.3), ("(", 6.3)),
    ),
    WorkedExample(
        5,
        "Q1",
        1.38,
        4.27,
        None,
        (("text", 53.5), ("Delta", 25.3), ("frac", 13.5), ("lambda", 1.4), ("pm", 1.0)),
        (("cot", 91.7), ("frac", 4.6), ("text", 1.1), ("delta", 1.0), ("Delta", 0.8)),
    ),
)


def range_of(name: str) -> str:
    """The paper's range of `Q3`, `Q4` or `Q1+Q2`, as `3–15%`; an en dash where it gives none."""
    if name not in PAPER_RANGES:
        return "–"
    low, high = PAPER_RANGES[name]
    return f"{100 * low:.0f}–{100 * high:.0f}%"
