"""The cuts of the preset `paper`: the pair whose shares lie in the ranges that the paper reports
over its pairs, as near as possible to 46.5 % of tokens uncertain and 9.5 % in Q3.

It makes the shares, so shares under it are no evidence that a pair is like the paper's;
`Cuts.paper_ranges_met` says whether the data allowed it.
"""

import math

import numpy as np

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

PAPER_RANGES: dict[str, tuple[float, float]] = {
    "Q4": (0.40, 0.47),
    "Q1+Q2": (0.40, 0.52),
    "Q3": (0.03, 0.15),
}
"""Shares that the paper reports over its pairs."""

PAPER_TARGET = (0.465, 0.095)
"""Share of uncertain tokens and share of Q3 that the preset `paper` aims at: the middles of the
ranges, made to sum to 1."""


def paper_range_distance(uncertain: float, q3: float) -> float:
    """How far shares lie outside `PAPER_RANGES`, summed over the three ranges; 0 where all hold (to
    1e-12)."""
    shares = {"Q1+Q2": uncertain, "Q3": q3, "Q4": 1.0 - uncertain - q3}
    excess = sum(
        max(low - shares[name], shares[name] - high, 0.0)
        for name, (low, high) in PAPER_RANGES.items()
    )
    return 0.0 if excess < 1e-12 else excess


def paper_cuts(entropy: Floats, divergence: Floats) -> tuple[float, float, bool]:
    """The joint preset: the pair of cuts whose shares come nearest to `PAPER_TARGET` inside
    `PAPER_RANGES`.

    A cut is one of the values seen (or 0), since only those change the shares. Entropy cuts: for
    every share of uncertain tokens in 0.400, 0.405 … 0.520, the value that comes nearest. For each,
    the divergence cuts: the two values around the target, and the two nearest to either end of what
    the ranges allow beside it. Of all pairs the one with the smallest (distance outside the ranges,
    squared distance to the target) is taken, the higher cuts among equals; a pair that misses the
    target by a token on each axis is taken at once.

    Args:
        entropy: [N] student entropy, nats.
        divergence: [N] divergence, nats; +inf is high whatever the cut.

    Returns:
        Both cuts, and whether all three shares lie in the ranges.
    """
    num_tokens = entropy.size
    ordered = np.sort(entropy)
    aims = [PAPER_TARGET[0], *np.round(np.arange(0.400, 0.5201, 0.005), 3)]
    best: tuple[float, float, float, float] = (math.inf, math.inf, 0.0, 0.0)
    seen: set[float] = set()
    for aim in aims:
        for cut in sorted(_values_around(ordered, aim * num_tokens) - seen):
            seen.add(cut)
            uncertain = float(num_tokens - np.searchsorted(ordered, cut, side="right")) / num_tokens
            confident = np.sort(divergence[entropy <= cut])
            for divergence_cut in _q3_candidates(confident, uncertain, num_tokens):
                q3 = (
                    float(confident.size - np.searchsorted(confident, divergence_cut, side="right"))
                    / num_tokens
                )
                distance = (uncertain - PAPER_TARGET[0]) ** 2 + (q3 - PAPER_TARGET[1]) ** 2
                best = min(
                    best, (paper_range_distance(uncertain, q3), distance, -cut, -divergence_cut)
                )
        if best[0] == 0.0 and best[1] <= 2.0 / num_tokens**2:
            break
    return -best[2] + 0.0, -best[3] + 0.0, best[0] == 0.0


def _values_around(ordered: Floats, num_above: float) -> set[float]:
    """The finite values of `ordered` that leave just under and just over `num_above` strictly above
    them; 0 counts as one."""
    finite = ordered[: np.searchsorted(ordered, math.inf)]
    index = int(np.clip(ordered.size - 1 - math.floor(num_above), 0, max(finite.size - 1, 0)))
    if finite.size == 0:
        return {0.0}
    under = float(finite[index])
    smaller = int(np.searchsorted(finite, under, side="left")) - 1
    return {under, float(finite[smaller]) if smaller >= 0 else 0.0}


def _q3_candidates(confident: Floats, uncertain: float, num_tokens: int) -> set[float]:
    low = max(PAPER_RANGES["Q3"][0], 1.0 - uncertain - PAPER_RANGES["Q4"][1])
    high = min(PAPER_RANGES["Q3"][1], 1.0 - uncertain - PAPER_RANGES["Q4"][0])
    aims = {PAPER_TARGET[1], low, high}
    return {
        value for aim in aims for value in _values_around(confident, max(aim, 0.0) * num_tokens)
    }
