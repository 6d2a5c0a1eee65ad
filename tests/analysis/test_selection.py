"""Selection: exact k, ties, scopes, nesting, sampling, the registry and its errors."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import token_frames

from tip_analysis.analysis import counter_random, rules
from tip_analysis.analysis.arms import Arm
from tip_analysis.analysis.counter_random import random_exponentials
from tip_analysis.analysis.retention import exact_ratio, num_selected
from tip_analysis.analysis.rule_kind import columns_read
from tip_analysis.analysis.rules import RULES, register_rule, rule_names
from tip_analysis.analysis.score_functions import TokenColumns
from tip_analysis.analysis.scores import add_scores, resolve_normalization
from tip_analysis.analysis.selection import masks_by_part, select_tokens, to_masks
from tip_analysis.core.errors import OptionError, RuleError, SchemaError, UnknownNameError
from tip_analysis.core.schema import MaskTable

COMPLETE = [name for name, rule in RULES.items() if rule.complete]
BY_SCORE = [name for name in COMPLETE if not RULES[name].window]
RATIOS = ["0.1", "0.2", "0.3", "0.5", "0.7", "1"]
SCOPES = {"rollout": "rollout_id", "batch": "batch_id", "run": None}


@pytest.fixture(autouse=True)
def registry():
    """Leave the registry as it was found."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def frame(**columns: list) -> pl.DataFrame:
    size = len(next(iter(columns.values())))
    defaults = {
        "rollout_id": ["a/0"] * size,
        "batch_id": [0] * size,
        "loss_mask": [True] * size,
        "position": list(range(size)),
    }
    return pl.DataFrame({**defaults, **columns})


def selected(table: pl.LazyFrame) -> set[tuple[str, int]]:
    return set(table.filter("selected").select("rollout_id", "position").collect().iter_rows())


def oracle_score(rule: str, row: dict, seed: int) -> float:
    """The order of section 5, larger first, typed again per rule."""
    h, jsd = row["student_entropy_norm"], row["jsd"]
    scores = {
        "all": 1.0,
        "random": 1.0,
        "entropy": h,
        "entropy_sampling": h,
        "soft_or": row["soft_or"],
        "soft_or_bottom": -row["soft_or"],
        "q3": row["q3_score"],
        "divergence": row["reverse_kl"],
        "forward_kl": row["forward_kl"],
        "jsd": jsd,
        "hellinger": row["hellinger"],
        "entropy_jsd_sampling": h * (jsd / math.log(2.0)),
        "position": -row["position"],
        "last": row["position"],
        "soft_or_product": row["entropy_hat"] * row["divergence_hat"],
        "soft_or_max": max(row["entropy_hat"], row["divergence_hat"]),
        "soft_or_sum": row["entropy_hat"] + row["divergence_hat"],
        "soft_or_forward": 1.0 - (1.0 - row["entropy_hat"]) * (1.0 - row["forward_hat"]),
        "teacher_entropy": row["teacher_entropy"],
    }
    if rule == "teachability":
        mass = row["teacher_mass_on_student_topk"]
        return 0.0 if mass == 0.0 else row["reverse_kl"] * mass
    score = scores[rule]
    if rule not in ("random", "entropy_sampling", "entropy_jsd_sampling"):
        return score
    return (
        -reference.random_exponential(seed, row["rollout_id"], row["position"]) / score
        if score > 0
        else -math.inf
    )


@settings(deadline=None, max_examples=100)
@given(
    token_frames(),
    st.sampled_from(BY_SCORE),
    st.sampled_from(RATIOS),
    st.sampled_from(list(SCOPES)),
    st.integers(0, 3),
)
def test_masks_equal_the_oracle(
    tokens: pl.DataFrame, rule: str, ratio: str, scope: str, seed: int
) -> None:
    scored = add_scores(tokens).collect()
    found = select_tokens(
        scored, rule=rule, retention_ratio=float(ratio), selection_scope=scope, seed=seed
    )
    written = scored.filter("loss_mask")
    expected: set[tuple[str, int]] = set()
    for group in [written] if SCOPES[scope] is None else written.partition_by(SCOPES[scope]):
        rows = [
            (oracle_score(rule, row, seed), row["position"], row["rollout_id"])
            for row in group.iter_rows(named=True)
        ]
        expected |= reference.top_k(
            rows, len(rows) if rule == "all" else reference.num_kept(ratio, len(rows))
        )
    assert selected(found) == expected


