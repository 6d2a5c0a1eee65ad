"""How a run, its quadrants and its rollouts look where code is read: in a notebook or in a terminal. Never imports torch.

`show_rollout` is the report's token browser for one rollout: the same colours and underlines, the same numbers, the same way
of making any token visible. What is returned here shows itself: `_repr_html_` for notebooks (no script, no link, nothing
fetched), `__rich__` for `rich.print`. `Run` and `Cuts` show themselves through `run_html` and `cuts_html`.

Token texts are shown, never run: each goes through `words.visible` (controls and direction marks spelled out) and is then
escaped for HTML, or handed to rich as plain text.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tip_analysis.artifacts import Run
from tip_analysis.errors import RunError, SchemaError, TipAnalysisError, UnknownNameError
from tip_analysis.figures.style import ON_BLUE, ON_LIGHT, QUADRANT_COLORS, QUADRANT_NAMES
from tip_analysis.quadrants import PAPER_RANGES, Cut, Cuts, warn_about_cuts
from tip_analysis.report.browser import MAX_ROLLOUT_TOKENS, SCORES
from tip_analysis.report.reading import ReportOptions, RunView
from tip_analysis.report.summaries import strongest
from tip_analysis.report.words import count, listed, number, percent, plural, visible, visible_lines
from tip_analysis.status import next_steps, stage_table

MAX_SUMMARY_TOKENS = 5_000_000
"""A run of more tokens does not compute its quadrants merely because it is the last line of a cell."""

SCALE_COLOR = "#7c3a96"
"""The far end of the colour scale of a score, as in the report."""
OPACITY = {"Q1": 0.30, "Q2": 0.22, "Q3": 0.34}
"""How strongly a token's ground takes its quadrant's colour, as in the report; Q4 has none."""

_UNITS = {name: (label, unit) for name, label, unit in SCORES}
_GRADIENT_SCORES = ("grad_norm", "grad_dot_loss", "reward_alignment")
_LISTED = ("student_entropy", "teacher_entropy", "reverse_kl", "forward_kl", "soft_or", "q3_score", *_GRADIENT_SCORES)


def _rgb(color: str) -> str:
    return " ".join(str(int(color[index : index + 2], 16)) for index in (1, 3, 5))


_BORDERS = {"Q1": "2px solid", "Q2": "2px dotted", "Q3": "3px solid"}
_STYLE = "".join([
    ".tip-view{line-height:1.5;max-width:60em}.tip-view small{opacity:.75}",
    ".tip-view table{border-collapse:collapse;margin:.5em 0}",
    ".tip-view th,.tip-view td{text-align:left;padding:.15em .9em .15em 0;background:none}.tip-view .tip-n{text-align:right}",
    ".tip-tokens{font-family:monospace;line-height:2;white-space:pre-wrap;overflow-wrap:anywhere;margin:.5em 0}",
    ".tip-t{border-radius:3px;padding:.16em 0;border-bottom:2px solid transparent}.tip-apart .tip-t{unicode-bidi:isolate}",
    ".tip-q0{opacity:.65;font-style:italic}.tip-Q3{font-weight:700}",
    *(
        f".tip-{name}{{background:rgb({_rgb(QUADRANT_COLORS[name])} / {OPACITY[name]});border-bottom:{border} "
        f"{QUADRANT_COLORS[name]}}}"
        for name, border in _BORDERS.items()
    ),
    ".tip-bar{display:flex;height:1.1em;max-width:30em;border-radius:3px;overflow:hidden}",
    ".tip-swatch{display:inline-block;width:.75em;height:.75em;border-radius:3px;margin-right:.4em}",
    ".tip-prompt pre{white-space:pre-wrap;overflow-wrap:anywhere;max-height:16em;overflow-y:auto}",
])  # fmt: skip


def _framed(*parts: str) -> str:
    """One output; formulas inside tokens are not to be typeset, so MathJax is told to keep out."""
    return f'<div class="tip-view tex2jax_ignore mathjax_ignore"><style>{_STYLE}</style>{"".join(parts)}</div>'


def _table_html(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Cells are HTML already."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (f"<{tag}{' class=tip-n' * (index in numeric)}>{cell}</{tag}>" for index, cell in enumerate(cells))
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"


def _swatch(quadrant: str) -> str:
    return f'<span class="tip-swatch" style="background:{QUADRANT_COLORS[quadrant]}"></span>{quadrant}'


@dataclass(frozen=True)
class QuadrantSummary:
    """Shares of the quadrants under two cuts, beside the ranges that the paper reports."""

    shares: pl.DataFrame
    """`quadrants.quadrant_shares`."""
    cuts: Cuts
    warning: str | None
    """Where the entropy cut calls tokens uncertain that are not."""

    def share(self, quadrant: str) -> float:
        """Share of a quadrant, in [0, 1]; 0 where there is no token."""
        return float(self.shares.filter(pl.col("quadrant").cast(pl.String) == quadrant)["share"][0] or 0.0)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Quadrant, its name, number of tokens, share, the paper's range: as they are shown."""
        paper = {name: _range(name) for name in ("Q3", "Q4")} | dict.fromkeys(("Q1", "Q2"), f"Q1+Q2 {_range('Q1+Q2')}")
        return [
            (name, QUADRANT_NAMES[name], count(row["num_tokens"]), percent(row["share"]), paper[name])
            for row in self.shares.iter_rows(named=True)
            for name in [str(row["quadrant"])]
        ]

    def _repr_html_(self) -> str:
        return _framed(self.html())

    def html(self) -> str:
        """The summary without its frame."""
        bar = "".join(
            f'<span style="width:{self.share(name):.2%};background:{color}"></span>' for name, color in QUADRANT_COLORS.items()
        )
        rows = [(_swatch(name), *rest) for name, *rest in self.rows()]
        header = ("quadrant", "", "tokens", "share", "in the paper")
        warning = f"<div><small>Note: {escape(self.warning)}.</small></div>" if self.warning else ""
        return f'<div class="tip-bar">{bar}</div>{_table_html(header, rows, (2, 3))}{_cuts_line(self.cuts)}{warning}'

    def __rich__(self) -> Group:
        table = Table("quadrant", "", "tokens", "share", "in the paper", box=None, header_style="dim")
        for name, *rest in self.rows():
            table.add_row(Text.assemble(("  ", Style(bgcolor=QUADRANT_COLORS[name])), f" {name}"), *rest)
        note = [Text(f"note: {self.warning}", style="dim")] if self.warning else []
        return Group(table, *(Text(_cut_words(cut), style="dim") for cut in (self.cuts.entropy, self.cuts.divergence)), *note)

    def __repr__(self) -> str:
        return f"QuadrantSummary({', '.join(f'{name} {share}' for name, _, _, share, _ in self.rows())})"


