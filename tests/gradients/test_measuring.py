"""Per-token gradients against a loop over tokens that keeps every gradient whole, in float64."""

import logging
import math
import types
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import reference
import torch
from gradient_cases import LOSSES, VOCABULARY, double_model, oracle_gradients, some_rollouts
from scipy.stats import norm
from tiny_models import ARCHITECTURES, tiny_model
from transformers import PreTrainedModel

from tip_analysis.analysis.quadrant_tables import quadrant_statistics
from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import ModelError, OptionError, UnknownNameError
from tip_analysis.core.schema import GradientTable
from tip_analysis.gradients import forward_mode
from tip_analysis.gradients.directions import BLOCK, GaussianDirection, StoredDirection
from tip_analysis.gradients.forward_mode import ForwardMode
from tip_analysis.gradients.loss_gradients import (
    REWARD,
    loss_directions,
    prompt_folds,
    weighted_gradient,
)
from tip_analysis.gradients.measuring import (
    GradientSettings,
    measure_rollouts,
    model_pair,
    norm_interval,
    stratified_positions,
    stream_gradients,
    token_gradients,
)
from tip_analysis.gradients.scopes import parameter_scope
from tip_analysis.logits.row_statistics import token_statistics
from tip_analysis.rollouts.encoded import Rollout