@settings(deadline=None, max_examples=40)
@given(
    token_frames(),
    st.sampled_from(COMPLETE),
    st.sampled_from(list(SCOPES)),
    st.randoms(use_true_random=False),
)
def test_masks_do_not_depend_on_row_order_and_rows_keep_theirs(
    tokens: pl.DataFrame, rule: str, scope: str, random
) -> None:
    scored = add_scores(tokens).collect()
    order = list(range(tokens.height))
    random.shuffle(order)
    options = {"rule": rule, "retention_ratio": 0.3, "selection_scope": scope, "seed": 5}
    plain = select_tokens(scored, **options).collect()
    shuffled = select_tokens(scored[order], **options).collect()
    assert shuffled.equals(plain[order])
    assert plain.drop("selected").equals(scored)
    assert not plain.filter(~pl.col("loss_mask"))["selected"].any()


@settings(deadline=None, max_examples=40)
@given(token_frames(), st.sampled_from(COMPLETE), st.sampled_from(list(SCOPES)))
def test_masks_are_nested_in_the_ratio(tokens: pl.DataFrame, rule: str, scope: str) -> None:
    scored = add_scores(tokens).collect()
    masks = [
        selected(select_tokens(scored, rule=rule, retention_ratio=ratio, selection_scope=scope))
        for ratio in (0.1, 0.35, 0.6, 1.0)
    ]
    assert masks[0] <= masks[1] <= masks[2] <= masks[3]
    assert len(masks[3]) == tokens["loss_mask"].sum()


@settings(deadline=None, max_examples=20)
@given(token_frames(), st.sampled_from(COMPLETE))
def test_a_rollout_does_not_depend_on_the_others(tokens: pl.DataFrame, rule: str) -> None:
    scored = add_scores(tokens).collect()
    alone = scored.filter(pl.col("rollout_id") == scored["rollout_id"][0])
    options = {"rule": rule, "retention_ratio": 0.4, "seed": 1}
    together = {
        key
        for key in selected(select_tokens(scored, **options))
        if key[0] == alone["rollout_id"][0]
    }
    assert together == selected(select_tokens(alone, **options))


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([f"0.{i:02d}" for i in range(1, 100)] + ["1", "0.005", "0.125"]),
    st.integers(1, 100_000_000),
)
def test_k_is_exact_in_decimals(ratio: str, num_tokens: int) -> None:
    assert num_selected(num_tokens, float(ratio)) == reference.num_kept(ratio, num_tokens)


def test_k_by_eye() -> None:
    assert [num_selected(m, 0.1) for m in (1, 9, 10, 19, 20, 30)] == [1, 1, 1, 1, 2, 3]
    assert num_selected(30, 0.7) == 21
    assert num_selected(100, 0.29) == 29  # 0.29 · 100 is 28.999999999999996 in floats
    assert num_selected(30, 1 / 3) == 10
    assert num_selected(0, 0.5) == 0
    assert exact_ratio(1.0) == 1


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_ratios_out_of_range_are_refused(ratio: float) -> None:
    with pytest.raises(OptionError, match="retention_ratio must lie in"):
        select_tokens(frame(jsd=[0.1]), rule="jsd", retention_ratio=ratio)
    with pytest.raises(OptionError, match="retention_ratio must lie in"):
        select_tokens(frame(jsd=[0.1]), rule="all", retention_ratio=ratio)


def test_a_case_to_check_by_eye() -> None:
    tokens = frame(jsd=[0.2, 0.5, 0.5, 0.1, 0.5, 0.0, 0.3, 0.0, 0.0, 0.0])
    assert selected(select_tokens(tokens, rule="jsd", retention_ratio=0.2)) == {
        ("a/0", 1),
        ("a/0", 2),
    }
    assert selected(select_tokens(tokens, rule="position", retention_ratio=0.3)) == {
        ("a/0", 0),
        ("a/0", 1),
        ("a/0", 2),
    }
    assert selected(select_tokens(tokens, rule="all", retention_ratio=0.1)) == {
        ("a/0", place) for place in range(10)
    }