def _range(name: str) -> str:
    low, high = PAPER_RANGES[name]
    return f"{percent(low, 0)} to {percent(high, 0)}"


def show_quadrants(
    run: Run | str | Path, *, entropy_cut: str | float = "median", divergence_cut: str | float = "mean", cut_scope: str = "run"
) -> QuadrantSummary:
    """Shares of the quadrants of a run, as an object that shows itself.

    Args:
        run: a run with scored tokens, or its folder.
        entropy_cut, divergence_cut, cut_scope: as for `assign_quadrants`.

    Raises:
        RunError: no tokens are scored.
        OptionError: a cut has no valid form.
    """
    return _summary(_view(run, ReportOptions(str(entropy_cut), str(divergence_cut), cut_scope=cut_scope)))


def _view(run: Run | str | Path, options: ReportOptions) -> RunView:
    return RunView(run.path if isinstance(run, Run) else run, options)


def _summary(view: RunView) -> QuadrantSummary:
    warning = warn_about_cuts(view.raw, view.cuts)
    return QuadrantSummary(view.shares, view.cuts, warning.message if warning else None)


def run_html(run: Run) -> str:
    """What a run holds, its quadrants under the default cuts, and what can come next."""
    stages = stage_table(run)
    head = f"<b>Run</b> <code>{escape(visible(str(run.path), 120))}</code>"
    rows = [
        (row["stage"], row["state"], count(row["rows"]), str(row["configurations"]), number(row["seconds"]))
        for row in stages.iter_rows(named=True)
    ]
    held = _table_html(("stage", "", "rows", "configurations", "seconds"), rows, (2, 3, 4)) if rows else "<div>empty</div>"
    steps = "<br>".join(f"<code>{escape(visible(step, 200))}</code>" for step in next_steps(run))
    return _framed(head, held, _run_quadrants(run, stages), f"<div><small>next: {steps}</small></div>")


