"""Scores: bounds, ĥ, δ̂, Soft-OR, the Q3 score and the registry."""

import math

import polars as pl
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import token_frames

from tip_analysis.analysis.score_functions import SCORE_COLUMNS, TokenColumns, entropy_jsd
from tip_analysis.analysis.scores import SCORES, add_scores, resolve_normalization, score_expression
from tip_analysis.core.errors import InputError, SchemaError, UnknownNameError


def frame(
    h: list, delta: list, forward: list | None = None, batch: list | None = None
) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "rollout_id": ["a/0"] * len(h),
            "position": range(len(h)),
            "batch_id": batch or [0] * len(h),
            "loss_mask": [value is not None for value in h],
            "student_entropy_norm": h,
            "reverse_kl": delta,
            "forward_kl": forward or delta,
        },
        schema_overrides={
            "batch_id": pl.Int32,
            "student_entropy_norm": pl.Float32,
            "reverse_kl": pl.Float32,
        },
    )


@settings(deadline=None, max_examples=60)
@given(token_frames(), st.sampled_from(["run", "batch"]), st.sampled_from([None, 0.5, 0.9, 1.0]))
def test_scores_equal_the_oracle_within_each_scope(
    tokens: pl.DataFrame, scope: str, clip: float | None
) -> None:
    scored = add_scores(tokens, normalization_scope=scope, divergence_clip=clip).collect()
    groups = [scored] if scope == "run" else scored.partition_by("batch_id")
    for group in groups:
        columns = (
            group[name].to_list() for name in ("student_entropy_norm", "reverse_kl", "forward_kl")
        )
        expected = reference.token_scores(*columns, divergence_clip=clip)
        for name in SCORE_COLUMNS:
            assert group[name].dtype == pl.Float64
            for found, wanted in zip(group[name].to_list(), expected[name], strict=True):
                assert (found is None) == (wanted is None)
                if found is not None and math.inf in (found, wanted) and name == "q3_score":
                    # ∞·(1 − ĥ): whether ĥ is 1 or 1 − 1e-16 hangs on the last bit of the percentile
                    continue
                assert found is None or found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(token_frames())
def test_scores_lie_in_the_unit_interval_and_never_are_nan(tokens: pl.DataFrame) -> None:
    scored = add_scores(tokens).collect()
    for name in ("entropy_hat", "divergence_hat", "soft_or"):
        assert scored[name].drop_nulls().is_between(0.0, 1.0).all()
    assert not scored["q3_score"].is_nan().any()
    assert (scored["soft_or"] >= scored["entropy_hat"] - 1e-12).drop_nulls().all()
    assert (scored["soft_or"] >= scored["divergence_hat"] - 1e-12).drop_nulls().all()


@settings(deadline=None, max_examples=20)
@given(token_frames(), st.randoms(use_true_random=False))
def test_row_order_changes_nothing(tokens: pl.DataFrame, random) -> None:
    order = list(range(tokens.height))
    random.shuffle(order)
    scored, shuffled = add_scores(tokens).collect(), add_scores(tokens[order]).collect()
    assert shuffled.equals(scored[order])


def test_a_case_to_check_by_eye() -> None:
    scored = add_scores(frame([0.0, 0.5, 1.0], [0.0, 4.0, 1.0], [0.0, 6.0, 2.0])).collect()
    high = 0.98  # the 98th percentile of 0, ½, 1: 0.96 of the way from ½ to 1
    assert scored["entropy_hat"].to_list() == pytest.approx([0.0, 0.5 / high, 1.0])
    assert scored["divergence_hat"].to_list() == [0.0, 1.0, 0.25]
    assert scored["soft_or"].to_list() == [0.0, 1.0, 1.0]
    assert scored["q3_score"].to_list() == pytest.approx([0.0, 6.0 * (1 - 0.5 / high), 0.0])


def test_constant_columns_give_zero_and_infinite_divergence_gives_one() -> None:
    scored = add_scores(frame([0.25, 0.25, 0.25], [2.0, math.inf, 2.0])).collect()
    assert scored["entropy_hat"].to_list() == [0.0, 0.0, 0.0]
    assert scored["divergence_hat"].to_list() == [0.0, 1.0, 0.0]
    assert scored["q3_score"].to_list() == [2.0, math.inf, 2.0]
    all_infinite = add_scores(frame([0.0, 1.0], [math.inf, math.inf])).collect()
    assert all_infinite["divergence_hat"].to_list() == [1.0, 1.0]
    assert all_infinite["q3_score"].to_list() == [math.inf, 0.0]


