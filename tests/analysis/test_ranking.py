"""Rules ranked without training: a known φ gives the known order, ranks say what cannot be told
apart, and the rows of a run are kept."""

import numpy as np
import polars as pl
import pytest
from scipy import stats
from synthetic import make_ablations, make_tables, write_ablations, write_run

from tip_analysis.analysis.bootstrap import prompt_weights
from tip_analysis.analysis.rank_stage import rank_rules, run_rankings
from tip_analysis.analysis.rank_validity import (
    ranking_validity,
    spearman_interval,
    validity_sentence,
)
from tip_analysis.analysis.ranking import kept_figures, league_table, selections_of
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.core import result_tables as contracts
from tip_analysis.core.errors import ConfigurationMismatchError, OptionError, RunError, SchemaError
from tip_analysis.core.names import RankFigure
from tip_analysis.core.result_tables import checked
from tip_analysis.core.run_folder import create_run

TABLES = make_tables(num_prompts=24, rollouts_per_prompt=3, mean_length=30)


def with_phi(phi: pl.Expr) -> pl.DataFrame:
    """Scored tokens whose φ is known."""
    tokens = TABLES.tokens.with_columns(
        grad_dot_loss=phi.cast(pl.Float64),
        grad_norm_sq=pl.lit(1.0),
        reward_alignment=-phi.cast(pl.Float64),
    )
    return add_scores(tokens).collect()


def test_figures_are_sums_over_the_selected_tokens() -> None:
    measured = with_phi(pl.col("reverse_kl") - 0.5)
    (chosen,) = selections_of(measured, "q3", [0.2])
    found = kept_figures(measured, chosen.times, num_resamples=20, seed=4)
    frame = select_tokens(measured, rule="q3", retention_ratio=0.2).collect()
    kept = frame.filter("selected")
    phi, every = kept["grad_dot_loss"], frame["grad_dot_loss"]
    expected = {
        RankFigure.PHI: phi.sum() / every.sum(),
        RankFigure.PHI_POSITIVE: phi.clip(0).sum() / every.clip(0).sum(),
        RankFigure.REWARD: -phi.sum() / (-every).clip(0).sum(),
        RankFigure.REWARD_POSITIVE: (-phi).clip(0).sum() / (-every).clip(0).sum(),
        RankFigure.GRAD_NORM_SQ: kept.height / frame.height,
    }
    assert found.keys() == expected.keys()
    for figure, value in expected.items():
        assert found[figure].value == pytest.approx(value)
    weights = prompt_weights(24, 20, 4)[7]
    copies = dict(zip(sorted(frame["prompt_id"].unique()), weights, strict=True))
    times = frame["prompt_id"].replace_strict(copies, return_dtype=pl.Float64)
    positive = (times * frame["grad_dot_loss"].clip(0)).sum()
    again = (times * frame["selected"] * frame["grad_dot_loss"].clip(0)).sum() / positive
    assert found[RankFigure.PHI_POSITIVE].replicates[7] == pytest.approx(again)