def _run_quadrants(run: Run, stages: pl.DataFrame) -> str:
    if not run.has("tokens"):
        return ""
    num_tokens = int(stages.filter(pl.col("stage") == "score")["rows"].sum())
    if num_tokens > MAX_SUMMARY_TOKENS:
        return f"<div>{count(num_tokens)} tokens: <code>tip.show_quadrants(run)</code> counts the quadrants</div>"
    try:
        view = _view(run, ReportOptions())
        names = " learns from ".join(f"<code>{escape(visible(name, 60))}</code>" for name in view.model_names())
        return f"<div>{names}</div>{_summary(view).html()}"
    except TipAnalysisError as error:
        return f"<div>no quadrants: {escape(visible(str(error), 300))}</div>"


def cuts_html(cuts: Cuts) -> str:
    """Both cuts as they were measured."""
    return _framed(_cuts_line(cuts))


def _cuts_line(cuts: Cuts) -> str:
    words = [_cut_words(cuts.entropy), _cut_words(cuts.divergence)]
    if cuts.num_infinite:
        words.append(f"{plural(cuts.num_infinite, 'token')} with a divergence of +∞: high, and left out of the cut")
    if cuts.paper_ranges_met is not None:
        words.append(f"the data {'allow' if cuts.paper_ranges_met else 'do not allow'} all of the paper’s ranges")
    return "".join(f"<div><small>{escape(text)}</small></div>" for text in words)


def _cut_words(cut: Cut) -> str:
    name = {"entropy": "student entropy", "divergence": "reverse KL"}[cut.axis]
    if cut.scope == "batch":
        return f"{name} is high above the {cut.spec} of its batch ({plural(len(cut.batch_values), 'cut')})"
    how = "" if cut.value is not None and cut.spec == f"{cut.value:g}" else f" ({cut.spec})"
    return f"{name} is high above {number(cut.value)} nats{how}"


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
    """One rollout with each token coloured, as an object that shows itself in a notebook and in a terminal."""

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
        return {name: sum(token.quadrant == name for token in self.tokens) for name in QUADRANT_COLORS}

    def heading(self) -> str:
        """The rollout and what is known of it, in words."""
        return " · ".join([f"rollout {visible(self.rollout_id, 80)}", *self.facts])

    def legend(self) -> str:
        """What the colours mean, in words."""
        if self.scale is None:
            return listed([f"{name} {QUADRANT_NAMES[name]}: {plural(size, 'token')}" for name, size in self.counts().items()])
        label, unit = _UNITS[self.colour_by]
        return f"{label}: {number(self.scale[0])} (pale) to {number(self.scale[1])} {unit} (dark)"

    def _repr_html_(self) -> str:
        legend = escape(self.legend())
        if self.scale is None:
            legend = " ".join(
                f"{_swatch(name)}&nbsp;{QUADRANT_NAMES[name]}&nbsp;({size})&emsp;" for name, size in self.counts().items()
            )
        apart = "" if _mostly_right_to_left(self.tokens) else " tip-apart"
        left_out = f"<small>… {plural(self.num_left_out, 'more token')}</small>" if self.num_left_out else ""
        return _framed(
            f"<b>{escape(self.heading())}</b>",
            f'<details class="tip-prompt"><summary>Prompt</summary><pre>{escape(self.prompt)}</pre></details>',
            f'<div class="tip-tokens{apart}">{"".join(map(_token_html, self.tokens))}{left_out}</div>',
            f"<small>{legend}<br>Hold the pointer over a token for its numbers.</small>",
        )

    def __rich__(self) -> Group:
        tokens = Text()
        for token in self.tokens:
            style = _terminal_style(token.quadrant) if self.scale is None else _terminal_ramp(token.strength)
            tokens.append(token.text, style)
            tokens.append("\n" * token.num_line_breaks)
        legend = Text(self.legend())
        if self.scale is None:
            parts = [
                Text.assemble((f" {name} ", _terminal_style(name)), f" {QUADRANT_NAMES[name]} ({size})  ")
                for name, size in self.counts().items()
            ]
            legend = Text.assemble(*parts)
        more = [Text(f"… {plural(self.num_left_out, 'more token')}", style="dim")] if self.num_left_out else []
        return Group(Text(self.heading(), style="bold"), Text(self.prompt, style="dim"), tokens, *more, legend)

    def __repr__(self) -> str:
        return f"RolloutView({self.rollout_id!r}: {listed([f'{name} {size}' for name, size in self.counts().items()])})"