def test_ties_across_rollouts_go_to_the_earlier_position_then_the_smaller_id() -> None:
    tokens = frame(jsd=[0.5] * 6, rollout_id=["b"] * 3 + ["a"] * 3, position=[0, 1, 2] * 2)
    chosen = select_tokens(tokens, rule="jsd", retention_ratio=0.5, selection_scope="run")
    assert selected(chosen) == {("a", 0), ("b", 0), ("a", 1)}


def test_negative_zero_ties_with_zero() -> None:
    tokens = frame(jsd=[-0.0, 0.0, -0.0])
    assert selected(select_tokens(tokens, rule="jsd", retention_ratio=0.34)) == {("a/0", 0)}


def test_a_weight_of_negative_zero_is_a_weight_of_zero() -> None:
    register_rule("signed", lambda df: -df["jsd"], sampled=True)
    tokens = frame(jsd=[0.0, 0.0, -0.5])
    assert selected(select_tokens(tokens, rule="signed", retention_ratio=0.34)) == {("a/0", 2)}


def test_random_numbers_are_pinned_and_equal_the_integer_oracle() -> None:
    ids, places = ["a/0", "a/0", "ü/1", "a/0"], [0, 1, 0, 2**31 - 1]
    for seed in (0, 1, -3, 2**63):
        found = random_exponentials(pl.Series(ids), pl.Series(places, dtype=pl.Int32), seed)
        wanted = [
            reference.random_exponential(seed, name, place)
            for name, place in zip(ids, places, strict=True)
        ]
        assert found == pytest.approx(wanted, rel=1e-15)
    pinned = random_exponentials(pl.Series(["a/0", "a/0"]), pl.Series([0, 1], dtype=pl.Int32), 0)
    assert [value.hex() for value in pinned.tolist()] == [
        "0x1.8991da6483840p-2",
        "0x1.37a481f632729p-1",
    ]


def test_random_numbers_are_exponential_and_independent_of_the_rollout() -> None:
    ids = pl.Series([f"p{i}/0" for i in range(200) for _ in range(100)])
    places = pl.Series(list(range(100)) * 200, dtype=pl.Int32)
    values = random_exponentials(ids, places, 0)
    assert stats.kstest(values, "expon").pvalue > 1e-3
    table = values.reshape(200, 100)
    other = random_exponentials(ids, places, 1).reshape(200, 100)
    for a, b in ((table[:, 0], table[:, 1]), (table[0], table[1]), (table.ravel(), other.ravel())):
        assert abs(stats.spearmanr(a, b).statistic) < 4 / math.sqrt(len(a))


def test_the_logarithm_is_accurate_to_its_last_bits() -> None:
    u = np.concatenate(
        [np.random.default_rng(0).random(100_000), [2.0**-54, 0.5, 1 - 2.0**-53, math.sqrt(0.5)]]
    )
    assert counter_random._negative_log(u) == pytest.approx(-np.log(u), rel=5e-16)


def test_sampling_frequencies_follow_the_weights() -> None:
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    names = [f"r{i}" for i in range(4000)]
    tokens = frame(
        student_entropy_norm=np.tile(weights, 4000).tolist(),
        rollout_id=[name for name in names for _ in range(4)],
        position=[0, 1, 2, 3] * 4000,
    )
    one = select_tokens(tokens, rule="entropy_sampling", retention_ratio=0.25).collect()
    counts = one.filter("selected").group_by("position").len().sort("position")["len"].to_numpy()
    assert stats.chisquare(counts, weights * 4000).pvalue > 1e-3
    two = select_tokens(tokens, rule="entropy_sampling", retention_ratio=0.5).collect()
    share = (
        two.filter("selected").group_by("position").len().sort("position")["len"].to_numpy() / 4000
    )
    pairs = [
        weights[i] * weights[j] / (1 - weights[i]) for i in range(4) for j in range(4) if i != j
    ]
    assert sum(pairs) == pytest.approx(1.0)
    expected = [
        weights[i] + sum(weights[j] * weights[i] / (1 - weights[j]) for j in range(4) if j != i)
        for i in range(4)
    ]  # first or second draw, without replacement
    assert share == pytest.approx(expected, abs=0.03)


