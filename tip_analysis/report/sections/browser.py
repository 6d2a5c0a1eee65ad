"""The token browser's data: a sample of rollouts with everything that the page shows of each of
their tokens.

The sample holds the rollouts of the strongest Q3 and Q1 tokens first, then rollouts drawn evenly
from the rest by a hash of their id, up to a budget of tokens, so that the page stays small however
large the run is. Texts are made visible here (`text.visible`) and shared through one list; numbers
are rounded to what is shown. The page's script puts them in place as text only.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from tip_analysis.analysis import selection
from tip_analysis.analysis.densities import STRENGTH, strongest_tokens
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.names import Loss
from tip_analysis.core.text import visible, visible_lines
from tip_analysis.core.words import count, percent, plural
from tip_analysis.report.page import Part, Section
from tip_analysis.report.sections.gradients import measurement_words
from tip_analysis.report.sections.overview import label_of

DEFAULT_RULES = ("entropy", "soft_or", "q3", "divergence", "teachability")
"""Rules shown where a run has no masks: all without randomness and gradients."""
DEFAULT_RATIOS = (0.1, 0.2, 0.5)
MAX_ROLLOUT_TOKENS = 2000
"""Tokens of one rollout that go in; the rest is counted."""
NUM_STRONG = 200
"""A Q3 token is strong if it is among this many of the run's strongest."""

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
    chosen = _sample(view, budget)
    frame = _rows(view, chosen)
    texts = _Texts()
    known = view.token_texts(_listed_ids(frame))
    rules, selected = _selections(view, frame)
    by_rollout = {
        str(key[0]): part for key, part in frame.partition_by("rollout_id", as_dict=True).items()
    }
    about = {row["rollout_id"]: row for row in view.rollouts.iter_rows(named=True)}
    rollouts = [
        _rollout_payload(by_rollout[name], about.get(name, {}), texts, known, selected)
        for name in chosen
        if name in by_rollout
    ]
    return {
        "name": visible(view.name, 60),
        "rollouts": rollouts,
        "texts": texts.entries,
        "rules": rules,
        "strong": _strong_threshold(view),
        "scales": _scales(frame),
    }


def _sample(view: RunView, budget: int) -> list[str]:
    """Rollout ids: those of the strongest tokens, then an even draw, while the budget of tokens
    lasts."""
    size = 2 * view.options.num_strong
    tables = (strongest_tokens(view.tokens, quadrant, size) for quadrant in ("Q3", "Q1"))
    strong = [name for table in tables for name in table["rollout_id"]]
    lengths = view.raw.select("rollout_id").group_by("rollout_id").len().collect(engine="streaming")
    ordered = lengths.with_columns(pl.col("rollout_id").hash(seed=0).alias("draw")).sort(
        "draw", "rollout_id"
    )
    length_of = dict(lengths.iter_rows())
    chosen: list[str] = []
    for name in dict.fromkeys([*strong, *ordered["rollout_id"]]):
        length = min(length_of[name], MAX_ROLLOUT_TOKENS)
        if chosen and length > budget:
            if budget < 50:
                break
            continue
        chosen.append(name)
        budget -= length
    return chosen


def _rows(view: RunView, chosen: Sequence[str]) -> pl.DataFrame:
    """The rows of the chosen rollouts, with gradients where they were measured."""
    wanted = pl.LazyFrame({"rollout_id": list(chosen)}, schema={"rollout_id": pl.String})
    rows = view.tokens.join(wanted, on="rollout_id", how="semi").filter(
        pl.col("position") < MAX_ROLLOUT_TOKENS
    )
    return view.with_gradients(rows).collect().sort("rollout_id", "position")


def _listed_ids(frame: pl.DataFrame) -> Iterable[int]:
    for column in ("student_topk_ids", "teacher_topk_ids"):
        yield from frame[column].explode().drop_nulls().unique()