def show_rollout(
    run: Run | str | Path,
    rollout_id: str | None = None,
    *,
    colour_by: str = "quadrant",
    entropy_cut: str | float = "median",
    divergence_cut: str | float = "mean",
    max_tokens: int = MAX_ROLLOUT_TOKENS,
) -> RolloutView:
    """One rollout, each token coloured by its quadrant or by a score; the numbers of a token are in its tooltip.

    Args:
        run: a run with scored tokens, or its folder.
        rollout_id: which; by default that of the strongest Q3 token (highest Q3 score), or the first if Q3 is empty.
        colour_by: `quadrant`, or a score of `report.browser.SCORES`; its scale runs from the run's 1st to its 99th percentile.
        entropy_cut, divergence_cut: as for `assign_quadrants`; measured over the whole run.
        max_tokens: how many of its tokens are shown.

    Raises:
        UnknownNameError: there is no such rollout, or no such score.
        RunError: no tokens are scored, or a gradient score is wanted and none was measured.
        OptionError: a cut has no valid form.
    """
    if colour_by not in ("quadrant", *_UNITS):
        raise UnknownNameError("score to colour by", colour_by, ["quadrant", *_UNITS])
    view = _view(run, ReportOptions(str(entropy_cut), str(divergence_cut)))
    if rollout_id is None:
        rollout_id = _strongest_rollout(view)
    rows = _rows(view, rollout_id)
    scale = None if colour_by == "quadrant" else _scale(view, colour_by)
    shown = rows.head(max_tokens)
    listed_ids = pl.concat([shown[f"{model}_topk_ids"].explode() for model in ("student", "teacher")]).drop_nulls()
    texts = view.token_texts(listed_ids)
    selected = _selected_by(view, rollout_id)
    tokens = tuple(
        ShownToken(
            visible(row["token"]),
            row["quadrant"],
            _strength(row[colour_by], scale) if scale else None,
            tuple(_details(row, texts, selected.get(row["position"], ""))),
            min(3, row["token"].count("\n")) if len(row["token"]) < 64 else 0,
        )
        for row in shown.with_columns(pl.col("quadrant").cast(pl.String)).iter_rows(named=True)
    )
    facts, prompt = _about(view, rollout_id, rows.height)
    return RolloutView(rollout_id, facts, prompt, tokens, colour_by, scale, rows.height - shown.height)


def _strongest_rollout(view: RunView) -> str:
    best = strongest(view.tokens, "Q3", 1)["rollout_id"]
    found = best if best.len() else view.raw.select("rollout_id").head(1).collect()["rollout_id"]
    if found.is_empty():
        raise SchemaError(f"{view.run.path} has no token to show")
    return str(found[0])


def _rows(view: RunView, rollout_id: str) -> pl.DataFrame:
    """The tokens of one rollout in order, with scores, quadrant and, where measured, gradients."""
    chosen = pl.col("rollout_id") == rollout_id
    rows = view.tokens.filter(chosen)
    if view.run.has("gradients"):
        rows = rows.join(view.gradients.filter(chosen), on=["rollout_id", "position"], how="left")
    else:
        rows = rows.with_columns(pl.lit(None, pl.Float64).alias(name) for name in _GRADIENT_SCORES)
    frame = rows.collect().sort("position")
    if frame.is_empty():
        first = view.raw.select("rollout_id").unique(maintain_order=True).head(8).collect()["rollout_id"]
        raise UnknownNameError("rollout", rollout_id, [*first, "…"])
    return frame


