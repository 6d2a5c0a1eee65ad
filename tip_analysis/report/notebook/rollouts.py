"""One rollout with each token coloured by its quadrant or by a score: the report's token browser,
for a cell or a terminal."""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Unpack

import polars as pl
from rich.console import Group
from rich.text import Text

from tip_analysis.analysis.browsing import (
    MAX_ROLLOUT_TOKENS,
    listed_ids,
    one_rollout,
    recorded_ratios,
    run_scale,
    strongest_rollout,
)
from tip_analysis.analysis.measurements import Preference
from tip_analysis.analysis.rules import keeps_all
from tip_analysis.analysis.run_view import GRADIENT_SCORES, ReportOptions, RunView
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, CutOptions, Taxonomy
from tip_analysis.core.errors import UnknownNameError
from tip_analysis.core.run_folder import Run
from tip_analysis.core.text import visible, visible_lines
from tip_analysis.core.words import listed, number, percent, plural
from tip_analysis.figures.style import QUADRANT_COLORS, QUADRANT_NAMES
from tip_analysis.report.notebook.frame import (
    SCALE_COLOR,
    framed,
    rgb,
    swatch,
    terminal_ramp,
    terminal_style,
)
from tip_analysis.report.notebook.runs import open_view
from tip_analysis.report.sections.browser import SCORES
from tip_analysis.report.sections.gradients import measurement_words

_UNITS = {name: (label, unit) for name, label, unit in SCORES}
_LISTED = (
    "student_entropy",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "soft_or",
    "q3_score",
    *GRADIENT_SCORES,
)


@dataclass(frozen=True)
class ShownToken:
    """One token as it is shown; every text is visible and without control characters."""

    text: str
    quadrant: str | None
    """None where the student did not write the token."""
    strength: float | None
    """Place on the colour scale, in [0, 1]; None under quadrants or where there is no value."""
    details: tuple[str, ...]
    num_line_breaks: int = 0


@dataclass(frozen=True)
class RolloutView:
    """One rollout with each token coloured, as an object that shows itself in a notebook and in a
    terminal."""

    rollout_id: str
    facts: tuple[str, ...]
    prompt: str
    tokens: tuple[ShownToken, ...]
    colour_by: str
    scale: tuple[float, float] | None
    """Values at both ends of the colour scale; None under quadrants."""
    num_left_out: int

    def counts(self) -> dict[str, int]:
        """Tokens shown of each quadrant."""
        return {
            name: sum(token.quadrant == name for token in self.tokens) for name in QUADRANT_COLORS
        }

    def heading(self) -> str:
        """The rollout and what is known of it, in words."""
        return " · ".join([f"rollout {visible(self.rollout_id, 80)}", *self.facts])

    def legend(self) -> str:
        """What the colours mean, in words."""
        if self.scale is None:
            return listed(
                [
                    f"{name} {QUADRANT_NAMES[name]}: {plural(size, 'token')}"
                    for name, size in self.counts().items()
                ]
            )
        label, unit = _UNITS[self.colour_by]
        return f"{label}: {number(self.scale[0])} (pale) to {number(self.scale[1])} {unit} (dark)"

    def _repr_html_(self) -> str:
        legend = escape(self.legend())
        if self.scale is None:
            legend = " ".join(
                f"{swatch(name)}&nbsp;{QUADRANT_NAMES[name]}&nbsp;({size})&emsp;"
                for name, size in self.counts().items()
            )
        apart = "" if _mostly_right_to_left(self.tokens) else " tip-apart"
        left_out = (
            f"<small>… {plural(self.num_left_out, 'more token')}</small>"
            if self.num_left_out
            else ""
        )
        tokens = "".join(map(_token_html, self.tokens))
        return framed(
            f"<b>{escape(self.heading())}</b>",
            '<details class="tip-prompt"><summary>Prompt</summary>'
            f"<pre>{escape(self.prompt)}</pre></details>",
            f'<div class="tip-tokens{apart}">{tokens}{left_out}</div>',
            f"<small>{legend}<br>Hold the pointer over a token for its numbers.</small>",
        )

    def __rich__(self) -> Group:
        head = Text(self.heading(), style="bold"), Text(self.prompt, style="dim")
        more = plural(self.num_left_out, "more token") if self.num_left_out else ""
        left_out = [Text(f"… {more}", style="dim")] if more else []
        return Group(*head, self._coloured(), *left_out, self._coloured_legend())

    def _coloured(self) -> Text:
        tokens = Text()
        for token in self.tokens:
            by_quadrant = self.scale is None
            style = terminal_style(token.quadrant) if by_quadrant else terminal_ramp(token.strength)
            tokens.append(token.text, style)
            tokens.append("\n" * token.num_line_breaks)
        return tokens

    def _coloured_legend(self) -> Text:
        if self.scale is not None:
            return Text(self.legend())
        parts: list[Text | tuple[str, Any] | str] = []
        for name, size in self.counts().items():
            parts += [(f" {name} ", terminal_style(name)), f" {QUADRANT_NAMES[name]} ({size})  "]
        return Text.assemble(*parts)

    def __repr__(self) -> str:
        return (
            f"RolloutView({self.rollout_id!r}:"
            f" {listed([f'{name} {size}' for name, size in self.counts().items()])})"
        )


