import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_ablations

from tip_analysis.analysis.ablation_tables import final_arms
from tip_analysis.analysis.arms import (
    ALL,
    PAPER_ARMS,
    UNTRAINED,
    Arm,
    arm_results,
    arms_of,
    parse_arms,
    problem_rows,
    split_entry,
)
from tip_analysis.analysis.rules import RULES, register_rule
from tip_analysis.core.errors import OptionError, UnknownNameError


def test_rules_times_ratios_with_own_ratios_and_all_once():
    arms = parse_arms(["all", "entropy", "q3:0.2", "soft_or:0.5:0.1", "all", "entropy"], [0.5, 0.1])
    assert arms == [
        Arm("all"),
        Arm("entropy", 0.5),
        Arm("entropy", 0.1),
        Arm("q3", 0.2),
        Arm("soft_or", 0.5),
        Arm("soft_or", 0.1),
    ]
    assert [str(arm) for arm in arms[:2]] == ["all", "entropy:0.5"]
    assert len(parse_arms(PAPER_ARMS, [])) == 11


def test_arms_that_make_no_sense_are_refused():
    with pytest.raises(UnknownNameError, match="soft_or"):
        parse_arms(["softor"], [0.5])
    with pytest.raises(OptionError, match="needs a retention ratio"):
        parse_arms(["entropy"], [])
    with pytest.raises(OptionError, match=r"\(0, 1\]"):
        parse_arms(["entropy:1.5"], [])
    with pytest.raises(OptionError, match="expected retention ratios"):
        parse_arms(["entropy:half"], [])
    with pytest.raises(OptionError, match="at least one rule"):
        parse_arms([], [0.5])


def rows():
    def row(rule, ratio, seed, step, accuracy, **extra):
        return {
            "rule": rule,
            "retention_ratio": ratio,
            "mode": "on_policy",
            "seed": seed,
            "step": step,
            "accuracy": accuracy,
            "accuracy_se": 0.03 if seed else 0.04,
            "best_at_k": 1.0,
            "heldout_reverse_kl": 0.1 * (1 + seed),
            "tokens_trained": 10,
            "tokens_seen": 40,
            "train_loss": 0.5,
            "step_time_s": 1.0,
            "peak_memory_bytes": 100 + seed,
            "problem_ids": ["p", "q"],
            "problem_accuracy": [accuracy, 0.0],
            "problem_best": [1.0, 0.0],
        } | extra

    return pl.DataFrame(
        [
            row("q3", 0.1, 0, 5, 0.1),
            row("q3", 0.1, 0, 10, 0.6),
            row("q3", 0.1, 1, 10, 0.8),
            row("all", 1.0, 0, 10, 0.9),
            row(
                "untrained",
                1.0,
                0,
                0,
                0.95,
                tokens_trained=0,
                tokens_seen=0,
                train_loss=None,
                step_time_s=None,
            ),
        ]
    )


def test_results_by_hand():
    table = arm_results(rows())
    assert table["rule"].to_list() == ["untrained", "all", "q3"]
    q3 = table.row(2, named=True)
    assert q3["accuracy"] == pytest.approx(0.7)
    assert q3["accuracy_std"] == pytest.approx(0.2 / 2**0.5)
    assert q3["accuracy_se"] == pytest.approx((0.0025 / 2) ** 0.5)
    assert (q3["num_seeds"], q3["step"], q3["token_share"]) == (2, 10, 0.25)
    assert q3["heldout_reverse_kl"] == pytest.approx(0.15)
    assert q3["peak_memory_bytes"] == 101
    assert table.row(1, named=True)["accuracy_std"] is None
    assert table.row(0, named=True)["token_share"] is None
    assert arm_results(rows(), step=5)["accuracy"].to_list() == [0.1]


def test_problem_rows_and_arms():
    found = problem_rows(rows())
    assert found.height == 10
    assert found.filter(rule="q3", seed=1)["mean_reward"].to_list() == [0.8, 0.0]
    assert set(arms_of(rows())) == {Arm("q3", 0.1), Arm("all")}


@given(
    st.sampled_from(["q3", "soft_or", "random", "of_another_program"]),
    st.floats(0, 1, exclude_min=True),
)
def test_an_arm_has_one_spelling_which_is_read_back_exactly(rule: str, ratio: float) -> None:
    arm = Arm(rule, ratio)
    assert Arm.parse(str(arm)) == arm


def test_spellings_by_eye() -> None:
    assert [str(Arm(*key)) for key in (("q3", 0.1), ("q3", 1.0), ("all", 1.0))] == [
        "q3:0.1",
        "q3:1",
        "all",
    ]
    assert Arm.parse("untrained") == Arm(UNTRAINED)
    for text in ("q3", "q3:0.1:0.2", "all:0.5", "q3:much", "q3:2"):
        with pytest.raises(OptionError):
            Arm.parse(text)


