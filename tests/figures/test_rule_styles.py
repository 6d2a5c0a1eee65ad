"""One look per rule in every figure, none of a quadrant's colours; references where they are
ones."""

import polars as pl
import pytest
from matplotlib.colors import to_hex, to_rgb

from tip_analysis import figures
from tip_analysis.analysis.rules import RULES
from tip_analysis.figures.ablations import OURS, VERDICT_COLORS
from tip_analysis.figures.rule_styles import rule_style


def _coverage(rules, column):
    rows = [(rule, ratio, ratio, None, None, column) for rule in rules for ratio in (0.1, 0.5)]
    names = ["rule", "retention_ratio", "share", "share_low", "share_high", "column"]
    numbers = {"share_low": pl.Float64, "share_high": pl.Float64}
    return pl.DataFrame(rows, schema=names, schema_overrides=numbers, orient="row")


def _labels(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()}


def _colors(figure):
    handles = figure.legends[0].legend_handles
    return {handle.get_label(): to_hex(handle.get_color()) for handle in handles}


@pytest.mark.parametrize("others", [["entropy", "mine"], ["divergence", "soft_or", "yours"]])
def test_a_rule_keeps_its_colour_whatever_stands_beside_it(others):
    table = _coverage(["q3", *others], "reverse_kl")
    covered = _colors(figures.coverage_curve(table, label="Σ"))
    arms = table.with_columns(accuracy="share", low="share_low", high="share_high")
    trained = _colors(figures.accuracy_by_ratio(arms))
    alone = _colors(figures.coverage_curve(_coverage(["q3"], "reverse_kl"), label="Σ"))
    assert covered == trained
    assert covered["q3"] == alone["q3"]


def test_no_rule_and_no_verdict_has_a_quadrants_colour():
    quadrants = [to_rgb(color) for color in figures.QUADRANT_COLORS.values()]
    used = {rule_style(name)["color"] for name in [*RULES, *(f"user-{i}" for i in range(50))]}
    for color in [*used, *VERDICT_COLORS.values(), OURS]:
        near = min(
            sum((a - b) ** 2 for a, b in zip(to_rgb(color), other, strict=True))
            for other in quadrants
        )
        assert near > 0.02, color


def test_built_in_rules_differ_in_colour_or_mark():
    looks = [tuple(rule_style(name).values()) for name in RULES]
    assert len(set(looks)) == len(RULES)


def test_the_oracle_of_alignment_is_a_reference_for_the_sum_of_alignment_alone():
    rules = ["random", "gradient_oracle", "q3"]
    phi = _labels(figures.coverage_curve(_coverage(rules, "grad_dot_loss"), label="Σφ"))
    kl = _labels(figures.coverage_curve(_coverage(rules, "reverse_kl"), label="Σ reverse KL"))
    assert phi == {"random (lower reference)", "gradient_oracle (upper reference)", "q3"}
    assert kl == {"random (lower reference)", "gradient_oracle", "q3"}
