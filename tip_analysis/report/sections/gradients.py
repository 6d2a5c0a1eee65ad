"""The section on gradients: size and alignment by quadrant, for every loss that was measured, and
what predicts them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis.correlations import TARGETS, correlation_table, equation_6
from tip_analysis.analysis.figure_tables import MEASURES
from tip_analysis.analysis.gradient_tables import (
    DIVERGENCE,
    LOGIT_NORMS,
    energy_shares,
    gradient_profile,
    gradient_statistics,
    logit_profile,
)
from tip_analysis.analysis.quadrant_tables import widen
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import Loss
from tip_analysis.core.words import count, interval, listed, number, percent, plural
from tip_analysis.figures.gradients import LOSS_NAMES
from tip_analysis.report.page import (
    Block,
    Measured,
    Missing,
    Part,
    Section,
    Table,
    Tag,
    Warnings,
    picture,
)
from tip_analysis.report.sections.overview import FEW_TOKENS, label_of, population, slug_of


def gradients(views: Sequence[RunView]) -> Section:
    """Which quadrants carry the gradient, and does it point downhill?"""
    return Section(
        "gradients",
        "Gradient norms and alignment",
        [_part(view, label_of(view, views)) for view in views],
        shows=(
            "M = ‖g‖², the size of each token’s own gradient, and φ = ⟨∇L, g⟩, how far a step on"
            " that token alone lowers the loss; ∇L comes from the other half of the prompts, so"
            " that φ is not positive by construction."
        ),
        shows_not=(
            "what happens over many steps, nor that a large gradient is a useful one: under the"
            " reverse KL a confident student that is wrong has a small gradient on its logits"
            " (softmax saturation), however large its divergence."
        ),
    )


def measurement_words(view: RunView, loss: Loss | str = Loss.REVERSE_KL) -> str:
    """`reverse KL (all parameters, 32 probes, seed 0)`: which measurement the numbers are from."""
    return f"{LOSS_NAMES.get(loss, loss)} ({view.measurement(loss).setting_words()})"


def _other_words(view: RunView) -> str:
    """Measurements that the page shows no number of."""
    shown = [view.measurement(loss) for loss in view.losses]
    rest = [one for one in view.measurements if one not in shown]
    if not rest:
        return ""
    named = "; ".join(one.words() for one in rest)
    return f" Also measured, and shown with --measurement: {named}."


def _part(view: RunView, label: str) -> Part:
    if not view.population.num_tokens:
        return Part("No token has statistics.", run=label)
    if not view.run.has("gradients"):
        missing = Missing(
            "Gradients over the parameters have not been measured; below are those over the logits,"
            " which scoring gives.",
            f"tip-analysis gradients {view.run.path} --loss reverse_kl forward_kl",
        )
        return Part(_logit_finding(view), [missing, _logit_picture(view)], population(view), label)
    losses = view.losses
    unsettled = [Warnings(list(view.unsettled.values()))] if view.unsettled else []
    if not losses:
        return Part("No measurement of gradients is preferred.", unsettled, run=label)
    tables = {loss: gradient_statistics(view, loss) for loss in losses}
    blocks: list[Block] = [_profile_picture(view, tables), _energy_picture(view, tables)]
    blocks += [
        _quadrant_block(view, loss, table, folded=loss != losses[0])
        for loss, table in tables.items()
    ]
    blocks.append(_correlation_block(view, losses[0]))
    blocks += unsettled
    return Part(
        _finding(losses[0], tables[losses[0]]),
        blocks,
        _measured_words(tables[losses[0]], view),
        label,
    )


def _finding(loss: str, table: pl.DataFrame) -> str:
    rows = {str(row["quadrant"]): row for row in table.iter_rows(named=True)}
    largest = max(rows, key=lambda name: rows[name]["share_grad_norm_sq"] or 0.0)
    total = sum(row["num_tokens"] or 0 for row in rows.values())
    words = (
        f"Under the {LOSS_NAMES.get(loss, loss)}, on {plural(total, 'measured token')}, {largest}"
        f" carries most of the gradient: {_of(rows[largest], 'share_grad_norm_sq')} of Σ‖g‖² on"
        f" {percent(rows[largest]['share'])} of the tokens."
    )
    if (rows["Q3"]["num_tokens"] or 0) >= FEW_TOKENS and largest != "Q3":
        words += (
            f" Q3 carries {_of(rows['Q3'], 'share_grad_norm_sq')} of it on"
            f" {percent(rows['Q3']['share'])}, and {_of(rows['Q3'], 'share_grad_dot_loss')} of Σφ."
        )
    return f"{words} Gradients {_direction_words(rows)}."


def _of(row: dict[str, Any], name: str) -> str:
    return f"{percent(row[name])} {interval(row[f'{name}_low'], row[f'{name}_high'])}".strip()


def _direction_words(rows: Mapping[str, dict[str, Any]]) -> str:
    if all(row["mean_grad_dot_loss"] is None for row in rows.values()):
        return (
            "have no known direction: φ takes ∇L from other prompts, and rollouts of one prompt"
            " only were measured; measure more with a larger --limit"
        )
    downhill = [name for name, row in rows.items() if (row["mean_grad_dot_loss_low"] or 0.0) > 0]
    if downhill:
        return f"point downhill on average (95% interval above 0) in {listed(downhill)}"
    return "point downhill in no quadrant clearly (every 95% interval of the mean of φ holds 0)"


def _profile_picture(view: RunView, tables: dict[str, pl.DataFrame]) -> Block:
    profile = gradient_profile(tables, MEASURES)
    return picture(
        lambda width: figures.quadrant_profile(profile, width=width),
        key=f"profile-{slug_of(view)}",
        caption=(
            "Divergence, size of the gradient and alignment, side by side for each loss; each panel"
            " has its own axis. Where the divergence of Q3 is large and its gradient is not, the"
            " softmax is saturated."
        ),
        alt=(
            "Bars of mean divergence, squared gradient norm and alignment by quadrant; the tables"
            " below have the numbers."
        ),
    )


def _logit_finding(view: RunView) -> str:
    rows = {str(row["quadrant"]): row for row in widen(view.quadrant_means).iter_rows(named=True)}
    reverse, forward = (rows["Q3"][f"mean_{column}"] for column in LOGIT_NORMS.values())
    return (
        f"On the logits, the mean gradient norm of Q3 is {number(reverse)} under the reverse KL and"
        f" {number(forward)} under the forward KL, at a mean divergence of"
        f" {number(rows['Q3']['mean_reverse_kl'])} and {number(rows['Q3']['mean_forward_kl'])}"
        " nats."
    )


def _logit_picture(view: RunView) -> Block:
    profile = logit_profile(view, divergence=MEASURES[DIVERGENCE], norm="mean logit ‖g‖")
    return picture(
        lambda width: figures.quadrant_profile(profile, width=width),
        key=f"logits-{slug_of(view)}",
        caption=(
            "Mean divergence and mean gradient norm over the logits, by quadrant, for both"
            " directions of the KL."
        ),
        alt="Bars of mean divergence and logit gradient norm by quadrant.",
    )


def _energy_picture(view: RunView, tables: dict[str, pl.DataFrame]) -> Block:
    shares = energy_shares(tables)
    return picture(
        lambda width: figures.energy_shares(shares, width=width),
        key=f"energy-{slug_of(view)}",
        folded="Show each quadrant’s shares of the tokens, of Σ‖g‖² and of Σφ",
        caption=(
            "A quadrant whose filled marks lie right of its hollow one carries more gradient than"
            " its number of tokens. Shares of Σφ may be negative or above 100%, since φ has both"
            " signs."
        ),
        alt=(
            "Shares of tokens, squared gradient norm and alignment by quadrant; the tables below"
            " have the numbers."
        ),
    )


def _quadrant_block(view: RunView, loss: str, table: pl.DataFrame, *, folded: bool) -> Table:
    rewards = "positive_reward_alignment_share" in table.columns
    rows = []
    for row in table.iter_rows(named=True):
        cells: list[str | Tag | Measured] = [Tag(str(row["quadrant"])), percent(row["share"])]
        cells += [
            _with_interval(row, name, percent)
            for name in ("share_grad_norm_sq", "share_grad_dot_loss")
        ]
        cells += [
            _with_interval(row, name, number)
            for name in ("alignment_ratio", "median_oracle_weight_deconvolved")
        ]
        cells.append(_with_interval(row, "negative_alignment_share", percent))
        if rewards:
            cells.append(_with_interval(row, "positive_reward_alignment_share", percent))
        rows.append(cells)
    columns = ["quadrant", "tokens", "of Σ‖g‖²", "of Σφ", "Σφ / ΣM", "median φ/M", "φ < 0"]
    columns += ["raises the reward"] if rewards else []
    caption = (
        f"Gradients of the {measurement_words(view, loss)}: shares and ratios with 95% intervals."
        " The median of φ/M is corrected for probe noise."
    )
    opener = f"Show the {LOSS_NAMES.get(loss, loss)}" if folded else ""
    return Table(columns, rows, caption, frozenset(range(1, len(columns))), folded=opener)


def _correlation_block(view: RunView, loss: str) -> Table | Warnings:
    sample = view.sampled(view.measured(loss))
    num_resamples = min(100, view.options.num_resamples)
    try:
        parts = [_correlations(sample, num_resamples)]
        if "oracle_weight" in parts[0]["target"].to_list():
            parts.append(equation_6(sample, num_resamples=num_resamples))
    except SchemaError as error:
        return Warnings([f"Rank correlations cannot be made: {error}"])
    table = pl.concat(parts)
    rows = [_correlation_cells(row) for row in table.iter_rows(named=True)]
    caption = (
        f"Rank correlations over {plural(table['num_tokens'][0], 'token')} with gradients of the"
        f" {measurement_words(view, loss)}; 95% intervals from {table['num_resamples'][0]}"
        " resamples; "
        "the last column holds position and token frequency. The last row is Eq. 6."
    )
    return Table(
        ["of", "with", "Spearman", "without probe noise", "partial"],
        rows,
        caption,
        frozenset({2, 3, 4}),
        folded="Show the correlations",
    )


def _correlation_cells(row: dict[str, Any]) -> list[Any]:
    names = {"grad_norm": "‖g‖", "grad_dot_loss": "φ", "oracle_weight": "φ/M"}
    statistics = ("spearman", "spearman_deconvolved", "partial")
    measured = (_with_interval(row, name, number) for name in statistics)
    return [names.get(row["target"], row["target"]), row["predictor"], *measured]


def _correlations(tokens: pl.LazyFrame, num_resamples: int) -> pl.DataFrame:
    """With φ where it was measured, else of the norm alone."""
    targets = TARGETS if _measures_alignment(tokens) else ("grad_norm",)
    return correlation_table(tokens, targets=targets, num_resamples=num_resamples)


def _measures_alignment(tokens: pl.LazyFrame) -> bool:
    """Whether φ was measured: ∇L comes from other prompts, so one prompt alone has none."""
    return tokens.select(pl.col("grad_dot_loss").count()).collect().item() > 0


def _measured_words(table: pl.DataFrame, view: RunView) -> str:
    total = int(table["num_tokens"].sum())
    return (
        f"Gradients of {count(total)} tokens, {percent(total / view.population.num_tokens)} of the"
        f" run: {listed([measurement_words(view, loss) for loss in view.losses])}."
        f"{_other_words(view)} {view.interval_words()}"
    )


def _with_interval(row: dict[str, Any], name: str, show: Callable[[float | None], str]) -> Measured:
    value = row.get(name)
    if value is None:
        return Measured("–")
    return Measured(
        show(value),
        interval(row.get(f"{name}_low"), row.get(f"{name}_high"), as_share=show is percent),
    )