@pytest.fixture
def colons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules whose names hold colons, one of them the beginning of another."""
    monkeypatch.setattr("tip_analysis.analysis.rules.RULES", dict(RULES))
    for name in ("quadrant", "quadrant:Q3", "not:Q4", "a:b:c"):
        register_rule(name, lambda columns: columns["student_entropy"], overwrite=True)


@pytest.mark.parametrize(
    ("text", "rule", "ratios"),
    [
        ("quadrant:Q3:0.5", "quadrant:Q3", ["0.5"]),
        ("quadrant:Q3", "quadrant:Q3", []),
        ("quadrant:0.5", "quadrant", ["0.5"]),
        ("not:Q4:0.5:0.1", "not:Q4", ["0.5", "0.1"]),
        ("a:b:c:1", "a:b:c", ["1"]),
        ("a:b:0.5", "a:b", ["0.5"]),  # no rule here: from elsewhere
        ("elsewhere:Q3:0.5", "elsewhere:Q3", ["0.5"]),
        ("elsewhere", "elsewhere", []),
        ("0.5", "0.5", []),
        ("q3:0.1:0.2", "q3", ["0.1", "0.2"]),
        ("q3:half", "q3", ["half"]),
    ],
)
@pytest.mark.usefixtures("colons")
def test_a_rule_is_found_before_its_ratios(text: str, rule: str, ratios: list[str]) -> None:
    assert split_entry(text) == (rule, ratios)


@pytest.mark.usefixtures("colons")
def test_arms_of_rules_with_colons_are_spelled_and_read_alike() -> None:
    arms = parse_arms(["quadrant:Q3:0.5", "not:Q4", "quadrant:0.5"], [0.25])
    assert arms == [Arm("quadrant:Q3", 0.5), Arm("not:Q4", 0.25), Arm("quadrant", 0.5)]
    assert [str(arm) for arm in arms] == ["quadrant:Q3:0.5", "not:Q4:0.25", "quadrant:0.5"]
    assert [Arm.parse(str(arm)) for arm in arms] == arms
    with pytest.raises(UnknownNameError, match="quadrant:Q3"):
        parse_arms(["quadrantQ3:0.5"], [])
    with pytest.raises(OptionError, match="after the rule's name"):
        parse_arms(["quadrant:Q5"], [])


_PARTS = st.text(st.characters(codec="utf-8", exclude_characters=":"), min_size=1).filter(
    lambda part: part.strip() == part
)


@given(st.lists(_PARTS, min_size=1, max_size=3), st.floats(0, 1, exclude_min=True))
def test_names_of_rules_that_are_not_known_here_are_read_back(
    parts: list[str], ratio: float
) -> None:
    arm = Arm(":".join(parts), ratio)
    try:
        float(parts[-1])
    except ValueError:
        assert Arm.parse(str(arm)) == arm


@pytest.mark.parametrize("name", ["", " q", "q ", ":", "q:", ":q", "q3:0.1", "1", "nan:Q3", "q::r"])
def test_no_rule_may_have_a_name_that_hides_its_ratio(name: str) -> None:
    with pytest.raises(OptionError, match="no part between colons is a number"):
        register_rule(name, lambda columns: columns["student_entropy"], overwrite=True)


def test_rows_of_an_arm_are_those_of_exactly_its_ratio() -> None:
    table = pl.DataFrame(
        {"rule": ["q3", "q3", "all", "random"], "retention_ratio": [0.3, 0.1 * 3, 1.0, 0.3]}
    )
    assert table.filter(Arm("q3", 0.3).rows()).rows() == [("q3", 0.3)]
    assert table.filter(Arm("q3", 0.1 * 3).rows()).height == 1
    assert table.filter(ALL.rows()).height == 1


def test_arms_with_a_loss_or_weighting_of_their_own_have_one_spelling() -> None:
    arms = parse_arms(
        ["all,loss=k1", "soft_or:0.5:0.2,loss=k1,weighting=q3", "quadrant:Q3:1", "all"], []
    )
    assert [str(arm) for arm in arms] == [
        "all,loss=k1",
        "soft_or:0.5,weighting=q3,loss=k1",
        "soft_or:0.2,weighting=q3,loss=k1",
        "quadrant:Q3:1",
        "all",
    ]
    assert [Arm.parse(str(arm)) for arm in arms] == arms
    assert arms[1].base_rule == "soft_or"
    assert arms[1].changes == {"weighting": "q3", "loss": "k1"}
    assert (arms[0].has_ratio, arms[1].has_ratio, arms[-1].changes) == (False, True, {})
    for text in ("all,loss", "all,rate=1", "all,loss=k1,loss=k2", "all,"):
        with pytest.raises(OptionError, match=r"weighting=… or loss=…"):
            parse_arms([text], [])
    with pytest.raises(UnknownNameError, match="training loss 'k9'"):
        parse_arms(["all,loss=k9"], [])
    with pytest.raises(UnknownNameError, match="weighting 'softor'"):
        parse_arms(["all,weighting=softor"], [])


def test_arms_of_their_own_are_compared_whatever_the_study_took() -> None:
    table = make_ablations()
    own = table.filter(rule="q3").with_columns(
        rule=pl.lit("q3,loss=k1"), loss=pl.lit("k1", table.schema["loss"])
    )
    other = table.filter(rule="random").with_columns(loss=pl.lit("jsd", table.schema["loss"]))
    found = final_arms(pl.concat([table.filter(pl.col("rule") != "random"), own, other]))
    assert "q3,loss=k1" in found["rule"]
    assert "random" not in found["rule"], "it was trained on another loss than the others"
    alone = final_arms(own)
    assert set(alone["rule"]) == {"q3,loss=k1"}
