import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import (
    BASE,
    encoded,
    fixed,
    make_trainer,
    multi_turn_rollouts,
    pair,
    run,
    weights_of,
)

from tip_analysis.analysis.rules import RULES, register_rule
from tip_analysis.core.errors import (
    ConfigurationMismatchError,
    LogitsError,
    OptionError,
    PromptFileError,
    RunError,
    UnknownNameError,
)
from tip_analysis.core.names import Loss
from tip_analysis.rollouts.encoded import encode_prompts
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.training.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from tip_analysis.training.data import prompts_of_step
from tip_analysis.training.options import learning_rate_at
from tip_analysis.training.step_selection import needed_statistics
from tip_analysis.training.students import prepare_student
from tip_analysis.training.trainer import Trainer, trained

ON_POLICY_RULES = sorted(name for name, rule in RULES.items() if not rule.needs_gradients)
WHOLE_RULES = [name for name in ON_POLICY_RULES if not RULES[name].partial]


def assert_same_training(one, other, tolerance=1e-9):
    np.testing.assert_allclose(run(one), run(other), rtol=tolerance)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(
            value, other.parameters[name].detach(), rtol=tolerance, atol=tolerance
        )


def plain_step(student, teacher, rollouts, masks, loss, normalizer, aggregation, vocab_size):
    """The loss of one step and its gradient, the obvious way: one rollout at a time, all logits,
    plain formulas."""
    means, counts = [], []
    for rollout in rollouts:
        kept = [t for t in range(len(rollout.response)) if masks[rollout.rollout_id][t]]
        written = int(rollout.written.sum())
        values = []
        for t in kept:
            before = rollout.response[:t]
            s = (
                student(torch.tensor([rollout.prompt + before]))
                .logits[0, -1, :vocab_size]
                .log_softmax(-1)
            )
            with torch.no_grad():
                q = (
                    teacher(torch.tensor([rollout.teacher_prompt + before]))
                    .logits[0, -1, :vocab_size]
                    .log_softmax(-1)
                )
            mixture = (0.5 * (s.exp() + q.exp())).log()
            values.append(
                {
                    "reverse_kl": (s.exp() * (s - q)).sum(),
                    "forward_kl": (q.exp() * (q - s)).sum(),
                    "jsd": (
                        0.5 * ((s.exp() * (s - mixture)).sum() + (q.exp() * (q - mixture)).sum())
                    ),
                }[loss]
            )
        divisor = len(kept) if normalizer == "selected" else written
        if divisor:
            means.append(sum(values, torch.zeros((), dtype=torch.float64)))
            counts.append(divisor)
    if aggregation == "token":
        return sum(means) / sum(counts)
    return sum(mean / count for mean, count in zip(means, counts, strict=True)) / len(means)


# --------------------------------------------------------------------- one step against the obvious


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
@pytest.mark.parametrize(
    ("normalizer", "aggregation"),
    [("selected", "rollout"), ("all", "rollout"), ("selected", "token")],
)
def test_a_step_is_the_obvious_one(architecture, normalizer, aggregation, monkeypatch):
    student, teacher = pair(architecture, tied=architecture != "llama")
    rollouts = multi_turn_rollouts()
    masks = {r.rollout_id: r.written & (np.arange(len(r.response)) % 3 != 1) for r in rollouts}
    masks["p1/1"] = np.zeros(4, dtype=bool)
    for loss in ("reverse_kl", "forward_kl", "jsd"):
        options = replace(
            BASE,
            loss=Loss(loss),
            loss_normalizer=normalizer,
            loss_aggregation=aggregation,
            micro_batch_size=3,
            chunk_size=2,
        )
        options = replace(options, max_grad_norm=None)
        trainer = Trainer(
            student=prepare_student(student, options),
            teacher=teacher,
            source=fixed(rollouts, masks),
            options=options,
        )
        expected = plain_step(
            trainer.student.model,
            teacher.model,
            rollouts,
            masks,
            loss,
            normalizer,
            aggregation,
            trainer.vocab_size,
        )
        gradients = dict(
            zip(
                trainer.parameters,
                torch.autograd.grad(expected, list(trainer.parameters.values())),
                strict=True,
            )
        )
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        record = trainer.train_step()
        assert record.loss == pytest.approx(expected.item(), rel=1e-6)
        for name, parameter in trainer.parameters.items():
            # norms and rotations are float32 inside the models, whatever the dtype
            atol = 1e-5 * gradients[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=atol)
        assert record.grad_norm == pytest.approx(
            float(torch.cat([g.flatten() for g in gradients.values()]).norm()), rel=1e-5
        )


