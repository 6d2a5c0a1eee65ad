"""The token browser's data: a sample of rollouts with everything that the page shows of each of
their tokens.

The sample holds the rollouts of the strongest Q3 and Q1 tokens first, then rollouts drawn evenly
from the rest by a hash of their id, up to a budget of tokens, so that the page stays small however
large the run is. Texts are made visible here (`text.visible`) and shared through one list; numbers
are rounded to what is shown. The page's script puts them in place as text only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from tip_analysis.analysis.browsing import (
    MAX_ROLLOUT_TOKENS,
    colour_scales,
    listed_ids,
    rollout_rows,
    sample_rollouts,
    selection_ratios,
    strong_threshold,
)
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.names import Loss
from tip_analysis.core.text import visible, visible_lines
from tip_analysis.core.words import count, percent, plural
from tip_analysis.report.page import Part, Section
from tip_analysis.report.sections.gradients import measurement_words
from tip_analysis.report.sections.overview import label_of

SCORES: tuple[tuple[str, str, str], ...] = (
    ("student_entropy", "student entropy", "nats"),
    ("reverse_kl", "reverse KL", "nats"),
    ("forward_kl", "forward KL", "nats"),
    ("jsd", "Jensen–Shannon divergence", "nats"),
    ("soft_or", "Soft-OR", ""),
    ("q3_score", "Q3 score", "nats"),
    ("teacher_entropy", "teacher entropy", "nats"),
    ("grad_norm", "gradient norm ‖g‖", ""),
    ("grad_dot_loss", "alignment φ", ""),
    ("reward_alignment", "reward alignment", ""),
)
"""Column, name, unit: what a token can be coloured by and what the panel lists."""

_CODES = {None: 0, "Q1": 1, "Q2": 2, "Q3": 3, "Q4": 4}


@dataclass
class _Texts:
    """Distinct (token id, visible text) pairs, referred to by index."""

    entries: list[list[Any]] = field(default_factory=list)
    index: dict[tuple[int, str], int] = field(default_factory=dict)

    def add(self, token_id: int, text: str) -> int:
        key = token_id, visible(text)
        if key not in self.index:
            self.index[key] = len(self.entries)
            self.entries.append([key[1], token_id, text.count("\n") if len(text) < 64 else 0])
        return self.index[key]


def browser(views: Sequence[RunView]) -> Section:
    """The section with the embedded sample."""
    budget = views[0].options.browser_tokens // len(views)
    runs = [_run_payload(view, budget) for view in views]
    shown = sum(len(rollout["t"]) for run in runs for rollout in run["rollouts"])
    rollouts = sum(len(run["rollouts"]) for run in runs)
    total = sum(view.population.num_tokens for view in views)
    finding = (
        f"{plural(rollouts, 'rollout')} with {plural(shown, 'token')}"
        f" ({percent(shown / total) if total else '–'} of all {count(total)}) can be read here"
        " token by token; the rollouts of the strongest Q3 and Q1 tokens come first."
    )
    return Section(
        "browser",
        "Token browser",
        [Part(finding, population=_gradient_words(views))],
        shows=(
            "what the student wrote, which quadrant each token fell into, and what both models"
            " expected there."
        ),
        shows_not="a random sample: rollouts with the strongest tokens were put first on purpose.",
        template="browser.html.j2",
        extra={"payload": {"runs": runs, "scores": [list(score) for score in SCORES]}},
    )


def _gradient_words(views: Sequence[RunView]) -> str:
    """Which measurement the gradients of single tokens are from, run by run."""
    return " ".join(
        f"Gradients of {label_of(view, views) or 'single tokens'}: {measurement_words(view)}."
        for view in views
        if Loss.REVERSE_KL in view.losses
    )


def _run_payload(view: RunView, budget: int) -> dict[str, Any]:
    chosen = sample_rollouts(view, budget)
    shown = pl.col("position") < MAX_ROLLOUT_TOKENS
    frame = rollout_rows(view, chosen).filter(shown).collect().sort("rollout_id", "position")
    texts = _Texts()
    known = view.token_texts(listed_ids(frame))
    ratios = selection_ratios(view, chosen)
    by_rollout, selected = _by_rollout(frame), _by_rollout(ratios)
    about = {row["rollout_id"]: row for row in view.rollouts.iter_rows(named=True)}
    rollouts = [
        _rollout_payload(by_rollout[name], about.get(name, {}), texts, known, selected.get(name))
        for name in chosen
        if name in by_rollout
    ]
    scales = colour_scales(frame, [column for column, _, _ in SCORES])
    return {
        "name": visible(view.name, 60),
        "rollouts": rollouts,
        "texts": texts.entries,
        "rules": sorted(ratios["rule"].unique()),
        "strong": strong_threshold(view),
        "scales": {column: [_rounded(end) for end in ends] for column, ends in scales.items()},
    }


def _by_rollout(frame: pl.DataFrame) -> dict[str, pl.DataFrame]:
    parts = frame.partition_by("rollout_id", as_dict=True)
    return {str(key[0]): part for key, part in parts.items()}


def _rollout_payload(
    rows: pl.DataFrame,
    about: dict[str, Any],
    texts: _Texts,
    known: dict[int, str],
    selected: pl.DataFrame | None,
) -> dict[str, Any]:
    name, sampled = rows["rollout_id"][0], rows.select("token_id", "token").iter_rows()
    payload: dict[str, Any] = {
        "id": name,
        "shown": visible(name, 80),
        "prompt": visible_lines(about.get("prompt_text") or "", 3000),
        "answer": visible(about.get("ground_truth") or "", 120),
        "reward": about.get("reward"),
        "finish": str(about.get("finish_reason") or ""),
        "n": int(about.get("num_tokens") or rows.height),
        "p": rows["position"].to_list(),
        "t": [texts.add(index, text) for index, text in sampled],
        "q": [_CODES[value] for value in rows["quadrant"].cast(pl.String)],
        "s": _score_columns(rows),
        "r": _smallest_ratios(rows, selected),
    }
    for model, key in (("student", "a"), ("teacher", "b")):
        payload |= _likeliest(rows, model, key, texts, known)
    if rows["planted_label"].null_count() < rows.height:
        payload["l"] = [str(value or "") for value in rows["planted_label"]]
    return payload


def _score_columns(rows: pl.DataFrame) -> dict[str, list[Any]]:
    """The scores that any token has."""
    present = (column for column, _, _ in SCORES if rows[column].null_count() < rows.height)
    return {column: [_rounded(value) for value in rows[column]] for column in present}


def _likeliest(
    rows: pl.DataFrame, model: str, key: str, texts: _Texts, known: dict[int, str]
) -> dict[str, list[list[Any]]]:
    """A model's five likeliest tokens at each place, and their probabilities."""
    ids, logprobs = (rows[f"{model}_topk_{what}"].to_list() for what in ("ids", "logprobs"))
    listed = [[texts.add(index, known[index]) for index in (row or [])[:5]] for row in ids]
    shares = [[round(math.exp(value), 4) for value in (row or [])[:5]] for row in logprobs]
    return {key: listed, f"{key}p": shares}


def _smallest_ratios(rows: pl.DataFrame, chosen: pl.DataFrame | None) -> dict[str, list[float]]:
    """Rule -> for each token the smallest ρ that selects it; 0 where none does."""
    if chosen is None:
        return {}
    place = {position: index for index, position in enumerate(rows["position"])}
    ratios: dict[str, list[float]] = {}
    for rule, position, ratio in chosen.select("rule", "position", "retention_ratio").iter_rows():
        if position in place:
            ratios.setdefault(rule, [0] * rows.height)[place[position]] = ratio
    return ratios


def _rounded(value: float | None) -> Any:
    """Four significant digits; ±∞ as text, since JSON has none."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return float(f"{value:.4g}")