def _scale(view: RunView, column: str) -> tuple[float, float]:
    """The 1st and the 99th percentile of a score over the run."""
    if column in _GRADIENT_SCORES and not view.run.has("gradients"):
        raise RunError(f"{view.run.path} has no gradients yet; `tip-analysis gradients {view.run.path}` measures them")
    table = view.gradients if column in _GRADIENT_SCORES else view.tokens
    value = pl.col(column).cast(pl.Float64)
    finite = value.filter(value.is_finite())
    low, high = table.select(finite.quantile(0.01).alias("low"), finite.quantile(0.99).alias("high")).collect().row(0)
    return float(low or 0.0), float(high or 0.0)


def _strength(value: float | None, scale: tuple[float, float]) -> float | None:
    if value is None:
        return None
    if math.isinf(value):
        return 1.0 if value > 0 else 0.0
    return min(1.0, max(0.0, (value - scale[0]) / ((scale[1] - scale[0]) or 1.0)))


def _selected_by(view: RunView, rollout_id: str) -> dict[int, str]:
    """Position -> the rules that select it, each with the smallest ρ; empty where the run has no masks."""
    if not view.run.has("masks"):
        return {}
    masks = view.run.masks().filter(pl.col("rollout_id") == rollout_id, pl.col("rule") != "all")
    smallest = masks.group_by("position", "rule").agg(pl.col("retention_ratio").min()).sort("position", "rule").collect()
    chosen: dict[int, list[str]] = {}
    for position, rule, ratio in smallest.iter_rows():
        chosen.setdefault(position, []).append(f"{visible(rule, 40)} from ρ {ratio:g}")
    return {position: ", ".join(rules) for position, rules in chosen.items()}


def _details(row: dict[str, Any], texts: dict[int, str], selected: str) -> Iterable[str]:
    """What the tooltip says, line by line."""
    label = f" · {row['planted_label']}" if row["planted_label"] else ""
    yield f"position {row['position']} · id {row['token_id']} · {row['quadrant'] or 'not written by the student'}{label}"
    for column in _LISTED:
        name, unit = _UNITS[column]
        if row[column] is not None:
            yield f"{name} {number(row[column])} {unit}".rstrip()
    for model in ("student", "teacher"):
        ids, logprobs = row[f"{model}_topk_ids"] or [], row[f"{model}_topk_logprobs"] or []
        pairs = list(zip(ids, logprobs, strict=True))[:5]
        if pairs:
            yield f"{model}: " + ", ".join(f"{visible(texts[index], 24)} {percent(math.exp(value))}" for index, value in pairs)
    if selected:
        yield f"selected by {selected}"


def _about(view: RunView, rollout_id: str, num_tokens: int) -> tuple[tuple[str, ...], str]:
    """What is known of a rollout, and its prompt."""
    facts = [plural(num_tokens, "token")]
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
        name, style = "", f' style="background:rgb({_rgb(SCALE_COLOR)} / {0.04 + 0.58 * token.strength:.2f})"'
    return f'<span class="tip-t {name}"{style} title="{title}">{text}</span>' + "\n" * token.num_line_breaks


def _mostly_right_to_left(tokens: Sequence[ShownToken]) -> bool:
    """Whether the tokens should run together in the text's own direction, rather than each stand apart."""
    turned = sum(any(unicodedata.bidirectional(char) in ("R", "AL") for char in token.text) for token in tokens)
    return turned > 0.3 * len(tokens)


def _terminal_style(quadrant: str | None) -> Style:
    """Colours of the page; Q3 stands out without colour too."""
    if quadrant is None:
        return Style(dim=True, italic=True)
    if quadrant == "Q4":
        return Style()
    ink = ON_BLUE if quadrant == "Q1" else ON_LIGHT
    strong = True if quadrant == "Q3" else None
    return Style(color=ink, bgcolor=QUADRANT_COLORS[quadrant], bold=strong, underline=strong)


def _terminal_ramp(strength: float | None) -> Style:
    if strength is None:
        return Style(dim=True)
    pale, dark = (250, 247, 251), tuple(int(part) for part in _rgb(SCALE_COLOR).split())
    mixed = (round(a + strength * (b - a)) for a, b in zip(pale, dark, strict=True))
    red, green, blue = mixed
    return Style(color=ON_BLUE if strength > 0.55 else ON_LIGHT, bgcolor=f"rgb({red},{green},{blue})")