def test_on_policy_statistics_and_selection_are_those_of_the_table(monkeypatch):
    """The light path of a step selects what `select_tokens` selects from fully scored tokens."""
    from tip_analysis.training import step_selection

    by_columns = make_trainer(replace(BASE, rule="soft_or", retention_ratio=0.3))
    record = by_columns.train_step()
    # everything that `token_statistics` has comes from there
    overlap = {"topk_overlap": step_selection.topk_overlap}
    monkeypatch.setattr(step_selection, "_SINGLE", overlap)
    by_table = make_trainer(replace(BASE, rule="soft_or", retention_ratio=0.3))
    again = by_table.train_step()
    assert record.tokens_trained == again.tokens_trained
    assert record.loss == pytest.approx(again.loss, rel=1e-9)


# ------------------------------------------------------------------------------------- equivalences


@pytest.mark.parametrize("rule", WHOLE_RULES)
def test_ratio_one_is_all_tokens_step_for_step(rule):
    everything = make_trainer()
    assert_same_training(make_trainer(replace(BASE, rule=rule)), everything)
    assert everything.history[0].tokens_trained == everything.history[0].tokens_seen


@pytest.mark.parametrize("rule", ["all", "soft_or", "entropy_sampling"])
@pytest.mark.parametrize("scope", ["rollout", "batch"])
def test_accumulation_gives_the_numbers_of_one_big_batch(rule, scope):
    options = replace(BASE, rule=rule, retention_ratio=0.5, selection_scope=scope)
    assert_same_training(
        make_trainer(replace(options, micro_batch_size=1)),
        make_trainer(replace(options, micro_batch_size=8)),
    )


@pytest.mark.parametrize(
    "pieces",
    [
        {"token_budget": 1},
        {"token_budget": 50},
        {"chunk_size": 1},
        {"gradient_checkpointing": True},
        {"micro_batch_size": 3},
    ],
    ids=str,
)
def test_how_work_is_cut_changes_nothing(pieces):
    options = replace(BASE, rule="q3", retention_ratio=0.4)
    assert_same_training(make_trainer(replace(options, **pieces)), make_trainer(options))


def test_sampling_in_small_batches_changes_nothing():
    assert_same_training(make_trainer(budget=1), make_trainer())


def test_arms_of_one_seed_begin_with_the_same_rollouts():
    first = make_trainer(replace(BASE, rule="random", retention_ratio=0.2))
    other = make_trainer(replace(BASE, rule="soft_or", retention_ratio=0.5))
    ours, theirs = (t.source.rollouts(0, t.student) for t in (first, other))
    assert [r.response for r in ours] == [r.response for r in theirs]
    another_seed = make_trainer(replace(BASE, seed=1))
    assert [r.response for r in another_seed.source.rollouts(0, another_seed.student)] != [
        r.response for r in ours
    ]
    assert [r.rollout_id for r in ours[:2]] == [
        f"0/{ours[0].prompt_id}/0",
        f"0/{ours[0].prompt_id}/1",
    ]