def response_logits(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits [T, V] that predict a response."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


TOLERANCE = dict.fromkeys(ARCHITECTURES, 1e-8) | {"gemma2": 1e-5}
"""Gemma 2's own attention, which the loop over tokens runs, has its softmax in float32."""


def close(found: torch.Tensor, expected: list[float], tolerance: float = 1e-8) -> None:
    """Equal to a small part of the largest entry."""
    expected_tensor = torch.tensor(expected, dtype=torch.float64)
    assert float((found - expected_tensor).abs().max()) <= tolerance * max(
        1.0, float(expected_tensor.abs().max())
    )


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_norms_equal_a_loop_over_tokens(architecture: str, tied: bool) -> None:
    student, teacher = (
        double_model(architecture, tied=tied),
        double_model(architecture, tied=tied, seed=1),
    )
    rollouts = some_rollouts()[3:6]
    for loss in LOSSES if architecture == "qwen3" else ["reverse_kl", "forward_kl"]:
        found = token_gradients(
            student=student, teacher=teacher, rollouts=rollouts, loss=loss, method="exact"
        )
        rows = oracle_gradients(student, teacher, rollouts, loss)
        expected = [reference.inner(gradient, gradient) for _, _, gradient in rows]
        close(found["grad_norm_sq"], expected, TOLERANCE[architecture])
        assert found["position"].tolist() == [position for _, position, _ in rows]
        assert [rollouts[index] for index in found["rollout"]] == [
            rollout for rollout, _, _ in rows
        ]
        assert not found["grad_norm_sq_se"].any()


@pytest.mark.parametrize("scope", ["body", "head", "last:1", "last:2"])
@pytest.mark.parametrize("tied", [True, False])
def test_exact_norms_of_each_scope(scope: str, tied: bool) -> None:
    student, teacher = double_model(tied=tied), double_model(tied=tied, seed=1)
    rollouts = some_rollouts()[2:4]
    found = token_gradients(
        student=student, teacher=teacher, rollouts=rollouts, method="exact", param_scope=scope
    )
    rows = oracle_gradients(student, teacher, rollouts, "reverse_kl", scope)
    close(found["grad_norm_sq"], [reference.inner(gradient, gradient) for _, _, gradient in rows])


@pytest.mark.parametrize("batched_bytes", [0, 1 << 28])
def test_exact_norms_do_not_depend_on_how_many_tokens_go_at_once(
    batched_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tip_analysis.gradients.rollout_gradients.BATCHED_BYTES", batched_bytes)
    student, teacher = double_model(), double_model(seed=1)
    found = token_gradients(
        student=student, teacher=teacher, rollouts=some_rollouts()[7:], method="exact"
    )
    rows = oracle_gradients(student, teacher, some_rollouts()[7:], "reverse_kl")
    close(found["grad_norm_sq"], [reference.inner(gradient, gradient) for _, _, gradient in rows])


def test_head_gradient_is_an_outer_product() -> None:
    """By eye: under forward KL an untied head has ∇ℓ = (P_S − P_T) hᵀ, so ‖∇ℓ‖² = ‖P_S − P_T‖²‖h‖²;
    nothing is probed."""
    student, teacher = double_model(tied=False), double_model(tied=False, seed=1)
    rollout = Rollout("a/0", "a", [3, 4], [5])
    found = token_gradients(
        student=student, teacher=teacher, rollouts=[rollout], loss="forward_kl", param_scope="head"
    )
    tokens = torch.tensor([[3, 4]])
    student.requires_grad_(False)
    hidden = student.model(tokens).last_hidden_state[0, -1]
    teacher.requires_grad_(False)
    difference = student(tokens).logits[0, -1].softmax(-1) - teacher(tokens).logits[0, -1].softmax(
        -1
    )
    close(found["grad_norm_sq"], [float(difference.square().sum() * hidden.square().sum())])
    assert found["grad_norm_sq_se"].tolist() == [0.0]


@pytest.mark.parametrize("tied", [True, False])
def test_all_is_body_and_head(tied: bool) -> None:
    student, teacher = double_model("gpt2", tied=tied), double_model("gpt2", tied=tied, seed=1)
    norms = {
        scope: token_gradients(
            student=student,
            teacher=teacher,
            rollouts=some_rollouts()[:2],
            method="exact",
            param_scope=scope,
        )["grad_norm_sq"]
        for scope in ("all", "body", "head")
    }
    close(norms["body"] + norms["head"], norms["all"].tolist())


# ---------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_gradients_sum_to_the_gradient_of_the_sum(architecture: str, tied: bool) -> None:
    student, teacher = (
        double_model(architecture, tied=tied),
        double_model(architecture, tied=tied, seed=1),
    )
    pair, rollouts = model_pair(student, teacher), some_rollouts()[4:6]
    scope = parameter_scope(student, pair.student.head, "all")
    total = weighted_gradient(pair, scope, rollouts, [1.0] * len(rollouts), "reverse_kl")
    rows = oracle_gradients(student, teacher, rollouts, "reverse_kl")
    expected = reference.weighted_sum([gradient for _, _, gradient in rows], [1.0] * len(rows))
    for name, gradient in expected.items():
        tolerance = TOLERANCE[architecture]
        torch.testing.assert_close(total[name], gradient.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("aggregation", ["rollout", "token"])
@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize(
    ("architecture", "tied"), [("qwen3", True), ("llama", False), ("gpt2", True), ("qwen2", True)]
)
def test_alignment_equals_inner_products_of_exact_gradients(
    architecture: str, tied: bool, loss: str, aggregation: str
) -> None:
    student, teacher = (
        double_model(architecture, tied=tied),
        double_model(architecture, tied=tied, seed=1),
    )
    rollouts = some_rollouts()
    found = token_gradients(
        student=student,
        teacher=teacher,
        rollouts=rollouts,
        loss=loss,
        num_probes=1,
        loss_aggregation=aggregation,
    )
    rows = oracle_gradients(student, teacher, rollouts, loss)
    folds = prompt_folds([rollout.prompt_id for rollout in rollouts], 0)

    def loss_gradient(inside: list[tuple[Rollout, int, dict]]) -> dict[str, torch.Tensor]:
        members = {rollout.rollout_id for rollout, _, _ in inside}
        per_rollout = [1 / (len(members) * rollout.num_tokens) for rollout, _, _ in inside]
        weights = per_rollout if aggregation == "rollout" else [1 / len(inside)] * len(inside)
        return reference.weighted_sum([gradient for _, _, gradient in inside], weights)

    by_fold = [
        loss_gradient([row for row in rows if folds[row[0].prompt_id] == fold]) for fold in (0, 1)
    ]
    every = loss_gradient(rows)
    close(
        found["grad_dot_loss"],
        [reference.inner(by_fold[1 - folds[r.prompt_id]], g) for r, _, g in rows],
    )
    close(found["grad_dot_loss_plugin"], [reference.inner(every, g) for _, _, g in rows])


@pytest.mark.parametrize("scope", ["all", "last:1"])
def test_reward_alignment_equals_a_leave_one_out_score_function(scope: str) -> None:
    student, teacher = double_model(), double_model(seed=1)
    rollouts = some_rollouts()
    found = token_gradients(
        student=student, teacher=teacher, rollouts=rollouts, num_probes=1, param_scope=scope
    )
    rows = oracle_gradients(student, teacher, rollouts, "reverse_kl", scope)
    log_gradients = oracle_gradients(student, teacher, rollouts, "negative_logprob", scope)
    folds = prompt_folds([rollout.prompt_id for rollout in rollouts], 0)
    ascent = []
    for fold in (0, 1):
        inside = [row for row in log_gradients if folds[row[0].prompt_id] == fold]
        weights = []
        for rollout, _, _ in inside:
            (baseline,) = [
                r.reward for r in rollouts if r.prompt_id == rollout.prompt_id and r is not rollout
            ]
            weights.append(
                -(rollout.reward - baseline) / 2 / 2
            )  # two rollouts a prompt, two prompts a fold
        ascent.append(reference.weighted_sum([gradient for _, _, gradient in inside], weights))
    close(
        found["reward_alignment"],
        [-reference.inner(ascent[1 - folds[r.prompt_id]], g) for r, _, g in rows],
    )


def test_pure_noise_is_cross_fitted_to_half_and_plugged_in_to_positive() -> None:
    """Random tokens under a uniform student: E∇ℓ_t = 0, so nothing points anywhere but at
    itself."""
    torch.manual_seed(0)
    student = double_model(tied=False)
    with torch.no_grad():
        student.lm_head.weight.zero_()
    rollouts = [
        Rollout(
            f"p{index}/0",
            f"p{index}",
            torch.randint(VOCABULARY, (6,)).tolist(),
            torch.randint(VOCABULARY, (1,)).tolist(),
        )
        for index in range(600)
    ]
    settings = {"loss": "negative_logprob", "param_scope": "head", "num_probes": 1}
    found = token_gradients(student=student, teacher=None, rollouts=rollouts, **settings)
    positive = float((found["grad_dot_loss"] > 0).double().mean())
    assert abs(positive - 0.5) < 4 * math.sqrt(0.25 / len(rollouts))
    few = token_gradients(student=student, teacher=None, rollouts=rollouts[:30], **settings)
    assert float((few["grad_dot_loss_plugin"] > 0).double().mean()) > 0.95


def test_alignment_is_null_without_other_prompts_or_rewards() -> None:
    student, teacher = double_model(), double_model(seed=1)
    one_prompt = token_gradients(
        student=student, teacher=teacher, rollouts=some_rollouts()[:2], num_probes=1
    )
    assert one_prompt["grad_dot_loss"].isnan().all()
    assert one_prompt["reward_alignment"].isnan().all()
    assert one_prompt["grad_dot_loss_plugin"].isfinite().all()
    ungraded = [replace(rollout, reward=None) for rollout in some_rollouts()]
    found = token_gradients(student=student, teacher=teacher, rollouts=ungraded, num_probes=1)
    assert found["reward_alignment"].isnan().all()
    assert found["grad_dot_loss"].isfinite().all()
    all_equal = [replace(rollout, reward=1.0) for rollout in some_rollouts()]
    found = token_gradients(student=student, teacher=teacher, rollouts=all_equal, num_probes=1)
    assert found["reward_alignment"].isnan().all()


def test_folds_are_balanced_and_keyed_by_prompt() -> None:
    names = [f"prompt {index}" for index in range(21)]
    folds = prompt_folds(names, seed=3)
    assert sorted(folds.values()) == [0] * 11 + [1] * 10
    assert prompt_folds(names[::-1] + names, seed=3) == folds
    assert prompt_folds(names, seed=4) != folds


# ------------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize(("architecture", "tied"), [("qwen3", True), ("gpt2", False)])
def test_probes_are_unbiased(architecture: str, tied: bool) -> None:
    student, teacher = (
        double_model(architecture, tied=tied),
        double_model(architecture, tied=tied, seed=1),
    )
    rollouts, num_probes = some_rollouts()[7:], 4000
    exact = token_gradients(student=student, teacher=teacher, rollouts=rollouts, method="exact")[
        "grad_norm_sq"
    ]
    settings = GradientSettings(losses=("reverse_kl",), num_probes=num_probes, probes_together=250)
    ((_, found),) = measure_rollouts(model_pair(student, teacher), rollouts, settings)
    z = (found["reverse_kl"].grad_norm_sq - exact) / found["reverse_kl"].grad_norm_sq_se
    assert len(z) == 6
    assert float(z.abs().max()) < norm.isf(0.005 / len(z))


def test_intervals_cover_as_stated() -> None:
    student, teacher = double_model(), double_model(seed=1)
    rollout = some_rollouts()[6]
    exact = token_gradients(student=student, teacher=teacher, rollouts=[rollout], method="exact")[
        "grad_norm_sq"
    ]
    copies = [replace(rollout, rollout_id=f"copy {index}") for index in range(100)]
    settings = GradientSettings(losses=("reverse_kl",), num_probes=32, probes_together=32)
    pair = model_pair(student, teacher)
    directions = loss_directions(
        pair, parameter_scope(student, pair.student.head, "all"), [rollout], losses=["reverse_kl"]
    )
    directions.stored.clear()  # φ is not wanted here
    covered = []
    for _, found in measure_rollouts(pair, copies, settings, directions=directions):
        result = found["reverse_kl"]
        low, high = norm_interval(result.grad_norm_sq, result.grad_norm_sq_se, 32)
        covered.append(((low <= exact) & (exact <= high)).double().mean())
    assert 0.92 <= float(torch.stack(covered).mean()) <= 0.98


def test_energy_shares_of_quadrants_lie_within_two_stated_errors_of_exact() -> None:
    student, teacher = double_model(), double_model(seed=1)
    pair = model_pair(student, teacher)
    rollouts = [
        replace(
            rollout,
            rollout_id=f"{copy}-{rollout.rollout_id}",
            prompt_id=f"{copy}-{rollout.prompt_id}",
            prompt=[copy, 9],
        )
        for copy in range(6)
        for rollout in some_rollouts()
    ]
    rows = []
    for rollout in rollouts:
        prompt, response = list(rollout.prompt), list(rollout.response)
        found = token_statistics(
            student=response_logits(student, prompt, response),
            teacher=response_logits(teacher, list(rollout.teacher_prompt or prompt), response),
        )
        entropy, divergence = found["student_entropy"].tolist(), found["reverse_kl"].tolist()
        rows += [
            (rollout.rollout_id, rollout.prompt_id, t, entropy[t], divergence[t])
            for t in rollout.positions
        ]
    names = ["rollout_id", "prompt_id", "position", "student_entropy", "reverse_kl"]
    tokens = pl.DataFrame(rows, schema=names, orient="row").with_columns(batch_id=0, loss_mask=True)

    def shares(method: str, seed: int) -> pl.DataFrame:
        settings = GradientSettings(
            losses=("reverse_kl",), method=method, num_probes=32, probes_together=32, seed=seed
        )
        measured = [found["reverse_kl"] for _, found in measure_rollouts(pair, rollouts, settings)]
        norms = pl.Series(
            "grad_norm_sq", torch.cat([each.grad_norm_sq for each in measured]).numpy()
        )
        table = quadrant_statistics(tokens.with_columns(norms), num_resamples=200)
        return table.filter(pl.col("statistic") == "share_grad_norm_sq")

    exact = shares("exact", 0)["value"].to_numpy()
    assert exact.min() > 0.02
    differences = []
    for seed in range(3):
        probed = shares("probe", seed)
        differences.append(probed["value"].to_numpy() - exact)
        assert (abs(differences[-1]) <= 2 * probed["se"].to_numpy()).all()
        assert abs(differences[-1]).max() > 1e-6
    assert (abs(np.mean(differences, axis=0)) < 0.02).all()


def test_results_depend_neither_on_batch_nor_on_grouping() -> None:
    student, teacher = double_model(), double_model(seed=1)
    rollouts = some_rollouts()[2:6]
    together = token_gradients(student=student, teacher=teacher, rollouts=rollouts, num_probes=6)
    backwards = token_gradients(
        student=student, teacher=teacher, rollouts=rollouts[::-1], num_probes=6
    )
    for index, rollout in enumerate(rollouts):
        alone = token_gradients(student=student, teacher=teacher, rollouts=[rollout], num_probes=6)
        mine = together["rollout"] == index
        close(alone["grad_norm_sq"], together["grad_norm_sq"][mine].tolist())
        there = backwards["rollout"] == len(rollouts) - 1 - index
        for column in ("grad_norm_sq", "grad_dot_loss", "grad_dot_loss_plugin", "reward_alignment"):
            close(backwards[column][there], together[column][mine].tolist())
    pair = model_pair(student, teacher)
    for probes_together in (1, 4):
        settings = GradientSettings(
            losses=("reverse_kl",), num_probes=6, probes_together=probes_together
        )
        parts = [
            found["reverse_kl"].grad_norm_sq
            for _, found in measure_rollouts(pair, rollouts, settings)
        ]
        close(torch.cat(parts), together["grad_norm_sq"].tolist())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["probe", "exact"])
def test_low_precision_stays_within_the_stated_errors(method: str, tied: bool) -> None:
    """The probes are the same up to rounding, so far less than the standard error of 32 of them
    separates the dtypes."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        student = tiny_model("llama", vocab_size=VOCABULARY, tied=tied, dtype=dtype, sharpness=0.2)
        teacher = tiny_model(
            "llama", vocab_size=VOCABULARY, tied=tied, dtype=dtype, sharpness=0.2, seed=1
        )
        found[dtype] = token_gradients(
            student=student,
            teacher=teacher,
            rollouts=some_rollouts(),
            loss="forward_kl",
            method=method,
        )
    full, low = found[torch.float32], found[torch.bfloat16]
    assert (
        (low["grad_norm_sq"] - full["grad_norm_sq"]).abs()
        < math.sqrt(2 / 32) * full["grad_norm_sq"]
    ).all()
    for column in ("grad_dot_loss", "grad_dot_loss_plugin", "reward_alignment"):
        assert float((low[column] - full[column]).abs().max()) < 0.1 * float(
            full[column].abs().max()
        )


def test_losses_measured_together_or_apart_are_the_same() -> None:
    student, teacher = double_model(), double_model(seed=1)
    pair, rollouts = model_pair(student, teacher), some_rollouts()[:4]
    settings = GradientSettings(losses=tuple(LOSSES), num_probes=5)
    found = [by_loss for _, by_loss in measure_rollouts(pair, rollouts, settings)]
    for loss in LOSSES:
        apart = token_gradients(
            student=student, teacher=teacher, rollouts=rollouts, loss=loss, num_probes=5
        )
        for column in ("grad_norm_sq", "grad_dot_loss", "reward_alignment"):
            close(
                apart[column],
                torch.cat([getattr(by_loss[loss], column) for by_loss in found]).tolist(),
            )


def test_a_sample_of_tokens_is_a_part_of_all() -> None:
    student, teacher = double_model(), double_model(seed=1)
    pair, rollouts = model_pair(student, teacher), some_rollouts()[6:]
    frames = {
        count: pl.concat(
            stream_gradients(
                pair, rollouts, GradientSettings(method="exact", tokens_per_rollout=count)
            )
        )
        for count in (2, None)
    }
    keys = ["rollout_id", "position", "loss"]
    joined = frames[2].join(frames[None], on=keys, suffix="_all")
    assert joined.height == frames[2].height == 2 * 2 * 2
    close(
        torch.tensor(joined["grad_norm_sq"].to_list(), dtype=torch.float64),
        joined["grad_norm_sq_all"].to_list(),
    )
    products = "grad_dot_loss_plugin"  # L is the loss of all tokens in either
    close(
        torch.tensor(joined[products].to_list(), dtype=torch.float64),
        joined[f"{products}_all"].to_list(),
    )


def test_rows_keep_the_contract() -> None:
    pair = model_pair(double_model(), double_model(seed=1))
    empty = Rollout("e/0", "e", [3], [])
    frame = pl.concat(
        stream_gradients(pair, [*some_rollouts(), empty], GradientSettings(num_probes=3, seed=7))
    )
    assert validate(frame, GradientTable).height == 2 * sum(
        rollout.num_tokens for rollout in some_rollouts()
    )
    assert frame["num_probes"].unique().to_list() == [3]
    assert frame["seed"].unique().to_list() == [7]
    torch.testing.assert_close(
        frame.filter(
            pl.col("grad_norm_sq_se") * math.sqrt(3 / 2) > pl.col("grad_norm_sq") * (1 + 1e-12)
        ).height,
        0,
    )


def test_tokens_of_infinite_loss_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = double_model(tied=False), double_model(tied=False, seed=1)
    rollouts = [Rollout("a/0", "a", [3, 4], [5, 6, 7]), Rollout("b/0", "b", [3, 9], [5, 6])]
    clean = token_gradients(student=student, teacher=teacher, rollouts=rollouts, method="exact")
    pair = model_pair(student, teacher)
    plain = pair.teacher.head.__class__.__call__
    calls = []

    def masked(head: object, hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(head, hidden)
        if head is pair.teacher.head and len(hidden) == 3:  # the middle token of the longer rollout
            calls.append(1)
            logits = logits.clone()
            logits[1, 0] = -math.inf
        return logits

    head_class = type("Head", (pair.teacher.head.__class__,), {"__call__": masked})
    pair.teacher.head.__class__ = head_class
    with caplog.at_level(logging.WARNING):
        settings = GradientSettings(losses=("reverse_kl",), method="exact")
        frame = pl.concat(stream_gradients(pair, rollouts, settings))
    assert calls
    assert "1 tokens have an infinite loss" in caplog.text
    assert frame.filter(pl.col("rollout_id") == "a/0")["position"].to_list() == [0, 2]
    close(
        torch.tensor(frame["grad_norm_sq"].to_list(), dtype=torch.float64),
        clean["grad_norm_sq"][[0, 2, 3, 4]].tolist(),
    )
    assert frame["grad_dot_loss"].is_finite().all()


# ------------------------------------------------------------------------------------- forward mode


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_windows_and_caps_of_attention_are_kept(architecture: str) -> None:
    """Sliding windows and soft-capped scores, over more than one block of queries."""
    student = double_model(architecture)
    student.config.layer_types, student.config.sliding_window = ["sliding_attention"] * 2, 3
    student.model.has_sliding_layers = True
    for layer in student.model.layers:
        layer.self_attn.sliding_window = 3
        if architecture == "gemma2":
            layer.self_attn.attn_logit_softcapping = 0.5  # of the order of the scores
    pair = model_pair(student, None)
    scope = parameter_scope(student, pair.student.head, "all")
    tokens = torch.arange(150) * 5 % VOCABULARY
    with torch.no_grad():
        own = student.base_model(tokens[None]).last_hidden_state[0]
        plain = double_model(architecture).base_model(tokens[None]).last_hidden_state[0]
    assert float((own - plain).abs().max()) > 1e-2  # the window matters
    with ForwardMode(student, scope) as forward:
        torch.testing.assert_close(
            forward.primal(tokens), own, rtol=0, atol=TOLERANCE[architecture]
        )
        assert student.config._attn_implementation == forward_mode.BLOCKWISE
    small = Rollout("a/0", "a", tokens[:4].tolist(), tokens[4:9].tolist())
    exact = token_gradients(
        student=student, teacher=None, rollouts=[small], loss="negative_logprob", method="exact"
    )
    rows = oracle_gradients(student, student, [small], "negative_logprob")
    close(
        exact["grad_norm_sq"], [reference.inner(g, g) for _, _, g in rows], TOLERANCE[architecture]
    )
    close(exact["grad_dot_loss_plugin"], _plugin(rows), TOLERANCE[architecture])


def _plugin(rows: list[tuple[Rollout, int, dict[str, torch.Tensor]]]) -> list[float]:
    mean = reference.weighted_sum(
        [gradient for _, _, gradient in rows], [1 / len(rows)] * len(rows)
    )
    return [reference.inner(mean, gradient) for _, _, gradient in rows]


def test_tangents_over_several_blocks_equal_finite_differences() -> None:
    student = double_model("llama")
    scope = parameter_scope(student, model_pair(student, None).student.head, "all")
    tokens = torch.arange(300) * 7 % VOCABULARY
    direction = GaussianDirection(0, "a/0", 0)
    names = {name: parameter for name, parameter in scope.body.items() if name != scope.head_weight}
    body = replace(scope, body=names, head_weight=None)
    with ForwardMode(student, body) as forward:
        forward.primal(tokens)
        (tangent,) = forward.tangents([direction])
    step, ends = 1e-5, []
    for sign in (1, -1):
        moved = double_model("llama")
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in names:
                    parameter.add_(direction.tensor(name, parameter), alpha=sign * step)
            ends.append(moved.base_model(tokens[None]).last_hidden_state[0])
    expected = (ends[0] - ends[1]) / (2 * step)
    assert float((tangent - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_attention_of_another_kind_falls_back_on_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = double_model(), double_model(seed=1)
    rollouts = some_rollouts()[:2]
    expected = token_gradients(student=student, teacher=teacher, rollouts=rollouts, num_probes=4)
    attend = forward_mode.attend
    monkeypatch.setattr(forward_mode, "attend", lambda form, q, k, v: attend(form, q, k, v) * 1.5)
    with caplog.at_level(logging.INFO):
        found = token_gradients(student=student, teacher=teacher, rollouts=rollouts, num_probes=4)
    assert "'sdpa' has no forward-mode rule: 'eager' stands in for it" in caplog.text
    close(
        found["grad_norm_sq"], expected["grad_norm_sq"].tolist(), 1e-5
    )  # the softmax of eager attention is in float32
    close(found["grad_dot_loss_plugin"], expected["grad_dot_loss_plugin"].tolist(), 1e-5)


@pytest.mark.parametrize("method", ["probe", "exact"])
def test_models_are_left_as_they_were(method: str) -> None:
    student, teacher = double_model("gpt2"), double_model("gpt2", seed=1)
    student.train()
    first = next(student.parameters())
    first.requires_grad_(False)
    first.grad = torch.ones_like(first)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    flags = [parameter.requires_grad for parameter in student.parameters()]
    attention = student.config._attn_implementation
    own_forwards = [module for module in student.modules() if "forward" in module.__dict__]
    token_gradients(
        student=student, teacher=teacher, rollouts=some_rollouts()[:1], num_probes=2, method=method
    )
    assert student.training
    assert student.config._attn_implementation == attention
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    assert [module for module in student.modules() if "forward" in module.__dict__] == own_forwards
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(parameter.grad is None for parameter in list(student.parameters())[1:])
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in student.named_parameters()
    )


def test_a_parameter_that_another_module_uses_is_seen() -> None:
    student, teacher = double_model(), double_model(seed=1)
    attention = student.model.layers[0].self_attn
    attention.q_proj.forward = types.MethodType(
        lambda self, x: torch.nn.functional.linear(x, self.weight) + x @ attention.o_proj.weight,
        attention.q_proj,
    )
    options = {"student": student, "teacher": teacher, "rollouts": some_rollouts()[:1]}
    exact = token_gradients(**options, method="exact")
    probed = token_gradients(**options, num_probes=64)
    ratio = probed["grad_norm_sq"] / exact["grad_norm_sq"]
    assert ((ratio - 1).abs() < 5 * (2 / 64) ** 0.5).all()


def test_parameters_of_a_module_with_children_are_seen() -> None:
    """Directions then go one at a time, since such a module cannot take a batch of them."""

    class Gated(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.gate = torch.nn.Parameter(torch.randn(32, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.gate

    student, teacher = double_model(), double_model(seed=1)
    student.model.layers[1].mlp = Gated(student.model.layers[1].mlp)
    found = token_gradients(
        student=student, teacher=teacher, rollouts=some_rollouts()[4:5], num_probes=3
    )
    rows = oracle_gradients(student, teacher, some_rollouts()[4:5], "reverse_kl")
    close(found["grad_dot_loss_plugin"], _plugin(rows))
    assert (found["grad_norm_sq"] > 0).all()


def test_adapters_are_a_scope() -> None:
    from peft import LoraConfig, get_peft_model

    teacher = double_model(seed=1)
    base = double_model()
    student = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    student.double()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    pair, rollouts = model_pair(student, teacher), some_rollouts()[2:4]
    scope = parameter_scope(student, pair.student.head, "lora")
    assert len(scope.parameters) == 2 * 2 * 3
    assert all("lora_" in name for name in scope.parameters)
    exact = token_gradients(
        student=student, teacher=teacher, rollouts=rollouts, method="exact", param_scope="lora"
    )
    probed = token_gradients(
        student=student, teacher=teacher, rollouts=rollouts, num_probes=400, param_scope="lora"
    )
    rows = oracle_gradients(student, teacher, rollouts, "reverse_kl", "lora")
    close(exact["grad_norm_sq"], [reference.inner(gradient, gradient) for _, _, gradient in rows])
    close(probed["grad_dot_loss_plugin"], exact["grad_dot_loss_plugin"].tolist())
    assert (
        float(
            ((probed["grad_norm_sq"] - exact["grad_norm_sq"]) / probed["grad_norm_sq_se"])
            .abs()
            .max()
        )
        < 5
    )


# ---------------------------------------------------------------------------- scopes and directions


def test_scopes_partition_the_parameters() -> None:
    for tied in (True, False):
        student = double_model(tied=tied)
        head = model_pair(student, None).student.head
        names = {
            scope: set(parameter_scope(student, head, scope).parameters)
            for scope in ("all", "body", "head", "last:1", "last:2")
        }
        assert (
            names["all"] == names["body"] | names["head"] == set(dict(student.named_parameters()))
        )
        assert not names["body"] & names["head"]
        assert ("model.embed_tokens.weight" in names["body"]) is not tied
        assert all(name.startswith("model.layers.1.") for name in names["last:1"])
        assert len(names["last:2"]) == 2 * len(names["last:1"])


@pytest.mark.parametrize(
    ("scope", "error", "message"),
    [
        ("last:3", OptionError, "N from 1 to 2"),
        ("last:0", OptionError, "N from 1 to 2"),
        ("last:x", OptionError, "N from 1 to 2"),
        ("last", UnknownNameError, "last:N"),
        ("all:1", UnknownNameError, "parameter scope"),
        ("bodies", UnknownNameError, "did you mean 'body'"),
        ("lora", ModelError, "no parameters in the scope 'lora'"),
    ],
)
def test_scopes_that_do_not_exist_are_refused(
    scope: str, error: type[Exception], message: str
) -> None:
    student = double_model()
    with pytest.raises(error, match=message):
        parameter_scope(student, model_pair(student, None).student.head, scope)


def test_wrong_choices_are_refused() -> None:
    student = double_model()
    with pytest.raises(UnknownNameError, match="reverse_kl"):
        token_gradients(
            student=student,
            teacher=student,
            rollouts=some_rollouts()[:1],
            loss="reverse",
            num_probes=1,
        )
    with pytest.raises(UnknownNameError, match="rollout, token"):
        token_gradients(
            student=student, teacher=student, rollouts=some_rollouts()[:1], loss_aggregation="mean"
        )
    with pytest.raises(OptionError, match="teacher"):
        token_gradients(student=student, teacher=None, rollouts=some_rollouts()[:1], num_probes=1)


def test_gaussian_directions_are_standard_normal_and_keyed() -> None:
    like = torch.empty(BLOCK + 1000)
    draw = GaussianDirection(3, "a/0", 1).tensor("w", like)
    assert abs(float(draw.mean())) < 5 / len(like) ** 0.5
    assert abs(float(draw.square().mean()) - 1) < 5 * (2 / len(like)) ** 0.5
    assert abs(float(draw.pow(4).mean()) - 3) < 5 * (96 / len(like)) ** 0.5
    assert torch.equal(draw, GaussianDirection(3, "a/0", 1).tensor("w", like))
    others = [
        GaussianDirection(4, "a/0", 1),
        GaussianDirection(3, "a/1", 1),
        GaussianDirection(3, "a/0", 2),
    ]
    for other in [other.tensor("w", like) for other in others] + [
        GaussianDirection(3, "a/0", 1).tensor("x", like)
    ]:
        assert abs(float((draw * other).mean())) < 5 / len(like) ** 0.5
    assert not torch.equal(draw[:512], draw[BLOCK:][:512])
    torch.set_num_threads(3)
    assert torch.equal(draw, GaussianDirection(3, "a/0", 1).tensor("w", like))
    rounded = GaussianDirection(3, "a/0", 1).tensor("w", like.bfloat16())
    assert torch.equal(rounded, draw.bfloat16())


def test_stored_directions_survive_the_disk(tmp_path: object) -> None:
    gradient = {"a.weight": torch.randn(3, 4), "b": torch.randn(5)}
    original = {name: tensor.clone() for name, tensor in gradient.items()}
    direction = StoredDirection.normalised(gradient)
    stored = direction.save(tmp_path / "reverse_kl-0")
    assert stored.scale == pytest.approx(
        sum(float(t.square().sum()) for t in original.values()) ** 0.5
    )
    for name, tensor in original.items():
        torch.testing.assert_close(stored.tensor(name, tensor) * stored.scale, tensor)
    rows = torch.tensor([0, 2])
    torch.testing.assert_close(
        stored.rows("a.weight", original["a.weight"], rows) * stored.scale,
        original["a.weight"][rows],
    )
    assert not list(tmp_path.glob("*.part"))


def test_gradients_on_disk_are_used_again(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, rollouts = model_pair(double_model(), double_model(seed=1)), some_rollouts()
    settings = GradientSettings(num_probes=2)
    first = pl.concat(stream_gradients(pair, rollouts, settings, folder=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}-{fold}" for name in ("reverse_kl", "forward_kl", REWARD) for fold in (0, 1)
    }
    monkeypatch.setattr("tip_analysis.gradients.loss_gradients.weighted_gradient", None)
    again = pl.concat(stream_gradients(pair, rollouts, settings, folder=tmp_path))
    assert first.equals(again)
    part = pl.concat(stream_gradients(pair, rollouts, settings, folder=tmp_path, only=[5, 2]))
    assert part.equals(
        first.filter(pl.col("rollout_id") == "p2/1").vstack(
            first.filter(pl.col("rollout_id") == "p1/0")
        )
    )


def test_stratified_positions_take_one_from_each_stretch() -> None:
    for num_tokens, num_samples in [(100, 7), (8, 8), (9, 8)]:
        chosen = stratified_positions(num_tokens, num_samples, seed=1, rollout_id="a/0")
        assert len(chosen) == num_samples
        for index, position in enumerate(chosen):
            assert (
                index * num_tokens // num_samples
                <= position
                < (index + 1) * num_tokens // num_samples
            )
    samples = {
        tuple(stratified_positions(100, 7, seed=seed, rollout_id="a/0")) for seed in range(5)
    }
    assert len(samples) == 5


# --------------------------------------------------------------------------------------- real model


@pytest.mark.real_model
@pytest.mark.timeout(1800)
def test_probes_of_a_real_model_agree_with_backward_passes_and_with_low_precision() -> None:
    """SmolLM2 as its own teacher under another prompt: exact norms in float32, probes in float32
    and bfloat16."""
    from tip_analysis.gradients.loss_gradients import LossDirections
    from tip_analysis.models.loading import load_model

    torch.set_num_threads(max(1, (torch.get_num_threads() + 1) // 2))
    measured = {}
    for dtype, method in [("float32", "exact"), ("float32", "probe"), ("bfloat16", "probe")]:
        model = load_model("smollm2-135m-instruct", dtype=dtype, device="cpu")
        encode = model.tokenizer
        prompt, shown = (
            encode("The capital of France")["input_ids"],
            encode("Berlin, Germany. The capital of")["input_ids"],
        )
        response = encode(" is Paris, a city on the river Seine with two million people.")[
            "input_ids"
        ]
        rollout = Rollout("a/0", "a", prompt, response, shown)
        settings = GradientSettings(method=method, num_probes=32)
        nothing = LossDirections({"a": 0}, {}, (1.0, 0.0), {})
        ((_, found),) = measure_rollouts(
            model_pair(model, model), [rollout], settings, directions=nothing
        )
        measured[dtype, method] = found
    for loss in ("reverse_kl", "forward_kl"):
        exact = measured["float32", "exact"][loss].grad_norm_sq
        probed, low = measured["float32", "probe"][loss], measured["bfloat16", "probe"][loss]
        bottom, top = norm_interval(
            probed.grad_norm_sq, probed.grad_norm_sq_se, 32, level=1 - 0.01 / len(exact)
        )
        assert ((bottom <= exact) & (exact <= top)).all()
        # The probes are the same; what differs is the model, whose weights and activations are
        # rounded.
        stated = (low.grad_norm_sq_se.square() + probed.grad_norm_sq_se.square()).sqrt()
        assert ((low.grad_norm_sq - probed.grad_norm_sq).abs() <= 2 * stated).all()
        assert float(((low.grad_norm_sq - probed.grad_norm_sq) / stated).abs().median()) < 0.75


@pytest.mark.real_model
@pytest.mark.timeout(1800)
def test_energy_shares_of_a_real_model_lie_within_two_stated_errors_of_exact() -> None:
    """SmolLM2 as its own teacher under another prompt, over five sentences."""
    from tip_analysis.gradients.loss_gradients import LossDirections
    from tip_analysis.models.loading import load_model

    torch.set_num_threads(max(1, (torch.get_num_threads() + 1) // 2))
    model = load_model("smollm2-135m-instruct", dtype="float32", device="cpu")
    encode = model.tokenizer
    sentences = [
        ("The capital of France", " is Paris, a city on the river", "Berlin, Germany."),
        ("Seven plus five", " equals twelve, and twelve is even", "Count carefully."),
        ("Water boils", " at one hundred degrees at sea level", "In Fahrenheit:"),
        ("The largest planet", " is Jupiter, far from the sun", "Small planets first."),
        ("In winter the birds", " fly south to find warm air", "Penguins stay."),
    ]
    rollouts = [
        Rollout(
            f"{i}/0",
            f"{i}",
            encode(prompt)["input_ids"],
            encode(said)["input_ids"],
            encode(f"{hint} {prompt}")["input_ids"],
        )
        for i, (prompt, said, hint) in enumerate(sentences)
    ]
    nothing = LossDirections({rollout.prompt_id: 0 for rollout in rollouts}, {}, (1.0, 0.0), {})
    rows = []
    for rollout in rollouts:
        student = response_logits(model.model, list(rollout.prompt), list(rollout.response))
        teacher = response_logits(
            model.model, list(rollout.teacher_prompt or []), list(rollout.response)
        )
        found = token_statistics(student=student, teacher=teacher)
        values = zip(found["student_entropy"].tolist(), found["reverse_kl"].tolist(), strict=True)
        rows += [(rollout.rollout_id, rollout.prompt_id, t, *pair) for t, pair in enumerate(values)]
    names = ["rollout_id", "prompt_id", "position", "student_entropy", "reverse_kl"]
    tokens = pl.DataFrame(rows, schema=names, orient="row").with_columns(batch_id=0, loss_mask=True)
    tables = {}
    for method in ("exact", "probe"):
        settings = GradientSettings(losses=("reverse_kl",), method=method, num_probes=32)
        measured = measure_rollouts(
            model_pair(model, model), rollouts, settings, directions=nothing
        )
        norms = pl.Series(
            "grad_norm_sq",
            torch.cat([found["reverse_kl"].grad_norm_sq for _, found in measured]).numpy(),
        )
        table = quadrant_statistics(
            tokens.with_columns(norms), divergence_cut="median", num_resamples=200
        )
        tables[method] = table.filter(
            pl.col("statistic") == "share_grad_norm_sq", pl.col("num_tokens") > 0
        )
    exact, probed = (tables[method]["value"].to_numpy() for method in ("exact", "probe"))
    assert exact.max() < 0.999
    assert (abs(probed - exact) <= 2 * tables["probe"]["se"].to_numpy()).all()
    assert abs(probed - exact).max() < 0.1