def show_rollout(
    run: Run | str | Path,
    rollout_id: str | None = None,
    *,
    colour_by: str = "quadrant",
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    measurement: Preference | None = None,
    max_tokens: int = MAX_ROLLOUT_TOKENS,
    **cuts: Unpack[CutOptions],
) -> RolloutView:
    """One rollout, each token coloured by its quadrant or by a score; the numbers of a token are in
    its tooltip.

    Args:
        run: a run with scored tokens, or its folder.
        rollout_id: which; by default that of the strongest Q3 token (highest Q3 score), or the
            first if Q3 is empty.
        colour_by: `quadrant`, or a score of `report.browser.SCORES`; its scale runs from the run's
            1st to its 99th percentile.
        taxonomy: where the cuts lie, and how scores are normalised, over the whole run.
        measurement: which gradients, where several were measured; the heading names them.
        max_tokens: how many of its tokens are shown.
        cuts: `entropy_cut`, `divergence_cut`, `cut_scope` in place of the taxonomy's.

    Raises:
        UnknownNameError: there is no such rollout, or no such score.
        RunError: no tokens are scored, or a gradient score is wanted and none was measured.
        OptionError: a cut has no valid form, or several measurements of gradients fit.
    """
    if colour_by not in ("quadrant", *_UNITS):
        raise UnknownNameError("score to colour by", colour_by, ["quadrant", *_UNITS])
    options = ReportOptions(taxonomy.changed(**cuts), measurement or Preference())
    view = open_view(run, options)
    rollout_id = strongest_rollout(view) if rollout_id is None else rollout_id
    rows = one_rollout(view, rollout_id)
    scale = None if colour_by == "quadrant" else run_scale(view, colour_by)
    shown = rows.head(max_tokens)
    texts = view.token_texts(listed_ids(shown))
    selected = _selected_by(view, rollout_id)
    tokens = tuple(
        _shown_token(row, colour_by, scale, texts, selected.get(row["position"], ""))
        for row in shown.with_columns(pl.col("quadrant").cast(pl.String)).iter_rows(named=True)
    )
    facts, prompt = _about(view, rollout_id, rows.height)
    return RolloutView(
        rollout_id, facts, prompt, tokens, colour_by, scale, rows.height - shown.height
    )


def _shown_token(
    row: dict[str, Any],
    colour_by: str,
    scale: tuple[float, float] | None,
    texts: dict[int, str],
    selected: str,
) -> ShownToken:
    return ShownToken(
        visible(row["token"]),
        row["quadrant"],
        _strength(row[colour_by], scale) if scale else None,
        tuple(_details(row, texts, selected)),
        min(3, row["token"].count("\n")) if len(row["token"]) < 64 else 0,
    )


