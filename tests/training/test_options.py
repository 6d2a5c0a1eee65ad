"""Options of a training: names are members of their enumerations, and ranges are kept."""

from dataclasses import fields

import pytest

from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.names import Mode, Name, Schedule, TeacherContext, TrainingLoss
from tip_analysis.core.record import config_hash
from tip_analysis.training.ablation.arm_training import StudyOptions
from tip_analysis.training.ablation.presets import PRESETS, change_preset
from tip_analysis.training.options import TrainingOptions, learning_rate_at

NAMED = {
    field.name: type(getattr(TrainingOptions(), field.name))
    for field in fields(TrainingOptions)
    if isinstance(getattr(TrainingOptions(), field.name), Name)
}


def test_ten_options_are_names():
    assert sorted(NAMED) == [
        "loss",
        "loss_aggregation",
        "loss_normalizer",
        "loss_tail",
        "loss_top_k_of",
        "normalization_scope",
        "optimizer",
        "precision",
        "schedule",
        "selection_scope",
    ]


@pytest.mark.parametrize("field", sorted(NAMED))
def test_a_text_is_its_member_and_another_text_is_refused(field):
    for member in NAMED[field]:
        given = TrainingOptions(**{field: member.value})
        assert getattr(given, field) is member
        assert given == TrainingOptions(**{field: member})
        assert config_hash(given.identity()) == config_hash(
            TrainingOptions(**{field: member}).identity()
        )
    valid = ", ".join(NAMED[field])
    with pytest.raises(UnknownNameError, match=f"'nonsense'; valid names: {valid}"):
        TrainingOptions(**{field: "nonsense"})


def test_a_loss_without_a_teacher_is_no_training_loss():
    with pytest.raises(UnknownNameError, match="valid names: reverse_kl, forward_kl, jsd"):
        TrainingOptions(loss="negative_logprob")
    assert TrainingOptions(loss="jsd").loss is TrainingLoss.JSD


def test_studies_and_presets_take_texts():
    study = StudyOptions("student", "teacher", mode="offline", teacher_context="solution")
    assert study.mode is Mode.OFFLINE
    assert study.teacher_context is TeacherContext.SOLUTION
    assert change_preset(PRESETS["arithmetic"], mode="offline").mode is Mode.OFFLINE
    changed = change_preset(PRESETS["arithmetic"], schedule="constant")
    assert changed.training.schedule is Schedule.CONSTANT
    for bad in ({"mode": "replay"}, {"teacher_context": "answer"}):
        with pytest.raises(UnknownNameError, match="valid names"):
            StudyOptions("student", "teacher", **bad)


def test_ranges_are_kept():
    for bad in (
        {"warmup_steps": -1},
        {"warmup_steps": 101},
        {"chunk_size": 0},
        {"rollouts_per_prompt": 0},
        {"retention_ratio": 0.0},
        {"retention_ratio": 1.5},
        {"prompts_per_step": 0},
        {"token_budget": 0},
        {"micro_batch_size": 0},
        {"num_steps": -1},
        {"lora_rank": -1},
    ):
        with pytest.raises(OptionError, match=next(iter(bad))):
            TrainingOptions(**bad)


def test_the_schedule_by_hand():
    options = TrainingOptions(num_steps=10, warmup_steps=2, learning_rate=8.0)
    found = [learning_rate_at(options, step) for step in range(11)]
    assert found[:3] == [4.0, 8.0, 8.0]
    assert found[6] == pytest.approx(4.0)  # half way down
    assert found[10] == pytest.approx(0.0, abs=1e-12)
    constant = TrainingOptions(num_steps=10, warmup_steps=2, learning_rate=8.0, schedule="constant")
    assert [learning_rate_at(constant, step) for step in (0, 1, 5, 9)] == [4.0, 8.0, 8.0, 8.0]


def test_pieces_do_not_decide_numbers():
    options = TrainingOptions(micro_batch_size=3, token_budget=99, chunk_size=7)
    assert options.identity() == TrainingOptions().identity()
    assert TrainingOptions(seed=1).identity() != TrainingOptions().identity()