def test_zero_weights_fill_by_position() -> None:
    tokens = frame(student_entropy_norm=[0.0, 0.0, 0.0, 1.0, 0.0])
    chosen = select_tokens(tokens, rule="entropy_sampling", retention_ratio=0.6)
    assert selected(chosen) == {("a/0", 3), ("a/0", 0), ("a/0", 1)}


def test_seeds_differ_and_another_process_agrees(tmp_path: Path) -> None:
    tokens = frame(jsd=[0.1] * 200)
    masks = [
        selected(select_tokens(tokens, rule="random", retention_ratio=0.5, seed=seed))
        for seed in (0, 1)
    ]
    assert masks[0] != masks[1]
    assert 25 < len(masks[0] & masks[1]) < 75  # 50 expected
    tokens.write_parquet(tmp_path / "tokens.parquet")
    code = (
        "import sys, polars as pl; from tip_analysis.analysis.selection import select_tokens\ntable"
        " = select_tokens(pl.scan_parquet(sys.argv[1]), rule='random', retention_ratio=0.5,"
        " seed=0)\nprint(*table.filter('selected').collect()['position'])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokens.parquet")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {("a/0", int(place)) for place in output.stdout.split()} == masks[0]


def test_masks_of_a_table(tmp_path: Path) -> None:
    scored = add_scores(_scorable(12))
    masks = to_masks(
        scored, rules=["all", "random", "soft_or"], retention_ratios=[0.25, 0.5], seeds=[0, 1]
    )
    counts = (
        masks.group_by("rule", "retention_ratio", "seed")
        .len()
        .sort("rule", "retention_ratio", "seed")
        .rows()
    )
    assert counts == [
        ("all", 1.0, 0, 12),
        ("random", 0.25, 0, 3),
        ("random", 0.25, 1, 3),
        ("random", 0.5, 0, 6),
        ("random", 0.5, 1, 6),
        ("soft_or", 0.25, 0, 3),
        ("soft_or", 0.5, 0, 6),
    ]
    MaskTable.validate(masks)
    with pytest.raises(OptionError, match="no mask was asked for"):
        to_masks(scored, rules=[], retention_ratios=[0.5])


def test_masks_part_by_part_are_those_of_the_whole() -> None:
    tokens = pl.concat(
        [
            _scorable(9).with_columns(rollout_id=pl.lit(f"p{i}/0"), jsd=pl.col("jsd") * (i + 1))
            for i in range(4)
        ]
    )
    bounds = resolve_normalization(tokens)
    options = {"rules": ["random", "q3"], "retention_ratios": [0.3], "seeds": [0, 1]}
    whole = to_masks(add_scores(tokens), **options)
    shards = [add_scores(part, normalization=bounds) for part in (tokens[:18], tokens[18:])]
    parts = pl.concat(masks_by_part(shards, **options))
    keys = ["rule", "seed", "rollout_id", "position"]
    assert parts.sort(keys).equals(whole.sort(keys))


def _scorable(size: int) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    columns = {
        name: rng.random(size)
        for name in ("student_entropy_norm", "reverse_kl", "forward_kl", "jsd")
    }
    return frame(**columns).with_columns(
        pl.col("batch_id").cast(pl.Int32), pl.col("position").cast(pl.Int32)
    )