def test_a_number_of_tokens_in_proportion_to_the_ratio_is_trained_on():
    record = make_trainer(replace(BASE, rule="entropy", retention_ratio=0.5)).train_step()
    trainer = make_trainer()
    lengths = [len(r.response) for r in trainer.source.rollouts(0, trainer.student)]
    assert record.tokens_trained == sum(max(1, length // 2) for length in lengths)
    assert record.tokens_seen == sum(lengths)


# ------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "extra", [{}, {"lora_rank": 2}, {"precision": "float32", "warmup_steps": 2}], ids=str
)
def test_a_resumed_training_ends_with_the_same_weights(extra, tmp_path):
    options = replace(BASE, rule="entropy_sampling", retention_ratio=0.5, num_steps=6, **extra)
    whole = make_trainer(options)
    run(whole)
    first = make_trainer(options)
    list(trained(first, until=3))
    save_checkpoint(first, tmp_path)
    second = make_trainer(options)
    load_checkpoint(second, latest_checkpoint(tmp_path))
    run(second)
    assert second.history[0].loss == first.history[0].loss
    for name, value in weights_of(whole).items():
        assert torch.equal(value, second.parameters[name]), name


def test_checkpoints_replace_their_predecessors_and_refuse_strangers(tmp_path):
    trainer = make_trainer()
    for _ in trained(trainer, until=3):
        save_checkpoint(trainer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    with pytest.raises(ConfigurationMismatchError, match="learning_rate"):
        load_checkpoint(make_trainer(replace(BASE, learning_rate=1.0)), tmp_path / "step-000002")
    with pytest.raises(RunError, match="no whole checkpoint"):
        load_checkpoint(make_trainer(), tmp_path / "step-000009")
    state = tmp_path / "step-000002" / "state.json"
    state.write_text(state.read_text("utf-8")[:-5], "utf-8")
    with pytest.raises(RunError, match="no whole checkpoint"):
        load_checkpoint(make_trainer(), tmp_path / "step-000002")
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["weights", "optimizer"])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-1] + b"x"])
def test_a_damaged_checkpoint_is_refused_and_leaves_the_trainer_alone(tmp_path, name, damage):
    trainer = make_trainer()
    trainer.train_step()
    path = save_checkpoint(trainer, tmp_path)
    file = path / f"{name}.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    other = make_trainer()
    before = {name: value.clone() for name, value in other.parameters.items()}
    with pytest.raises(RunError, match=rf"no whole checkpoint: {name}.safetensors was altered"):
        load_checkpoint(other, path)
    assert other.step == 0
    assert all(torch.equal(before[name], value) for name, value in other.parameters.items())


def test_pieces_may_change_on_resume(tmp_path):
    trainer = make_trainer()
    trainer.train_step()
    path = save_checkpoint(trainer, tmp_path)
    other = make_trainer(replace(BASE, micro_batch_size=2, token_budget=100))
    load_checkpoint(other, path)
    assert other.step == 1
    assert json.loads((path / "state.json").read_text("utf-8"))["step"] == 1


# ---------------------------------------------------------------------------------- masks and drift


def test_an_all_false_mask_changes_nothing_and_says_so(caplog):
    rollouts = multi_turn_rollouts()
    student, teacher = pair()
    options = replace(BASE, weight_decay=0.5)
    masks = {r.rollout_id: np.zeros(len(r.response), dtype=bool) for r in rollouts}
    trainer = Trainer(
        student=prepare_student(student, options),
        teacher=teacher,
        source=fixed(rollouts, masks),
        options=options,
    )
    before = weights_of(trainer)
    with caplog.at_level(logging.WARNING):
        record = trainer.train_step()
    assert "no token is selected" in caplog.text
    assert not record.updated
    assert record.tokens_trained == 0
    for name, value in before.items():
        assert torch.equal(value, trainer.parameters[name])


def test_tokens_that_the_student_did_not_write_are_never_trained_on():
    rollouts = multi_turn_rollouts()
    student, teacher = pair()
    everywhere = {r.rollout_id: np.ones(len(r.response), dtype=bool) for r in rollouts}
    trainer = Trainer(
        student=prepare_student(student, BASE),
        teacher=teacher,
        source=fixed(rollouts, everywhere),
        options=BASE,
    )
    record = trainer.train_step()
    assert (
        record.tokens_trained == record.tokens_seen == sum(int(r.written.sum()) for r in rollouts)
    )


def test_privileged_teacher_prompts_change_the_loss_but_not_the_rollouts():
    plain, privileged = make_trainer(), make_trainer(teacher_context="solution")
    one, other = plain.train_step(), privileged.train_step()
    assert one.tokens_seen == other.tokens_seen
    assert one.loss != other.loss
    student, teacher = pair()
    with pytest.raises(PromptFileError, match="no solution"):
        encode_prompts(
            [Prompt("a", problem="12+34+56=")],
            student=student,
            teacher=teacher,
            teacher_context="solution",
        )
    with pytest.raises(UnknownNameError, match="unknown teacher context 'answer'"):
        encoded(student, teacher, teacher_context="answer")


# ------------------------------------------------------------ precision, adapters, schedule


