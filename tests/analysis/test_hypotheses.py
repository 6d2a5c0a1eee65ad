"""Registered hypotheses: files that are refused, and verdicts under correction."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats
from synthetic import make_ablations, make_tables, write_ablations, write_run

from tip_analysis.analysis.hypotheses import (
    OverPrompts,
    OverSeeds,
    _levels,
    judge_difference,
    judge_hypotheses,
)
from tip_analysis.analysis.registrations import Hypothesis, Registration, read_hypotheses
from tip_analysis.core import result_tables as contracts
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.names import Correction
from tip_analysis.core.result_tables import checked
from tip_analysis.core.run_folder import create_run

GOOD = """
[[claim]]
name = "a"
arms = ["soft_or:0.5", "soft_or_bottom:0.5"]
figure = "accuracy"
direction = ">"
margin = 0.1
[[claim]]
name = "b"
groups = ["Q3", "Q4"]
figure = "reverse_kl"
direction = ">"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "claims.toml"
    path.write_text(text, "utf-8")
    return path


def test_a_file_is_read(tmp_path) -> None:
    found = read_hypotheses(written(tmp_path, 'run = "demo"\n' + GOOD))
    assert found.correction is Correction.HOLM
    assert found.confidence == 0.95
    assert found.run == tmp_path / "demo"
    first, second = found.claims
    assert first == Hypothesis("a", "soft_or:0.5", "soft_or_bottom:0.5", "accuracy", ">", 0.1)
    assert (second.grouping, second.first, second.second) == ("quadrant", "Q3", "Q4")