def test_rules_of_ones_own() -> None:
    tokens = frame(jsd=[0.3, 0.2, 0.1, 0.0], token=["a", "b", "c", "d"])
    register_rule("mine", lambda df: df["jsd"] * df["position"])
    register_rule(
        "values", lambda df: np.where(df["token"].to_numpy() == "d", 1.0, 0.0), values=True
    )
    register_rule("expression", lambda df: pl.col("position"))
    register_rule(
        "first_or_last",
        lambda df: [float(place in (0, 3)) for place in df["position"]],
        values=True,
    )
    register_rule("weights", lambda df: df["jsd"], sampled=True, description="by JSD")
    assert selected(select_tokens(tokens, rule="mine", retention_ratio=0.25)) == {("a/0", 1)}
    assert selected(select_tokens(tokens, rule="values", retention_ratio=0.25)) == {("a/0", 3)}
    assert selected(select_tokens(tokens, rule="expression", retention_ratio=0.25)) == {("a/0", 3)}
    assert selected(select_tokens(tokens, rule="first_or_last", retention_ratio=0.5)) == {
        ("a/0", 0),
        ("a/0", 3),
    }
    assert len(selected(select_tokens(tokens, rule="weights", retention_ratio=0.5))) == 2
    assert RULES["weights"].description == "by JSD"
    assert "mine" in rule_names()


def test_entry_points_bring_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "from_elsewhere"

        def load(self):
            return lambda df: df["position"]

    monkeypatch.setattr(
        rules, "entry_points", lambda group: [Entry()] if group == "tip_analysis.rules" else []
    )
    rules._load_entry_points.cache_clear()
    assert "from_elsewhere" in rule_names()
    assert selected(
        select_tokens(frame(jsd=[1.0, 2.0]), rule="from_elsewhere", retention_ratio=0.5)
    ) == {("a/0", 1)}
    rules._load_entry_points.cache_clear()


def test_rules_that_cannot_be_used_say_why() -> None:
    tokens = frame(jsd=[0.3, 0.2])
    with pytest.raises(UnknownNameError, match="did you mean 'soft_or'"):
        select_tokens(tokens, rule="softor", retention_ratio=0.5)
    with pytest.raises(SchemaError, match=r"gradient_oracle.*gradients stage"):
        select_tokens(tokens, rule="gradient_oracle", retention_ratio=0.5)
    with pytest.raises(SchemaError, match="add_scores adds it"):
        select_tokens(tokens, rule="soft_or", retention_ratio=0.5)
    partly = tokens.with_columns(grad_dot_loss=pl.Series([1.0, None]))
    with pytest.raises(SchemaError, match=r"1 of 2, in 1 rollout\(s\), have none"):
        select_tokens(partly, rule="gradient_oracle", retention_ratio=0.5)
    with pytest.raises(UnknownNameError, match="valid names: rollout, batch, run"):
        select_tokens(tokens, rule="jsd", retention_ratio=0.5, selection_scope="prompt")
    with pytest.raises(OptionError, match="there is a rule 'jsd' already"):
        register_rule("jsd", lambda df: df["jsd"])
    with pytest.raises(OptionError, match="needs a name"):
        register_rule(" ", lambda df: df["jsd"])
    register_rule("negative", lambda df: df["jsd"] - 1.0, sampled=True)
    with pytest.raises(OptionError, match="weight ≥ 0; 2 are negative"):
        select_tokens(tokens, rule="negative", retention_ratio=0.5)
    register_rule("short", lambda df: [1.0 for _ in range(len(df) - 1)], values=True)
    with pytest.raises(SchemaError, match="one score a token"):
        select_tokens(tokens, rule="short", retention_ratio=0.5)


def test_masked_rows_do_not_count_towards_m() -> None:
    tokens = frame(jsd=[0.9, 0.1, 0.2, None], loss_mask=[True, True, True, False])
    assert selected(select_tokens(tokens, rule="jsd", retention_ratio=0.5)) == {("a/0", 0)}


def test_the_gradient_oracle_takes_the_largest_alignment() -> None:
    tokens = frame(grad_dot_loss=[-5.0, 1.0, 2.0, 0.0])
    assert selected(select_tokens(tokens, rule="gradient_oracle", retention_ratio=0.5)) == {
        ("a/0", 1),
        ("a/0", 2),
    }