def test_ties_at_full_entropy_stay_ties() -> None:
    h = [0.0] * 40 + [0.7, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    scored = add_scores(frame(h, [i / 49 for i in range(49)])).collect()
    full = scored.filter(pl.col("entropy_hat") == 1.0)["soft_or"]
    assert full.len() == 6
    assert full.unique().to_list() == [1.0]


def test_masked_rows_stay_null_and_take_no_part() -> None:
    scored = add_scores(frame([0.1, None, 0.3], [1.0, None, 3.0])).collect()
    assert scored["soft_or"].is_null().to_list() == [False, True, False]
    stray = frame([0.1, 0.9, 0.3], [1.0, 9.0, 3.0]).with_columns(
        pl.Series("loss_mask", [True, False, True])
    )
    assert add_scores(stray).collect()["divergence_hat"].to_list() == [0.0, None, 1.0]


def test_a_filter_put_on_later_does_not_move_the_bounds() -> None:
    scored = add_scores(frame([0.0, 0.5, 1.0], [0.0, 4.0, 1.0]))
    kept = scored.filter(pl.col("position") == 2).collect()
    assert kept["divergence_hat"].to_list() == [0.25]


def test_bounds_are_recorded_and_can_be_used_again() -> None:
    tokens = frame([0.0, 1.0, 0.0, 0.5], [0.0, 1.0, 2.0, 10.0], batch=[0, 0, 1, 1])
    bounds = resolve_normalization(tokens, normalization_scope="batch")
    assert bounds.bounds["batch_id"].to_list() == [0, 1]
    assert bounds.bounds["divergence_low"].to_list() == [0.0, 2.0]
    assert bounds.bounds["divergence_high"].to_list() == [1.0, 10.0]
    assert add_scores(tokens, normalization=bounds).collect()["divergence_hat"].to_list() == [
        0.0,
        1.0,
        0.0,
        1.0,
    ]


def test_the_divergence_clip_flattens_an_outlier() -> None:
    delta = [float(i) for i in range(99)] + [1e6]
    plain = add_scores(frame([0.5] * 100, delta)).collect()["divergence_hat"]
    clipped = add_scores(frame([0.5] * 100, delta), divergence_clip=0.98).collect()[
        "divergence_hat"
    ]
    assert plain[50] < 1e-4
    assert clipped[50] > 0.5
    assert clipped.max() == 1.0


@pytest.mark.parametrize("name", [name for name in SCORES if name != "descent_alignment"])
def test_every_score_is_float64_over_a_scored_table(name: str) -> None:
    tokens = pl.DataFrame(
        {
            column: [0.25, 0.5]
            for column in [
                "student_entropy_norm",
                "teacher_entropy",
                "reverse_kl",
                "forward_kl",
                "jsd",
                "hellinger",
                "teacher_mass_on_student_topk",
                "ier",
            ]
        }
    ).with_columns(
        batch_id=pl.lit(0, pl.Int32), loss_mask=True, position=pl.Series([0, 1], dtype=pl.Int32)
    )
    scored = add_scores(tokens)
    values = scored.select(score_expression(scored, name).alias("score")).collect()["score"]
    assert values.dtype == pl.Float64
    assert values.null_count() == 0


def test_products_of_columns() -> None:
    tokens = pl.LazyFrame(
        {
            "student_entropy_norm": [0.5, 1.0],
            "jsd": [math.log(2.0), 0.0],
            "reverse_kl": [3.0, math.inf],
            "teacher_mass_on_student_topk": [0.5, 0.0],
        }
    )
    columns = TokenColumns(tokens.collect_schema())
    assert tokens.select(entropy_jsd(columns)).collect().to_series().to_list() == [0.5, 0.0]
    squared = tokens.select(entropy_jsd(columns, alpha=2.0, gamma=0.0)).collect().to_series()
    assert squared.to_list() == [0.25, 1.0]
    assert tokens.select(
        score_expression(tokens, "teachability")
    ).collect().to_series().to_list() == [1.5, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization_scope": "rollout"}, "unknown scope 'rollout'; valid names: run, batch"),
        ({"divergence_clip": 0.0}, "quantile in"),
        ({"divergence_clip": 1.5}, "found 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_scores(frame([0.1, 0.2], [0.0, 1.0]), **options)


def test_missing_columns_and_unknown_scores_are_named() -> None:
    tokens = frame([0.1, 0.2], [0.0, 1.0])
    with pytest.raises(SchemaError, match="forward_kl"):
        add_scores(tokens.drop("forward_kl"))
    with pytest.raises(SchemaError, match="add_scores adds it"):
        score_expression(tokens.lazy(), "soft_or")
    with pytest.raises(UnknownNameError, match="did you mean 'soft_or'"):
        score_expression(tokens.lazy(), "sof_or")