BAD = [
    ("", "claim: expected 1 to 1,000 tables"),
    ("claim = 3", "claim: expected 1 to 1,000 tables [[claim]], found 3"),
    ("[[claim]", "no TOML"),
    ("x = 1\n" + GOOD, "x: there is no such key"),
    (GOOD.replace('name = "a"', "name = 7"), "claim[0].name: expected a text"),
    (GOOD.replace('name = "b"', 'name = "a"'), "claim[1].name: expected a name of its own"),
    (GOOD.replace('">"\nmargin', '"≥"\nmargin'), "claim[0].direction: expected > or < or ≈"),
    (GOOD.replace("0.1", "nan"), "claim[0].margin: expected a number from 0 to 1e+06"),
    (GOOD.replace("0.1", "true"), "claim[0].margin: expected a number"),
    (GOOD.replace("0.1", "-0.1"), "claim[0].margin: expected a number"),
    (GOOD.replace('"accuracy"', '"speed"'), "claim[0].figure: expected accuracy"),
    (GOOD.replace('"soft_or:0.5"', '"soft_or"'), "claim[0].arms[0]: expected an arm"),
    (GOOD.replace('"soft_or:0.5"', '"soft_or:1.5"'), "claim[0].arms[0]:"),
    (GOOD.replace('["Q3", "Q4"]', '["Q3", "Q5"]'), "claim[1].groups[1]: expected a group of"),
    (GOOD.replace('["Q3", "Q4"]', '["Q3"]'), "claim[1].groups: expected two texts"),
    (GOOD.replace('["Q3", "Q4"]', '["Q3", "Q3"]'), "claim[1].groups: expected two different ones"),
    (GOOD + 'grouping = "colour"', "claim[1].grouping: expected quadrant, position"),
    (GOOD + 'arms = ["all", "q3:0.1"]', "claim[1]: expected either arms or groups"),
    (GOOD + 'benchmark = "x"', "claim[1].benchmark: there is no such key"),
    (GOOD.replace('direction = ">"\nmargin = 0.1', 'direction = "≈"'), "claim[0].margin: expected"),
    ('correction = "none"\n' + GOOD, "correction: expected holm or bonferroni, found 'none'"),
    ("confidence = 2\n" + GOOD, "confidence: expected a number from 0.5 to 0.9999"),
    ("claim = [3]", "claim[0]: expected a table, found 3"),
    ('"\\u001b[31m" = 1\n' + GOOD, "there is no such key"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_is_wrong_is_said_in_one_line_with_its_place(tmp_path, text, message) -> None:
    with pytest.raises(OptionError) as raised:
        read_hypotheses(written(tmp_path, text))
    said = str(raised.value)
    assert message in said
    assert "\n" not in said
    assert "\x1b" not in said
    assert len(said) < 400 + len(str(tmp_path))


def test_hostile_files(tmp_path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_hypotheses(tmp_path / "missing.toml")
    with pytest.raises(OptionError, match="cannot be read"):
        read_hypotheses(tmp_path)
    bytes_path = tmp_path / "bytes.toml"
    bytes_path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="no TOML"):
        read_hypotheses(bytes_path)
    with pytest.raises(OptionError, match="no TOML"):
        read_hypotheses(written(tmp_path, "a = " + "[" * 100_000))
    with pytest.raises(OptionError, match="at most 1,000,000 bytes"):
        read_hypotheses(written(tmp_path, "#" * 1_000_001))


@pytest.mark.parametrize(
    ("direction", "low", "high", "verdict"),
    [
        (">", 0.03, 0.1, "supported"),
        (">", 0.01, 0.1, "not resolved"),
        (">", -0.1, 0.01, "contradicted"),
        ("<", -0.1, -0.03, "supported"),
        ("<", -0.01, 0.1, "contradicted"),
        ("≈", -0.02, 0.02, "supported"),
        ("≈", -0.03, 0.01, "not resolved"),
        ("≈", 0.021, 0.05, "contradicted"),
        (">", float("nan"), float("nan"), "not resolved"),
    ],
)
def test_what_an_interval_says(direction, low, high, verdict) -> None:
    assert judge_difference(direction, 0.02, low, high) == verdict


def claim(name: str) -> Hypothesis:
    return Hypothesis(name, "a", "b", "accuracy", ">")


def over_seeds(t: float, size: int = 10) -> OverSeeds:
    """Differences with a given t statistic."""
    base = np.linspace(-1, 1, size)
    base = base / (base.std(ddof=1) / np.sqrt(size))
    return OverSeeds(base + t)


def test_holm_steps_down_and_stops() -> None:
    """Of p-values 0.004, 0.02, 0.03 and 0.2 at m = 4, Holm rejects the first only (0.02 > 0.05/3),
    of 0.004, 0.016, 0.024, 0.2 the first three."""
    for p_values, expected in (((0.004, 0.02, 0.03, 0.2), 1), ((0.004, 0.016, 0.024, 0.2), 3)):
        estimates = [over_seeds(float(stats.t.isf(p / 2, 9))) for p in p_values]
        registered = Registration(tuple(map(claim, "abcd")))
        levels = _levels(registered, estimates[::-1])[::-1]
        assert [level.verdict for level in levels] == ["supported"] * expected + [
            "not resolved"
        ] * (4 - expected)
        single = Registration(tuple(map(claim, "abcd")), Correction.BONFERRONI)
        assert [level.verdict for level in _levels(single, estimates)] == [
            "supported" if p < 0.0125 else "not resolved" for p in p_values
        ]


def test_what_was_not_run_counts_as_tested() -> None:
    strong = over_seeds(float(stats.t.isf(0.02, 9)))  # p = 0.04
    alone = Registration((claim("a"),))
    assert _levels(alone, [strong])[0].verdict == "supported"
    two = Registration((claim("a"), claim("b")))
    assert _levels(two, [strong, None])[0].verdict == "not resolved"


@pytest.mark.slow
@pytest.mark.parametrize("correction", list(Correction))
def test_the_error_rate_of_all_claims_together_holds(correction) -> None:
    rng, wrong = np.random.default_rng(0), 0
    registered = Registration(tuple(map(claim, "abcdef")), correction)
    for _ in range(300):
        estimates = [OverSeeds(rng.normal(size=6)) for _ in range(6)]
        wrong += any(level.verdict != "not resolved" for level in _levels(registered, estimates))
    assert wrong <= 24  # 5 % of 300 and two standard errors


def test_intervals_at_any_level() -> None:
    rng = np.random.default_rng(0)
    replicates = rng.normal(size=20_000)
    wide = OverPrompts(0.0, replicates, 200).interval(0.99)
    narrow = OverPrompts(0.0, replicates, 200).interval(0.8)
    assert wide[0] < narrow[0] < 0 < narrow[1] < wide[1]
    assert narrow[1] == pytest.approx(1.28, abs=0.05)
    assert np.isnan(OverPrompts(0.0, replicates, 1).interval(0.95)).all()
    found = over_seeds(2.0).interval(0.95)
    assert found[0] == pytest.approx(2.0 - stats.t.ppf(0.975, 9))
    assert np.isnan(OverSeeds(np.array([1.0])).interval(0.95)).all()


def test_true_and_false_claims_about_arms_and_groups(tmp_path) -> None:
    tables = make_tables(num_prompts=16)
    folder = write_run(tmp_path / "run", tables)
    write_ablations(folder, make_ablations(seeds=5, problems=200))
    text = (
        GOOD
        + """
[[claim]]
name = "wrong way"
arms = ["soft_or_bottom:0.5", "all"]
figure = "accuracy"
direction = ">"
[[claim]]
name = "absent"
arms = ["jsd:0.5", "all"]
figure = "accuracy"
direction = ">"
[[claim]]
name = "rewards"
groups = ["correct", "incorrect"]
grouping = "correct"
figure = "student_entropy"
direction = "≈"
margin = 0.001
"""
    )
    table = checked(
        judge_hypotheses(folder, read_hypotheses(written(tmp_path, text)), num_resamples=400),
        contracts.HypothesisTable,
    )
    verdicts = dict(table.select("claim", "verdict").iter_rows())
    assert verdicts["a"] == "supported"
    assert verdicts["b"] == "supported"
    assert verdicts["wrong way"] == "contradicted"
    assert verdicts["absent"] == "not run"
    assert verdicts["rewards"] == "not resolved"
    row = table.filter(claim="b").row(0, named=True)
    placed = tables.tokens.filter("loss_mask")
    assert row["difference"] > 0
    assert row["size"] == placed["prompt_id"].n_unique()
    assert (table["confidence"] >= 0.95).all()


def test_a_figure_that_is_no_number_is_refused(tmp_path) -> None:
    folder = write_run(tmp_path / "run", make_tables(num_prompts=3))
    text = GOOD.replace('"reverse_kl"', '"token"')
    with pytest.raises(SchemaError, match="claim 'b': 'token' is no number"):
        judge_hypotheses(folder, read_hypotheses(written(tmp_path, text)))


def test_several_benchmarks_need_a_name(tmp_path) -> None:
    folder = write_run(tmp_path / "run", make_tables(num_prompts=3))
    two = [make_ablations(benchmark=name).with_columns(arm_key=pl.col("arm_key") + name)
           for name in ("easy", "hard")]  # fmt: skip
    write_ablations(folder, pl.concat(two))
    with pytest.raises(OptionError, match="name one with `benchmark`"):
        judge_hypotheses(folder, read_hypotheses(written(tmp_path, GOOD)), num_resamples=50)
    named = GOOD.replace("margin = 0.1", 'margin = 0.1\nbenchmark = "hard"')
    found = judge_hypotheses(folder, read_hypotheses(written(tmp_path, named)), num_resamples=50)
    assert found["verdict"][0] == "supported"
    assert create_run(folder).has("ablations")