def test_a_known_alignment_gives_the_known_order(tmp_path) -> None:
    """φ = δ: top-k of δ keeps most of it, its reverse least, chance in between, and all three are
    told apart."""
    folder = write_run(tmp_path / "run", TABLES)
    run = create_run(folder)
    known = TABLES.tokens.select(
        "rollout_id", "position", phi=pl.col("reverse_kl").cast(pl.Float64)
    )
    key = ["rollout_id", "position"]
    gradients = (
        TABLES.gradients.filter(pl.col("loss") == "reverse_kl")
        .join(known, on=key, maintain_order="left")
        .with_columns(grad_dot_loss="phi")
        .drop("phi")
    )
    for name in [name for name in run.stages() if name.startswith("gradients")]:
        run.discard(name)
    stage = run.begin("gradients", config={"loss": "reverse_kl"}, additive=True)
    stage.write(0, gradients)
    stage.finish()
    rows = rank_rules(run, rules=["soft_or_bottom", "random", "divergence"], ratios=[0.2])
    table = checked(league_table(rows), contracts.LeagueTable).filter(figure="phi")
    assert table["rule"].to_list() == ["divergence", "random", "soft_or_bottom"]
    assert table.select("rank", "rank_low", "rank_high").rows() == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_rules_that_select_alike_share_their_ranks() -> None:
    """Top-k of φ + noise keeps as much as another top-k of φ + noise: neither rank is ruled out."""
    rng = np.random.default_rng(0)
    replicates = rng.normal(size=(4, 300)) * 0.05
    values = [0.50, 0.51, 0.9, 0.1]
    rows = league_rows(values, np.array(values)[:, None] + replicates)
    table = league_table(rows).sort("rule")
    ranks = table.select("rank_low", "rank_high").rows()
    assert ranks == [(2, 3), (2, 3), (1, 1), (4, 4)]
    paired = np.array(values)[:, None] + replicates[:1]  # what they share says nothing of the order
    paired = paired + rng.normal(size=(4, 300)) * 1e-4
    told = league_table(league_rows(values, paired)).sort("rule")
    assert told.select("rank_low", "rank_high").rows() == [(3, 3), (2, 2), (1, 1), (4, 4)]


def league_rows(values, replicates) -> pl.DataFrame:
    size = len(values)
    return pl.DataFrame(
        {
            "rule": [f"r{index}" for index in range(size)],
            "form": ["selection"] * size,
            "retention_ratio": [0.2] * size,
            "selection_scope": ["rollout"] * size,
            "figure": ["phi"] * size,
            "param_scope": ["all"] * size,
            "method": ["probe"] * size,
            "num_probes": [32] * size,
            "seed": [0] * size,
            "value": values,
            "replicates": [row.tolist() for row in replicates],
            "num_selected": [5.0] * size,
            "num_tokens": [50] * size,
            "num_prompts": [40] * size,
        }
    )


@pytest.mark.slow
def test_ranks_cover_the_true_ones_in_19_of_20_samples() -> None:
    """Simultaneously for all rules, some of which are equal."""
    truth = np.array([0.0, 0.0, 0.3, 0.35, 1.0])
    rng, prompts, inside = np.random.default_rng(3), 60, 0
    for _ in range(200):
        sample = truth[:, None] + rng.normal(size=(5, prompts))
        weights = prompt_weights(prompts, 300, int(rng.integers(1 << 31)))
        replicates = sample @ weights.T / prompts
        table = league_table(league_rows(sample.mean(1).tolist(), replicates)).sort("rule")
        best = [1 + (truth > value).sum() for value in truth]
        worst = [5 - (truth < value).sum() for value in truth]
        inside += all(
            low <= first and last <= high
            for low, high, first, last in zip(
                table["rank_low"], table["rank_high"], best, worst, strict=True
            )
        )
    assert inside >= 182


def test_a_league_table_is_of_one_measurement() -> None:
    rows = league_rows([0.1, 0.2], np.ones((2, 5)))
    other = rows.with_columns(num_probes=pl.lit(8, pl.Int64))
    with pytest.raises(SchemaError, match="one measurement"):
        league_table(pl.concat([rows, other]))


def test_rankings_are_kept_and_added_to(tmp_path) -> None:
    run = create_run(write_run(tmp_path / "run", TABLES))
    first = rank_rules(run, rules=["q3"], ratios=[0.1], num_resamples=20)
    again = rank_rules(run, rules=["q3", "entropy", "all"], ratios=[0.1], num_resamples=20)
    assert again.head(first.height).equals(first)
    assert set(again["rule"]) == {"q3", "entropy", "all"}
    assert again.filter(rule="all")["retention_ratio"].unique().to_list() == [1.0]
    assert run.table("rankings").collect().height == again.height
    assert run_rankings(run).height == again.height
    with pytest.raises(ConfigurationMismatchError, match="num_resamples"):
        rank_rules(run, rules=["q3"], ratios=[0.1], num_resamples=30)
    changed = rank_rules(run, rules=["q3"], ratios=[0.1], num_resamples=30, overwrite=True)
    assert changed["replicates"].list.len().unique().to_list() == [30]