def _strength(value: float | None, scale: tuple[float, float]) -> float | None:
    if value is None:
        return None
    if math.isinf(value):
        return 1.0 if value > 0 else 0.0
    return min(1.0, max(0.0, (value - scale[0]) / ((scale[1] - scale[0]) or 1.0)))


def _selected_by(view: RunView, rollout_id: str) -> dict[int, str]:
    """Position -> the rules that select it, each with the smallest ρ; empty where the run has no
    masks."""
    known = recorded_ratios(view, [rollout_id]).filter(~keeps_all())
    smallest = known.sort("position", "rule").select("position", "rule", "retention_ratio")
    chosen: dict[int, list[str]] = {}
    for position, rule, ratio in smallest.iter_rows():
        chosen.setdefault(position, []).append(f"{visible(rule, 40)} from ρ {ratio:g}")
    return {position: ", ".join(rules) for position, rules in chosen.items()}


def _details(row: dict[str, Any], texts: dict[int, str], selected: str) -> Iterable[str]:
    """What the tooltip says, line by line."""
    label = f" · {row['planted_label']}" if row["planted_label"] else ""
    yield (
        f"position {row['position']} · id {row['token_id']} ·"
        f" {row['quadrant'] or 'not written by the student'}{label}"
    )
    for column in _LISTED:
        name, unit = _UNITS[column]
        if row[column] is not None:
            yield f"{name} {number(row[column])} {unit}".rstrip()
    for model in ("student", "teacher"):
        ids, logprobs = row[f"{model}_topk_ids"] or [], row[f"{model}_topk_logprobs"] or []
        pairs = list(zip(ids, logprobs, strict=True))[:5]
        if pairs:
            yield f"{model}: " + ", ".join(
                f"{visible(texts[index], 24)} {percent(math.exp(value))}" for index, value in pairs
            )
    if selected:
        yield f"selected by {selected}"


def _about(view: RunView, rollout_id: str, num_tokens: int) -> tuple[tuple[str, ...], str]:
    """What is known of a rollout, and its prompt."""
    facts = [plural(num_tokens, "token")]
    if view.gradients is not None:
        facts.append(f"gradients of the {measurement_words(view)}")
    if not view.run.has("rollouts"):
        return tuple(facts), ""
    wanted = ("prompt_text", "ground_truth", "reward", "finish_reason")
    found = view.run.rollouts().filter(pl.col("rollout_id") == rollout_id).select(*wanted).collect()
    if found.is_empty():
        return tuple(facts), ""
    about = found.row(0, named=True)
    facts += [f"answer {visible(about['ground_truth'], 60)}"] if about["ground_truth"] else []
    facts += [f"reward {number(about['reward'])}"] if about["reward"] is not None else []
    facts += [f"ended by {about['finish_reason']}"] if about["finish_reason"] else []
    return tuple(facts), visible_lines(about["prompt_text"] or "", 3000)


def _token_html(token: ShownToken) -> str:
    title, text = escape("\n".join(token.details)), escape(token.text)
    style = ""
    name = f"tip-{token.quadrant}" if token.quadrant else "tip-q0"
    if token.strength is not None:
        name, style = (
            "",
            f' style="background:rgb({rgb(SCALE_COLOR)} / {0.04 + 0.58 * token.strength:.2f})"',
        )
    return (
        f'<span class="tip-t {name}"{style} title="{title}">{text}</span>'
        + "\n" * token.num_line_breaks
    )


def _mostly_right_to_left(tokens: Sequence[ShownToken]) -> bool:
    """Whether the tokens should run together in the text's own direction, rather than each stand
    apart."""
    turned = sum(
        any(unicodedata.bidirectional(char) in ("R", "AL") for char in token.text)
        for token in tokens
    )
    return turned > 0.3 * len(tokens)
