"""Gradients of weighted losses and their products with token gradients, against whole gradients of
every token in float64."""

import numpy as np
import polars as pl
import pytest
import torch
from gradient_cases import double_model, oracle_gradients, some_rollouts

from tip_analysis.analysis.influences import assumption_2, influence_matrix
from tip_analysis.core.names import Loss, Preconditioner
from tip_analysis.gradients.influencing import _Work, group_norms
from tip_analysis.gradients.loss_gradients import prompt_folds
from tip_analysis.gradients.measuring import model_pair
from tip_analysis.gradients.scopes import parameter_scope
from tip_analysis.gradients.weighted_losses import (
    ADAM_EPSILON,
    Source,
    adam_preconditioner,
    source_gradients,
    stream_products,
)

GROUPS = ("Q1", "Q2", "Q3")
KEY = {
    "grouping": "quadrant",
    "preconditioner": "none",
    "param_scope": "all",
    "loss": "reverse_kl",
    "seed": 3,
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case:
    """A tiny pair, every token's whole gradient, and a group for each token."""

    def __init__(self, tied: bool, scope: str = "all") -> None:
        self.student, self.teacher = double_model(tied=tied), double_model(tied=tied, seed=1)
        self.rollouts = some_rollouts()
        self.pair = model_pair(self.student, self.teacher)
        self.scope = parameter_scope(self.student, self.pair.student.head, scope)
        self.tokens = oracle_gradients(
            self.student, self.teacher, self.rollouts, "reverse_kl", scope
        )
        self.groups = pl.DataFrame(
            [
                (rollout.rollout_id, t, GROUPS[(3 * index + t) % 3])
                for index, rollout in enumerate(self.rollouts)
                for t in rollout.positions
            ],
            schema=["rollout_id", "position", "group"],
            orient="row",
        )
        self.work = _Work(
            self.pair, self.scope, self.rollouts, self.groups, Loss.REVERSE_KL, KEY["seed"]
        )
        self.fold = prompt_folds([r.prompt_id for r in self.rollouts], KEY["seed"])
        self.group = dict(zip(self.groups.select("rollout_id", "position").rows(),
                              self.groups["group"], strict=True))  # fmt: skip

    def weight(self, rollout) -> float:
        """In its fold's loss: the mean over rollouts of the mean over tokens."""
        fold = self.fold[rollout.prompt_id]
        size = sum(1 for r in self.rollouts if self.fold[r.prompt_id] == fold)
        return 1.0 / (size * rollout.num_tokens)

    def gradient(self, group: str | None, fold: int) -> dict[str, torch.Tensor]:
        """∇L_a of a fold (None for L), from whole gradients."""
        total = {name: torch.zeros_like(p) for name, p in self.scope.parameters.items()}
        for rollout, position, gradient in self.tokens:
            if self.fold[rollout.prompt_id] != fold:
                continue
            if group in (None, self.group[rollout.rollout_id, position]):
                for name in total:
                    total[name] += self.weight(rollout) * gradient[name]
        return total

    def rows(self, preconditioner: Preconditioner = Preconditioner.NONE) -> pl.DataFrame:
        factors = None
        if preconditioner is Preconditioner.ADAM:
            factors = self.factors()
        found = self.work.gradients(factors, None)
        self.norms = group_norms(found, self.work.names, self.scope)
        key = KEY | {"preconditioner": preconditioner}
        return pl.concat(list(self.work.rows(found, self.rollouts, key)))

    def factors(self) -> dict[str, torch.Tensor]:
        batches = {r.rollout_id: int(r.prompt_id[1:]) // 2 for r in self.rollouts}
        whole = Source("all", self.work.weights)
        return adam_preconditioner(self.pair, self.scope, self.rollouts, whole, batches)


def inner(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def expected_matrix(case: Case, factors=None) -> dict[tuple[str, str], float]:
    parts = {(name, fold): case.gradient(name, fold) for name in GROUPS for fold in (0, 1)}
    if factors is not None:
        stepped = {
            key: {name: factors[name] * tensor for name, tensor in gradient.items()}
            for key, gradient in parts.items()
        }
    else:
        stepped = parts
    return {
        (a, b): (inner(stepped[a, 0], parts[b, 1]) + inner(stepped[a, 1], parts[b, 0])) / 2
        for a in GROUPS
        for b in GROUPS
    }


def entries(matrix: pl.DataFrame, column: str = "influence") -> dict[tuple[str, str], float]:
    return {(a, b): v for a, b, v in matrix.select("source", "target", column).iter_rows()}


@pytest.mark.parametrize(("tied", "scope"), [(True, "all"), (False, "all"), (False, "body")])
def test_the_matrix_equals_whole_gradients_and_its_rows_sum_to_the_full_one(tied, scope) -> None:
    case = Case(tied, scope)
    rows = case.rows()
    matrix = influence_matrix(rows, num_resamples=50)
    found, expected = entries(matrix), expected_matrix(case)
    largest = max(map(abs, expected.values()))
    assert all(abs(found[key] - expected[key]) <= 1e-6 * largest for key in expected)
    whole = [case.gradient(None, fold) for fold in (0, 1)]
    for a in GROUPS:
        own = [case.gradient(a, fold) for fold in (0, 1)]
        full = (inner(own[0], whole[1]) + inner(own[1], whole[0])) / 2
        assert sum(found[a, b] for b in GROUPS) == pytest.approx(full, rel=1e-6)
    cosine = entries(matrix, "cosine")
    for a, b in found:
        known = found[a, a] > 0 and found[b, b] > 0
        if known:
            assert cosine[a, b] == pytest.approx(found[a, b] / (found[a, a] * found[b, b]) ** 0.5)
        else:
            assert cosine[a, b] is None


def test_products_of_single_tokens_equal_whole_gradients() -> None:
    case = Case(tied=True)
    rows = case.rows()
    sources = {(n, f): case.gradient(n, f) for n in GROUPS for f in (0, 1)}
    keys = ["source", "rollout_id", "position"]
    known = dict(zip(rows.select(keys).rows(), rows["grad_dot_source"], strict=True))
    assert len(known) == 3 * len(case.tokens)
    for rollout, position, gradient in case.tokens:
        for name in GROUPS:
            other = sources[name, 1 - case.fold[rollout.prompt_id]]
            expected = inner(other, gradient)
            assert known[name, rollout.rollout_id, position] == pytest.approx(
                expected, rel=1e-6, abs=1e-9
            )


def test_assumption_2_drops_the_products_of_different_tokens() -> None:
    case = Case(tied=False)
    rows = case.rows()
    norms = pl.DataFrame(
        [(r.rollout_id, t, inner(g, g)) for r, t, g in case.tokens],
        schema=["rollout_id", "position", "grad_norm_sq"],
        orient="row",
    )
    table = assumption_2(rows, norms, case.norms)
    by_group = {row["group"]: row for row in table.iter_rows(named=True)}
    for name in (*GROUPS, "all"):
        parts = [case.gradient(None if name == "all" else name, fold) for fold in (0, 1)]
        mean = {key: (parts[0][key] + parts[1][key]) / 2 for key in parts[0]}
        own = sum(
            (case.weight(r) / 2) ** 2 * inner(g, g)
            for r, t, g in case.tokens
            if name in ("all", case.group[r.rollout_id, t])
        )
        row = by_group[name]
        assert row["norm_sq"] == pytest.approx(inner(mean, mean), rel=1e-8)
        assert row["kept"] == pytest.approx(own, rel=1e-8)
        assert row["dropped"] == pytest.approx(inner(mean, mean) - own, rel=1e-6, abs=1e-12)
    fewer = assumption_2(rows, norms.head(3), case.norms)
    assert fewer.filter(group="all")["kept"][0] is None


def test_the_adam_form_equals_a_real_adam_step_to_first_order() -> None:
    """One step of torch's Adam on L_a from a settled v̂ changes L_b as the matrix says, to 5 %."""
    case = Case(tied=False)
    rows = case.rows(Preconditioner.ADAM)
    found = entries(influence_matrix(rows, num_resamples=10))
    factors = case.factors()
    expected = expected_matrix(case, factors)
    largest = max(map(abs, expected.values()))
    assert all(abs(found[key] - expected[key]) <= 1e-6 * largest for key in expected)
    for a in GROUPS:
        changes = []
        for fold in (0, 1):
            step = adam_step(case, a, fold, factors)
            changes.append({b: -inner(step, case.gradient(b, 1 - fold)) for b in GROUPS})
        for b in GROUPS:
            realised = (changes[0][b] + changes[1][b]) / 2
            assert realised == pytest.approx(found[a, b], rel=0.05, abs=0.005 * largest)


def adam_step(case: Case, group: str, fold: int, factors) -> dict[str, torch.Tensor]:
    """What torch's Adam subtracts for a unit learning rate, v̂ being that of the preconditioner."""
    rate, beta = 1e-4, 1.0 - 1e-9  # v̂ is settled: one step's own square does not move it
    copies = {n: torch.nn.Parameter(p.detach().clone()) for n, p in case.scope.parameters.items()}
    optimizer = torch.optim.Adam(copies.values(), lr=rate, betas=(0.0, beta), eps=ADAM_EPSILON)
    gradient = case.gradient(group, fold)
    for name, copy in copies.items():
        copy.grad = gradient[name].clone()
        settled = (1.0 / factors[name] - ADAM_EPSILON).square()
        optimizer.state[copy] = {
            "step": torch.tensor(1e15),
            "exp_avg": torch.zeros_like(copy),
            "exp_avg_sq": settled.clone(),
        }
    before = {name: copy.detach().clone() for name, copy in copies.items()}
    optimizer.step()
    return {name: (copy.detach() - before[name]) / rate for name, copy in copies.items()}


def test_the_preconditioner_is_the_mean_squared_gradient_of_steps() -> None:
    case = Case(tied=False)
    batches: dict[int, dict[str, torch.Tensor]] = {}
    for which in (0, 1):
        rollouts = [r for r in case.rollouts if int(r.prompt_id[1:]) // 2 == which]
        total = {name: torch.zeros_like(p) for name, p in case.scope.parameters.items()}
        weights = {r.rollout_id: case.weight(r) for r in rollouts}
        scale = sum(weights[r.rollout_id] * r.num_tokens for r in rollouts)
        for rollout, _, gradient in case.tokens:
            if rollout.rollout_id in weights:
                for name in total:
                    total[name] += weights[rollout.rollout_id] / scale * gradient[name]
        batches[which] = total
    factors = case.factors()
    for name, factor in factors.items():
        mean = (batches[0][name].square() + batches[1][name].square()) / 2
        expected = 1.0 / (mean.sqrt() + ADAM_EPSILON)
        assert torch.allclose(factor, expected, rtol=1e-6)


def test_a_source_without_tokens_in_a_fold_has_no_products_there() -> None:
    case = Case(tied=False)
    weights = {r.rollout_id: torch.zeros(r.num_tokens).double() for r in case.rollouts}
    first = case.rollouts[0]
    weights[first.rollout_id][0] = 1.0
    found = source_gradients(
        case.pair, case.scope, case.rollouts, [Source("one", weights)], seed=KEY["seed"]
    )
    assert set(found.stored) == {("one", case.fold[first.prompt_id])}
    assert set(found.prompt_norms["one"]) == {first.prompt_id}
    products = list(stream_products(case.pair, case.scope, case.rollouts, found))
    for rollout, _, along in products:
        same = case.fold[rollout.prompt_id] == case.fold[first.prompt_id]
        assert ("one" in along[Loss.REVERSE_KL]) is not same
    assert np.isclose(
        found.prompt_norms["one"][first.prompt_id],
        inner(case.tokens[0][2], case.tokens[0][2]),
        rtol=1e-8,
    )