def test_weightings_stand_beside_all(tmp_path) -> None:
    """In units of the loss over all tokens: weights of mean 1 times φ over Σφ."""
    run = create_run(write_run(tmp_path / "run", TABLES))
    rows = rank_rules(run, rules=["all"], weightings=["none", "jsd"], num_resamples=20)
    found = {
        (row["form"], row["rule"]): row["value"]
        for row in rows.filter(figure="phi").iter_rows(named=True)
    }
    assert found["weighting", "none"] == pytest.approx(found["selection", "all"]) == 1.0
    phi = TABLES.gradients.filter(pl.col("loss") == "reverse_kl")
    both = TABLES.tokens.join(phi, on=["rollout_id", "position"])
    expected = (both["jsd"].cast(pl.Float64) * both["grad_dot_loss"]).sum()
    expected /= both["jsd"].cast(pl.Float64).mean() * both["grad_dot_loss"].sum()
    assert found["weighting", "jsd"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(OptionError, match="depends on a selection"):
        rank_rules(run, rules=["all"], weightings=["horvitz_thompson"], num_resamples=20)


def test_without_gradients_the_command_is_named(tmp_path) -> None:
    bare = make_tables(num_prompts=3, gradients=False)
    run = create_run(write_run(tmp_path / "run", bare))
    with pytest.raises(RunError, match="tip-analysis gradients"):
        rank_rules(run)


def test_correlation_with_accuracy_over_arms(tmp_path) -> None:
    """A figure that is the arm's true accuracy predicts; its negative predicts the opposite."""
    folder = write_run(tmp_path / "run", TABLES)
    arms = make_ablations(problems=400, samples=8)
    write_ablations(folder, arms)
    means = (
        arms.filter(pl.col("rule") != "untrained")
        .group_by("rule", "retention_ratio", maintain_order=True)
        .agg(pl.col("accuracy").mean())
    )
    rows = pl.concat(
        league_rows([value], np.full((1, 4), value)).with_columns(
            rule=pl.lit(rule), retention_ratio=pl.lit(ratio), figure=pl.lit(figure)
        )
        for rule, ratio, accuracy in means.iter_rows()
        for figure, value in (("phi", accuracy), ("snr", -accuracy), ("reward", 0.5))
    )
    table = checked(ranking_validity(rows, arms), contracts.ValidityTable)
    pooled = {str(row["figure"]): row for row in table.iter_rows(named=True)
              if row["retention_ratio"] is None}  # fmt: skip
    assert pooled["phi"]["spearman"] == pytest.approx(1.0)
    assert pooled["phi"]["verdict"] == "predicts"
    assert pooled["phi"]["num_arms"] == 9
    assert pooled["snr"]["verdict"] == "predicts the opposite"
    assert "reward" not in pooled  # constant: no order
    assert table.filter(retention_ratio=0.1)["num_arms"].to_list() == [5, 5]
    assert "predicted over 9 arms by phi" in validity_sentence(table)
    assert "Fewer than 4 arms" in validity_sentence(table.clear())


def test_perfect_order_of_few_arms_has_an_interval_and_is_not_resolved() -> None:
    value, low, high = spearman_interval(np.arange(4.0), np.arange(4.0))
    assert value == 1.0
    assert low < 0 < high < 1


@pytest.mark.slow
def test_the_interval_covers() -> None:
    rng, inside = np.random.default_rng(0), 0
    truth = 6 / np.pi * np.arcsin(0.6 / 2)
    for _ in range(400):
        x = rng.normal(size=20)
        y = 0.6 * x + 0.8 * rng.normal(size=20)
        value, low, high = spearman_interval(x, y)
        assert value == pytest.approx(stats.spearmanr(x, y).statistic)
        inside += low <= truth <= high
    assert inside >= 370