def _selections(view: RunView, frame: pl.DataFrame) -> tuple[list[str], dict[str, pl.DataFrame]]:
    """Names of rules, and for each rollout the smallest ρ at which each rule selects each token."""
    keys = frame.select("rollout_id").unique().lazy()
    if view.run.has("masks"):
        masks = view.run.masks().join(keys, on="rollout_id", how="semi").collect()
    else:
        masks = _made_masks(view, keys)
    of_token = masks.group_by("rule", "rollout_id", "position")
    smallest = of_token.agg(pl.col("retention_ratio").min()).sort("rule", "rollout_id", "position")
    rules = sorted(smallest["rule"].unique())
    parts = smallest.partition_by("rollout_id", as_dict=True)
    return rules, {str(key[0]): part for key, part in parts.items()}


def _made_masks(view: RunView, keys: pl.LazyFrame) -> pl.DataFrame:
    """Masks of `DEFAULT_RULES` within each rollout; that scope needs no other rollout's tokens."""
    scored = view.tokens.join(keys, on="rollout_id", how="semi").collect()
    masks = []
    for rule in DEFAULT_RULES:
        for ratio in DEFAULT_RATIOS:
            chosen = selection.select_tokens(
                scored, rule=rule, retention_ratio=ratio, selection_scope="rollout"
            )
            kept = chosen.filter("selected").select("rollout_id", "position")
            masks.append(kept.with_columns(rule=pl.lit(rule), retention_ratio=pl.lit(ratio)))
    return pl.concat(masks).collect()


def _rollout_payload(
    rows: pl.DataFrame,
    about: dict[str, Any],
    texts: _Texts,
    known: dict[int, str],
    selected: dict[str, pl.DataFrame],
) -> dict[str, Any]:
    name = rows["rollout_id"][0]
    payload: dict[str, Any] = {
        "id": name,
        "shown": visible(name, 80),
        "prompt": visible_lines(about.get("prompt_text") or "", 3000),
        "answer": visible(about.get("ground_truth") or "", 120),
        "reward": about.get("reward"),
        "finish": str(about.get("finish_reason") or ""),
        "n": int(about.get("num_tokens") or rows.height),
        "p": rows["position"].to_list(),
        "t": [
            texts.add(index, text) for index, text in rows.select("token_id", "token").iter_rows()
        ],
        "q": [_CODES[value] for value in rows["quadrant"].cast(pl.String)],
        "s": {
            column: [_rounded(value) for value in rows[column]]
            for column, _, _ in SCORES
            if rows[column].null_count() < rows.height
        },
        "r": _smallest_ratios(rows, selected.get(name)),
    }
    for model, key in (("student", "a"), ("teacher", "b")):
        ids, logprobs = (
            rows[f"{model}_topk_ids"].to_list(),
            rows[f"{model}_topk_logprobs"].to_list(),
        )
        payload[key] = [
            [texts.add(index, known[index]) for index in (row or [])[:5]] for row in ids
        ]
        payload[f"{key}p"] = [
            [round(math.exp(value), 4) for value in (row or [])[:5]] for row in logprobs
        ]
    if rows["planted_label"].null_count() < rows.height:
        payload["l"] = [str(value or "") for value in rows["planted_label"]]
    return payload


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


def _strong_threshold(view: RunView) -> float:
    """The Q3 score from which a Q3 token counts as strong."""
    best = (
        view.tokens.filter(pl.col("quadrant") == "Q3")
        .select(pl.col(STRENGTH["Q3"]).top_k(NUM_STRONG))
        .collect()
        .to_series()
    )
    lowest = best.drop_nulls().min()
    return float(lowest) if isinstance(lowest, float) and math.isfinite(lowest) else 0.0


def _scales(frame: pl.DataFrame) -> dict[str, list[float]]:
    """Low and high end of each colour scale: the extremes of the sample, the highest percent cut
    off."""
    scales = {}
    for column, _, _ in SCORES:
        values = frame[column].cast(pl.Float64)
        values = values.filter(values.is_finite())
        if values.len():
            scales[column] = [
                _rounded(values.quantile(0.01) or 0.0),
                _rounded(values.quantile(0.99) or 0.0),
            ]
    return scales


def _rounded(value: float | None) -> Any:
    """Four significant digits; ±∞ as text, since JSON has none."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return float(f"{value:.4g}")
