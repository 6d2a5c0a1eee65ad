"""Cosines and signal-to-noise of selections, against vectors whose truth is known and whole
gradients on the arithmetic pair."""

import numpy as np
import pytest
from instrument_runs import arithmetic_run

from tip_analysis.analysis.bootstrap import expanded_interval, prompt_weights
from tip_analysis.core.names import RankFigure
from tip_analysis.gradients.loss_gradients import REWARD
from tip_analysis.gradients.selection_gradients import (
    FULL,
    Products,
    rank_cosines,
    selection_figures,
)


def products_of(vectors: dict[str, np.ndarray]) -> Products:
    """Products as a run gives them, of vectors [P, D] by source: each fold's gradient is a mean."""
    names = list(vectors)
    size = len(vectors[names[0]])
    fold = np.arange(size) % 2
    scaled = {
        name: rows / np.where(fold == 0, (fold == 0).sum(), (fold == 1).sum())[:, None]
        for name, rows in vectors.items()
    }
    sums = np.zeros((len(names), len(names), size))
    for a, first in enumerate(names):
        means = [scaled[first][fold == which].sum(0) for which in (0, 1)]
        for b, second in enumerate(names):
            for p in range(size):
                sums[a, b, p] = means[1 - fold[p]] @ scaled[second][p]
    return Products(names, sums, fold)


def planted(num_prompts: int, seed: int, noise: float = 1.0) -> tuple[dict[str, np.ndarray], float]:
    """Vectors around known means, and the true cosine of the first two."""
    rng = np.random.default_rng(seed)
    mean = {"s": np.zeros(40), FULL: np.zeros(40), REWARD: np.zeros(40)}
    mean["s"][:2], mean[FULL][:2], mean[REWARD][1] = (0.8, 0.6), (1.0, 0.0), -1.0
    vectors = {
        name: centre + noise * rng.normal(size=(num_prompts, 40)) for name, centre in mean.items()
    }
    return vectors, 0.8


def test_products_are_the_mean_of_both_orders() -> None:
    vectors, _ = planted(10, 0)
    products = products_of(vectors)
    value, again = products.inner("s", FULL, np.ones((3, 10)))
    even, odd = slice(0, None, 2), slice(1, None, 2)
    halves = {name: (rows[even].mean(0), rows[odd].mean(0)) for name, rows in vectors.items()}
    expected = (halves["s"][0] @ halves[FULL][1] + halves["s"][1] @ halves[FULL][0]) / 2
    assert value == pytest.approx(expected)
    assert again == pytest.approx([expected] * 3)


def test_cosines_and_signal_to_noise_are_those_of_the_expected_gradients() -> None:
    """Plain cosines of these means would be far too small: there is as much noise as signal."""
    vectors, truth = planted(4000, 1)
    norms = (vectors["s"] ** 2).sum(1)
    found = selection_figures(products_of(vectors), "s", norms=norms, num_resamples=200, seed=0)
    assert found[RankFigure.COSINE_LOSS].value == pytest.approx(truth, abs=0.05)
    assert found[RankFigure.COSINE_REWARD].value == pytest.approx(0.6, abs=0.06)
    assert found[RankFigure.SNR].value == pytest.approx(1 / 40, rel=0.1)
    few = {name: rows[:40].mean(0) for name, rows in vectors.items()}
    plain = few["s"] @ few[FULL] / (np.linalg.norm(few["s"]) * np.linalg.norm(few[FULL]))
    assert plain < 0.6


def test_the_full_loss_has_the_cosine_1_with_itself() -> None:
    vectors, _ = planted(30, 2)
    norms = (vectors[FULL] ** 2).sum(1)
    found = selection_figures(products_of(vectors), FULL, norms=norms, num_resamples=50, seed=0)
    assert found[RankFigure.COSINE_LOSS].value == pytest.approx(1.0)
    known = np.isfinite(found[RankFigure.COSINE_LOSS].replicates)
    assert found[RankFigure.COSINE_LOSS].replicates[known] == pytest.approx(1.0)


def test_pure_noise_has_no_cosine() -> None:
    rng = np.random.default_rng(4)
    vectors = {name: rng.normal(size=(20, 40)) for name in ("s", FULL)}
    products = products_of(vectors)
    own, _ = products.inner("s", "s", np.ones((1, 20)))
    found = selection_figures(
        products, "s", norms=(vectors["s"] ** 2).sum(1), num_resamples=20, seed=0
    )
    assert np.isnan(found[RankFigure.COSINE_LOSS].value) == (
        own <= 0 or products.inner(FULL, FULL, np.ones((1, 20)))[0] <= 0
    )
    assert abs(found[RankFigure.SNR].value) < 0.05


def test_first_order_resamples_spread_as_whole_ones_do() -> None:
    vectors, _ = planted(200, 5, noise=0.5)
    products = products_of(vectors)
    weights = prompt_weights(200, 300, 1).astype(np.float64)
    _, again = products.inner("s", FULL, weights)
    whole = []
    for row in weights:
        halves = {}
        for name, rows in vectors.items():
            copies = rows * row[:, None]
            halves[name] = [copies[which::2].sum(0) / row[which::2].sum() for which in (0, 1)]
        whole.append((halves["s"][0] @ halves[FULL][1] + halves["s"][1] @ halves[FULL][0]) / 2)
    assert np.corrcoef(again, whole)[0, 1] > 0.9


@pytest.mark.slow
def test_the_interval_of_a_cosine_covers() -> None:
    inside = 0
    for seed in range(100):
        vectors, truth = planted(80, 100 + seed, noise=0.4)
        norms = (vectors["s"] ** 2).sum(1)
        found = selection_figures(
            products_of(vectors), "s", norms=norms, num_resamples=200, seed=seed
        )[RankFigure.COSINE_LOSS]
        interval = expanded_interval(np.array([found.value]), found.replicates[:, None], 80)
        inside += interval.low[0] <= truth <= interval.high[0]
    assert inside >= 88


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    return arithmetic_run(tmp_path_factory.mktemp("run") / "run", gradients=True)


def test_a_run_is_ranked_by_its_gradients(small_run) -> None:
    """`all` is the full loss; top-k of δ points where the full loss does; rows are kept."""
    rules = ["all", "divergence", "soft_or_bottom"]
    rows = rank_cosines(small_run, rules=rules, ratios=[0.2], num_resamples=50, device="cpu")
    cosine = dict(rows.filter(figure="cosine_loss").select("rule", "value").iter_rows())
    assert cosine["all"] == pytest.approx(1.0, abs=1e-6)
    assert cosine["divergence"] is not None
    assert cosine["soft_or_bottom"] is None or cosine["divergence"] > cosine["soft_or_bottom"]
    again = rank_cosines(small_run, rules=rules, ratios=[0.2], num_resamples=50, device="cpu")
    assert again.equals(rows)