def test_a_users_rule_is_called_once_and_given_what_it_declared() -> None:
    tokens = frame(jsd=[0.3, 0.2, 0.1, 0.0])
    seen: list[object] = []

    def by_expression(columns):
        seen.append(columns)
        return columns["jsd"]

    def by_values(table):
        seen.append(table)
        return table["jsd"].to_numpy()

    register_rule("by_expression", by_expression)
    register_rule("by_values", by_values, values=True)
    for name in ("by_expression", "by_values"):
        assert selected(select_tokens(tokens, rule=name, retention_ratio=0.25)) == {("a/0", 0)}
    assert [type(given) for given in seen] == [TokenColumns, pl.DataFrame]
    seen.clear()
    scored = _scorable(4)
    register_rule("weights", by_expression, sampled=True)
    to_masks(scored, rules=["weights"], retention_ratios=[0.25, 0.5], seeds=[0, 1, 2])
    assert len(seen) == 1


def test_an_error_in_a_users_rule_reaches_the_user_with_its_name_and_its_cause() -> None:
    tokens = frame(jsd=[0.3, 0.2])
    calls = []

    def broken(columns):
        calls.append(columns)
        return {"jsd": 1}["jds"]

    register_rule("broken", broken)
    register_rule("broken_values", lambda table: table["jsd"].no_such_method(), values=True)
    register_rule("asks_for_values", lambda df: df["jsd"] if df["jsd"] > 0 else -df["jsd"])
    register_rule("gives_values", lambda df: [1.0, 2.0])
    register_rule("words", lambda df: ["a", "b"], values=True)
    with pytest.raises(RuleError, match=r"rule 'broken' failed: KeyError: 'jds'") as caught:
        select_tokens(tokens, rule="broken", retention_ratio=0.5)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(calls) == 1
    with pytest.raises(RuleError, match=r"'broken_values' failed: AttributeError") as caught:
        select_tokens(tokens, rule="broken_values", retention_ratio=0.5)
    assert isinstance(caught.value.__cause__, AttributeError)
    with pytest.raises(RuleError, match=r"TypeError.*registered with values=True"):
        select_tokens(tokens, rule="asks_for_values", retention_ratio=0.5)
    with pytest.raises(SchemaError, match=r"found list: .*values=True"):
        select_tokens(tokens, rule="gives_values", retention_ratio=0.5)
    with pytest.raises(SchemaError, match="column of numbers"):
        select_tokens(tokens, rule="words", retention_ratio=0.5)


def test_an_error_inside_a_rules_expression_has_its_name_too() -> None:
    def fails(value: float) -> float:
        raise ValueError("no such number")

    register_rule("lazy", lambda df: df["jsd"].map_elements(fails, return_dtype=pl.Float64))
    with pytest.raises(RuleError, match=r"rule 'lazy' failed.*"):
        select_tokens(frame(jsd=[0.3, 0.2]), rule="lazy", retention_ratio=0.5)


def test_what_is_known_of_a_rule_is_an_attribute_and_no_name() -> None:
    facts = {
        "keeps_all": {"all"},
        "needs_gradients": {"gradient_oracle"},
        "is_reference": {"random", "gradient_oracle"},
        "is_entropy_only": {"entropy", "entropy_sampling"},
        "sampled": {"random", "entropy_sampling", "entropy_jsd_sampling"},
    }
    for fact, names in facts.items():
        assert {name for name, rule in RULES.items() if getattr(rule, fact)} == names
    everything = register_rule("everything", lambda df: df["jsd"])
    RULES["everything"] = dataclasses.replace(everything, keeps_all=True)
    tokens = _scorable(4)
    masks = to_masks(tokens, rules=["everything"], retention_ratios=[0.25, 0.5])
    assert (masks.height, masks["retention_ratio"].unique().to_list()) == (4, [1.0])
    assert Arm("everything", 0.5).has_ratio is False
    mine = register_rule("mine", lambda df: df["student_entropy"] * 2.0)
    assert mine.is_entropy_only
    assert columns_read(mine) == {"student_entropy"}


def test_the_ratio_is_stored_as_given() -> None:
    ratios = [0.1, 0.1 + 1e-12, 1 / 3]
    masks = to_masks(_scorable(40), rules=["jsd"], retention_ratios=ratios)
    assert sorted(masks["retention_ratio"].unique().to_list()) == sorted(ratios)
