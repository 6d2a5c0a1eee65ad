"""Weightings, losses and optimizers inside a training: against plain steps, and what must not
change."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from tiny_training import BASE, fixed, make_trainer, multi_turn_rollouts, pair, run, weights_of

from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.names import TrainingLoss
from tip_analysis.training.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from tip_analysis.training.masked_loss import scaled_weights, token_weights
from tip_analysis.training.optimizers import update_norm
from tip_analysis.training.step_selection import step_table, weigh_step
from tip_analysis.training.students import prepare_student
from tip_analysis.training.trainer import Trainer


def scaled(weights, selected, rollouts, scale, normalizer="selected", aggregation="rollout"):
    return scaled_weights(
        np.array(weights, dtype=float),
        np.array(selected, dtype=bool),
        np.array(rollouts),
        scale=scale,
        loss_normalizer=normalizer,
        loss_aggregation=aggregation,
    )


def test_scaled_weights_by_hand():
    selected, rollouts, weights = [1, 1, 0, 1], [0, 0, 0, 1], [4.0, 2.0, 1.0, 1.0]
    assert scaled(weights, selected, rollouts, "none").tolist() == [1.0, 0.5, 0.0, 0.5]
    assert scaled(weights, selected, rollouts, "mean_one").tolist() == [0.5, 0.25, 0.0, 0.25]
    assert scaled(weights, selected, rollouts, "all_tokens") == pytest.approx(
        [2 / 3, 1 / 3, 0, 0.5]
    )
    assert scaled(weights, selected, rollouts, "its_sum") == pytest.approx([1 / 3, 1 / 6, 0, 0.5])
    token = scaled(weights, selected, rollouts, "its_sum", aggregation="token")
    assert token == pytest.approx([4 / 7, 2 / 7, 0, 1 / 7])
    assert scaled([0.0] * 4, selected, rollouts, "mean_one").tolist() == [0.0] * 4
    even = scaled([3.0] * 4, selected, rollouts, "mean_one")
    plain = token_weights(
        np.array(selected, dtype=bool),
        np.array(rollouts),
        loss_normalizer="selected",
        loss_aggregation="rollout",
    )
    np.testing.assert_allclose(even, plain)


@pytest.mark.parametrize("weighting", ["soft_or", "quadrant:Q1", "iw_opd", "ta_opd", "position"])
def test_an_update_is_that_of_the_weighted_sum_of_token_losses(weighting):
    """The gradient of a weighted step is Σ w ∇ℓ, token by token, with the weights of the table."""
    options = replace(BASE, weighting=weighting, max_grad_norm=None, optimizer="sgd")
    trainer = make_trainer(options)
    rollouts = trainer.source.rollouts(0, trainer.student)
    written = [r.written for r in rollouts]
    kept = trainer._score(rollouts, [[list(range(len(rollouts)))]], trainer.columns)
    table = step_table(rollouts, kept.statistics, step=0)
    raw = weigh_step(table, weighting=weighting, rule="all", retention_ratio=1.0)
    if weighting != "iw_opd":
        raw = raw / raw.mean()
    counts = [r.num_tokens for r in rollouts]
    expected = raw / np.repeat(counts, counts) / len(rollouts)
    before = weights_of(trainer)
    student = trainer.hidden(trainer.student, rollouts, written)
    with torch.no_grad():
        teacher = trainer.hidden(trainer.teacher, rollouts, written, teacher=True)
        q = trainer.teacher.head(teacher)[:, : trainer.vocab_size].log_softmax(-1)
    p = trainer.student.head(student)[:, : trainer.vocab_size].log_softmax(-1)
    loss = (torch.from_numpy(expected) * (p.exp() * (p - q)).sum(-1)).sum()
    gradients = torch.autograd.grad(loss, list(trainer.parameters.values()))
    record = trainer.update_on(rollouts)
    assert record.loss == pytest.approx(float(loss.detach()), rel=1e-8)
    for gradient, (name, value) in zip(gradients, trainer.parameters.items(), strict=True):
        torch.testing.assert_close(
            value.detach(), before[name] - options.learning_rate * gradient, rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("loss", list(TrainingLoss))
def test_every_loss_trains_in_any_number_of_micro_batches_and_chunks(loss):
    options = replace(BASE, loss=loss, rule="random", retention_ratio=0.5, num_steps=2)
    one = make_trainer(options)
    other = make_trainer(replace(options, micro_batch_size=1, chunk_size=3, dynamics_every=0))
    np.testing.assert_allclose(run(one), run(other), rtol=1e-7)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(value, other.parameters[name].detach(), rtol=1e-6, atol=1e-8)


def test_weights_of_a_whole_sample_are_those_of_all_tokens():
    everything = make_trainer()
    sampled = make_trainer(replace(BASE, rule="random", weighting="horvitz_thompson"))
    np.testing.assert_allclose(run(everything), run(sampled), rtol=1e-9)


def test_a_weighting_that_nothing_weighs_in_trains_nothing():
    options = replace(BASE, weighting="quadrant:Q1", entropy_cut=50.0, num_steps=1)
    trainer = make_trainer(options)
    before = weights_of(trainer)
    record = trainer.train_step()
    assert (record.updated, record.tokens_trained) == (False, 0)
    assert all(torch.equal(value, trainer.parameters[name]) for name, value in before.items())


def test_fixed_weights_are_used_and_survive_a_checkpoint(tmp_path):
    student, teacher = pair()
    rollouts = multi_turn_rollouts()
    masks = {r.rollout_id: r.written for r in rollouts}
    rng = np.random.default_rng(0)
    weights = {r.rollout_id: rng.random(len(r.response)) * r.written for r in rollouts}
    options = replace(BASE, weighting="soft_or", rescore_every=2)

    def trainer():
        return Trainer(
            student=prepare_student(student, options),
            teacher=teacher,
            source=replace(fixed(rollouts, masks), weights=weights),
            options=options,
        )

    whole, first = trainer(), trainer()
    losses = run(whole)
    for _ in range(3):  # past the step that makes masks and weights again
        first.train_step()
    save_checkpoint(first, tmp_path)
    resumed = trainer()
    load_checkpoint(resumed, latest_checkpoint(tmp_path))
    for name, values in first.source.weights.items():
        np.testing.assert_array_equal(resumed.source.weights[name], values)
        assert not np.allclose(values, weights[name])
    assert run(resumed) == pytest.approx(losses[3:], rel=1e-9)
    plain = Trainer(
        student=prepare_student(student, BASE),
        teacher=teacher,
        source=fixed(rollouts, masks),
        options=BASE,
    )
    assert plain.train_step().loss != pytest.approx(losses[0])


def test_gradients_are_needed_where_a_weighting_reads_them():
    with pytest.raises(OptionError, match="needs measured gradients"):
        make_trainer(replace(BASE, weighting="oracle"))
    with pytest.raises(UnknownNameError, match="weighting 'softor'"):
        replace(BASE, weighting="softor")


def test_quadrants_of_a_step_are_by_its_own_cuts():
    options = replace(BASE, rule="quadrant:Q3", num_steps=1)
    trainer = make_trainer(options)
    rollouts = trainer.source.rollouts(0, trainer.student)
    kept = trainer._score(rollouts, [[list(range(len(rollouts)))]], trainer.columns)
    selected, _ = trainer.select(rollouts, kept.statistics)
    entropy, delta = kept.statistics["student_entropy"], kept.statistics["reverse_kl"]
    expected = (entropy <= np.median(entropy)) & (delta > delta.mean())
    np.testing.assert_array_equal(selected, expected)


# --------------------------------------------------------------------------------- optimizers


def test_sgd_steps_along_the_clipped_gradient():
    options = replace(BASE, optimizer="sgd", num_steps=1, schedule="constant", max_grad_norm=0.01)
    trainer = make_trainer(options)
    before = list(weights_of(trainer).values())
    record = trainer.train_step()
    assert record.grad_norm > 0.01
    length = update_norm(list(trainer.parameters.values()), before)
    assert length == pytest.approx(0.01 * options.learning_rate, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_matched_steps_have_the_length_that_was_asked_for(optimizer):
    options = replace(BASE, optimizer=optimizer, match_update_norm=0.05)
    trainer = make_trainer(options)
    for _ in range(options.num_steps):
        before = list(weights_of(trainer).values())
        record = trainer.train_step()
        length = update_norm(list(trainer.parameters.values()), before)
        scale = record.learning_rate / options.learning_rate
        assert length == pytest.approx(0.05 * scale, rel=1e-6)


def test_a_large_epsilon_makes_steps_proportional_to_the_gradient():
    """m/(√v + ε) is m/ε where ε is far above √v: half the gradient, half the step."""
    lengths = {}
    for clip in (1e-3, 5e-4):
        trainer = make_trainer(replace(BASE, adam_epsilon=1e3, max_grad_norm=clip, num_steps=1))
        before = list(weights_of(trainer).values())
        trainer.train_step()
        lengths[clip] = update_norm(list(trainer.parameters.values()), before)
    assert lengths[1e-3] == pytest.approx(2 * lengths[5e-4], rel=1e-4)


def test_weight_decay_is_decoupled_under_sgd():
    options = replace(BASE, optimizer="sgd", weight_decay=0.5, num_steps=1, schedule="constant")
    decayed, plain = make_trainer(options), make_trainer(replace(options, weight_decay=0.0))
    before = weights_of(plain)
    decayed.train_step()
    plain.train_step()
    for name, value in plain.parameters.items():
        shrunk = value.detach() - options.learning_rate * 0.5 * before[name]
        torch.testing.assert_close(decayed.parameters[name].detach(), shrunk)


@pytest.mark.parametrize(
    "bad",
    [
        {"optimizer": "adam"},
        {"adam_epsilon": 0.0},
        {"momentum": 1.0},
        {"match_update_norm": 0.0},
        {"jsd_beta": 1.0},
        {"entropy_cut": "often"},
        {"dynamics_every": -1},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(bad):
    with pytest.raises((OptionError, UnknownNameError)):
        replace(BASE, **bad)


# ----------------------------------------------------------------------------------- dynamics


def test_observed_steps_say_what_the_rollouts_were_like():
    trainer = make_trainer(replace(BASE, rule="soft_or", retention_ratio=0.5))
    rollouts = trainer.source.rollouts(0, trainer.student)
    record = trainer.train_step()
    found = record.observed
    assert found["response_tokens"] == np.mean([len(r.response) for r in rollouts])
    assert found["truncated_share"] == np.mean([r.truncated for r in rollouts])
    assert found["soft_or_overlap"] == 1.0
    assert sum(found[f"share_q{i}"] for i in range(1, 5)) == pytest.approx(1.0)
    assert 0.0 < found["topk_overlap"] <= 1.0
    other = make_trainer(replace(BASE, rule="random", retention_ratio=0.5)).train_step()
    assert 0.0 < other.observed["soft_or_overlap"] < 1.0


def test_what_is_observed_does_not_depend_on_how_work_is_cut_nor_change_the_training():
    one = make_trainer()
    other = make_trainer(replace(BASE, micro_batch_size=1))
    none = make_trainer(replace(BASE, dynamics_every=0))
    some = make_trainer(replace(BASE, dynamics_every=3))
    losses = [run(trainer) for trainer in (one, other, none, some)]
    for found in losses[1:]:
        np.testing.assert_allclose(found, losses[0], rtol=1e-9)
    assert [bool(record.observed) for record in none.history] == [False] * 4
    assert [bool(record.observed) for record in some.history] == [True, False, False, True]
    for ours, theirs in zip(one.history, other.history, strict=True):
        # a token at a cut may fall on either side of it
        assert ours.observed == pytest.approx(theirs.observed, rel=0.1, abs=0.03)
        for name in ("student_entropy", "reverse_kl", "response_tokens", "topk_overlap"):
            assert ours.observed[name] == pytest.approx(theirs.observed[name], rel=1e-9)
    table = pl.DataFrame([record.observed for record in one.history])
    assert table.height == 4