def test_bfloat16_keeps_trainable_weights_in_float32():
    trainer = make_trainer(replace(BASE, precision="bfloat16", rule="soft_or", retention_ratio=0.5))
    before = weights_of(trainer)
    run(trainer)
    assert {value.dtype for value in trainer.parameters.values()} == {torch.float32}
    assert all(not torch.equal(value, trainer.parameters[name]) for name, value in before.items())
    reference = make_trainer(
        replace(BASE, precision="float32", rule="soft_or", retention_ratio=0.5)
    )
    assert trainer.history[0].loss == pytest.approx(reference.train_step().loss, rel=0.5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lora_trains_adapters_only(precision):
    options = replace(BASE, precision=precision, lora_rank=2, learning_rate=1e-2, num_steps=12)
    student, _ = pair(dtype=torch.float32)
    trainer = make_trainer(options)
    assert all("lora_" in name for name in trainer.parameters)
    assert {value.dtype for value in trainer.parameters.values()} == {torch.float32}
    losses = run(trainer)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    kept = dict(student.model.named_parameters())
    base = trainer.student.model.get_base_model()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert base.lm_head.weight.dtype == dtype
    assert torch.equal(base.lm_head.weight, kept["model.embed_tokens.weight"].to(dtype))


def test_the_students_own_weights_are_left_alone_unless_asked():
    student, _ = pair()
    before = student.model.get_input_embeddings().weight.clone()
    prepared = prepare_student(student, BASE)
    assert prepared.model is not student.model
    assert not student.model.get_input_embeddings().weight.requires_grad
    assert prepare_student(student, BASE, copy_weights=False).model is student.model
    assert torch.equal(before, student.model.get_input_embeddings().weight)


def test_training_brings_the_student_to_the_teacher():
    trainer = make_trainer(replace(BASE, num_steps=30, learning_rate=3e-2), tied=False)
    losses = run(trainer)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_steps_follow_the_schedule():
    trainer = make_trainer(replace(BASE, warmup_steps=2))
    run(trainer)
    assert [r.learning_rate for r in trainer.history] == [
        learning_rate_at(trainer.options, step) for step in range(4)
    ]


def test_clipping_bounds_the_update():
    free = replace(BASE, max_grad_norm=None, num_steps=1)
    trainer = make_trainer(replace(free, max_grad_norm=1e-3))
    record = trainer.train_step()
    assert record.grad_norm > 1e-3
    norm = torch.cat([p.grad.flatten() for p in trainer.parameters.values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert make_trainer(free).train_step().grad_norm == pytest.approx(record.grad_norm)


# --------------------------------------------------------------------------------- rules and errors


def test_only_the_statistics_of_the_rule_are_computed():
    assert (
        needed_statistics("all")
        == needed_statistics("random")
        == needed_statistics("position")
        == frozenset()
    )
    assert needed_statistics("entropy") == {"student_entropy_norm"}
    assert needed_statistics("divergence") == {"reverse_kl"}
    assert needed_statistics("soft_or") == {"student_entropy_norm", "reverse_kl", "forward_kl"}
    assert "teacher_mass_on_student_topk" in needed_statistics("teachability")
    with pytest.raises(OptionError, match="gradients"):
        needed_statistics("gradient_oracle")


def test_a_users_own_rule_can_be_trained_with():
    register_rule("jsd_late", lambda df: df["jsd"] * df["position"], overwrite=True)
    register_rule(
        "by_values",
        lambda df: np.asarray(df["hellinger"].to_numpy()) * 2.0,
        values=True,
        overwrite=True,
    )
    try:
        for name in ("jsd_late", "by_values"):
            assert (
                make_trainer(replace(BASE, rule=name, retention_ratio=0.5))
                .train_step()
                .tokens_trained
                > 0
            )
    finally:
        del RULES["jsd_late"], RULES["by_values"]


def test_prompt_order_covers_every_epoch_once():
    names = [f"p{i}" for i in range(7)]
    epoch = [prompts_of_step(names, step, 2, seed=3) for step in range(3)]
    assert len({index for chosen in epoch for index in chosen}) == 6
    assert prompts_of_step(names, 3, 2, seed=3) != epoch[0]
    assert epoch == [prompts_of_step(names, step, 2, seed=3) for step in range(3)]
    with pytest.raises(OptionError, match="a step takes 8"):
        prompts_of_step(names, 0, 8, seed=0)


def test_a_diverged_student_is_an_error():
    trainer = make_trainer(replace(BASE, rule="soft_or"))
    source = trainer.source.rollouts(0, trainer.student)
    with torch.no_grad():
        next(iter(trainer.parameters.values())).fill_(float("nan"))
    with pytest.raises(LogitsError, match="diverged"):
        trainer.update_on(source)
