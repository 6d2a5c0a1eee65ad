"""TIP in the real TRL; run by `make interop` in an environment that has it."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_language_model

from tip_analysis.core.errors import OptionError, UnknownNameError, UnsupportedVersionError
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.models.loading import LanguageModel, load_model
from tip_analysis.models.output_head import OutputHead
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.training.data import OnPolicyRollouts
from tip_analysis.training.options import TrainingOptions
from tip_analysis.training.step_selection import step_statistics
from tip_analysis.training.students import prepare_student
from tip_analysis.training.trainer import Trainer

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # those of TRL are TRL's
]
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tip_analysis.trl import TIPDistillationConfig, TIPDistillationTrainer  # noqa: E402

RULES = ("all", "soft_or", "q3", "entropy", "divergence", "random", "entropy_sampling")
PROMPTS = [problem["problem"] for problem in problems(8, split="train")]


def pair(architecture="qwen3"):
    student = tiny_language_model(architecture, sharpness=8.0, name="tiny-student")
    teacher = tiny_language_model(architecture, seed=1, sharpness=8.0, name="tiny-teacher")
    student.model.requires_grad_(True)
    return student, teacher


def settings(folder, **changes):
    plain = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "shuffle_dataset": False,
    }
    return plain | changes


class Recording(TIPDistillationTrainer):
    """Keeps what a step was made of."""

    def _weights(self, rollouts, statistics):
        weights = super()._weights(rollouts, statistics)
        self.seen = rollouts, statistics, weights
        return weights

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.output = output
        return output


def trained(folder, models=None, kind=Recording, configuration=TIPDistillationConfig, **changes):
    student, teacher = models or pair()
    trainer = kind(
        model=student.model,
        teacher_model=teacher.model,
        args=configuration(**settings(folder, **changes)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=student.tokenizer,
    )
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def rollouts_of(trainer):
    """The step's rollouts with their prompts, in the order of their numbers."""
    output = trainer.output
    numbers = output["tip_number"].tolist()
    named = {int(r.rollout_id.split("/")[1]): r for r in trainer.seen[0]}
    found = {}
    for row, number in enumerate(numbers):
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist()
        rollout = named[number]
        found[number] = Rollout(
            rollout.rollout_id, rollout.prompt_id, prompt, rollout.response, loss_mask=None
        )
    return [found[number] for number in sorted(found)]


def ours_on(rollouts, models, **changes):
    """Our own trainer's step on the same rollouts: its record and its mask by rollout."""
    options = TrainingOptions(
        learning_rate=1e-3, schedule="constant", num_steps=1, seed=42, **changes
    )
    student, teacher = models
    trainer = Trainer(
        student=prepare_student(student, options),
        teacher=LanguageModel(
            "teacher", teacher.model, teacher.tokenizer, OutputHead(teacher.model)
        ),
        source=OnPolicyRollouts([], None, 1, 1, None),  # pyright: ignore[reportArgumentType]
        options=options,
    )
    masks = {}
    select = trainer.select

    def recorded(rollouts, statistics):
        mask, weights = select(rollouts, statistics)
        counts = np.cumsum([r.num_tokens for r in rollouts])[:-1]
        masks.update(
            {r.rollout_id: m for r, m in zip(rollouts, np.split(mask, counts), strict=True)}
        )
        return mask, weights

    trainer.select = recorded
    return trainer.update_on(rollouts), masks, trainer


def masks_of(trainer):
    rollouts, _, weights = trainer.seen
    counts = np.cumsum([r.num_tokens for r in rollouts])[:-1]
    return {r.rollout_id: w != 0 for r, w in zip(rollouts, np.split(weights, counts), strict=True)}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("rule", "scope", "aggregation"),
    [(rule, "rollout", "token") for rule in RULES]
    + [
        ("soft_or", "batch", "token"),
        ("q3", "batch", "rollout"),
        ("soft_or", "rollout", "rollout"),
    ],
)
def test_masks_and_loss_are_those_of_our_own_trainer(
    rule, scope, aggregation, accumulation, tmp_path
):
    models = pair()
    chosen = {"selection_scope": scope, "loss_aggregation": aggregation, "retention_ratio": 0.3}
    before = {name: value.clone() for name, value in models[0].model.state_dict().items()}
    trainer = trained(
        tmp_path,
        models,
        token_rule=rule,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        **chosen,
    )
    rollouts = rollouts_of(trainer)
    after = {name: value.clone() for name, value in models[0].model.state_dict().items()}
    models[0].model.load_state_dict(before)
    record, masks, own = ours_on(rollouts, models, rule=rule, **chosen)
    found = masks_of(trainer)
    assert found.keys() == masks.keys()
    assert all(np.array_equal(found[name], masks[name]) for name in masks)
    assert logged(trainer, "loss") == pytest.approx([record.loss], rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx([record.grad_norm], rel=1e-4)
    for name, value in own.student.model.state_dict().items():
        # Adam's first step is lr·sign(g): where g is all but 0, a rounding turns it round
        assert (value - after[name]).abs().median() < 1e-6, name


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("rule", "weighting"),
    [("all", "soft_or"), ("q3", "divergence"), ("entropy_sampling", "horvitz_thompson")],
)
def test_weights_are_those_of_our_own_trainer(rule, weighting, accumulation, tmp_path):
    models = pair()
    before = {name: value.clone() for name, value in models[0].model.state_dict().items()}
    chosen = {"weighting": weighting, "loss_aggregation": "token", "retention_ratio": 0.4}
    trainer = trained(
        tmp_path,
        models,
        token_rule=rule,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        **chosen,
    )
    rollouts = rollouts_of(trainer)
    models[0].model.load_state_dict(before)
    record, _, _ = ours_on(rollouts, models, rule=rule, **chosen)
    assert len(set(trainer.seen[2])) > 2
    assert logged(trainer, "loss") == pytest.approx([record.loss], rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx([record.grad_norm], rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_all_tokens_is_plain_trl(accumulation, tmp_path):
    size = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
        "save_strategy": "no",
    }
    ours = trained(tmp_path / "a", token_rule="all", **size)
    theirs = trained(
        tmp_path / "b", kind=trl.DistillationTrainer, configuration=trl.DistillationConfig, **size
    )
    for name in ("loss", "grad_norm", "entropy"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-5)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["gemma2", "qwen2", "llama"])
def test_other_architectures_and_soft_caps(architecture, tmp_path):
    models = pair(architecture)
    before = {name: value.clone() for name, value in models[0].model.state_dict().items()}
    trainer = trained(tmp_path, models, token_rule="q3", retention_ratio=0.2)
    rollouts = rollouts_of(trainer)
    models[0].model.load_state_dict(before)
    record, masks, _ = ours_on(
        rollouts, models, rule="q3", retention_ratio=0.2, loss_aggregation="token"
    )
    found = masks_of(trainer)
    assert all(np.array_equal(found[name], masks[name]) for name in masks)
    assert logged(trainer, "loss") == pytest.approx([record.loss], rel=1e-5)


@pytest.mark.parametrize(("name", "value"), [("logit_scale", 0.25), ("logits_scaling", 4.0)])
def test_temperature_and_logit_scale_are_applied_as_trl_does(name, value, tmp_path):
    """A head scaled by the config is a head whose weights are scaled, and so is a temperature."""
    scaled, plain = pair(), pair()
    for model in scaled:
        setattr(model.model.config, name, value)
    one = trained(tmp_path / "a", scaled, generation_kwargs={"do_sample": False})
    other = trained(tmp_path / "b", plain, temperature=4.0, generation_kwargs={"do_sample": False})
    for column in one.seen[1]:
        first, second = one.seen[1][column], other.seen[1][column]
        np.testing.assert_allclose(first, second, rtol=2e-4, atol=1e-6)
    assert logged(one, "loss") == pytest.approx(logged(other, "loss"), rel=1e-5)


def test_no_pass_is_made_twice_without_accumulation(tmp_path, monkeypatch):
    passes = []
    states = TIPDistillationTrainer._get_last_hidden_state

    def counted(self, model, *arguments, **options):
        passes.append(model is self.accelerator.unwrap_model(self.teacher_model))
        return states(self, model, *arguments, **options)

    monkeypatch.setattr(TIPDistillationTrainer, "_get_last_hidden_state", counted)
    trained(tmp_path / "a")
    assert passes == [False, True]  # the student once, the teacher once
    passes.clear()
    trained(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert (passes.count(False), passes.count(True)) == (8, 4)  # the student again, as it must


def test_what_is_logged_is_what_was_selected(tmp_path):
    trainer = trained(tmp_path, token_rule="q3", retention_ratio=0.25)
    _, statistics, weights = trainer.seen
    (share,) = logged(trainer, "tip/selected_share")
    assert share == pytest.approx((weights != 0).mean())
    h, delta = statistics["student_entropy"], statistics["reverse_kl"]
    q3 = (h <= np.median(h)) & (delta > delta.astype(np.float64).mean())
    assert logged(trainer, "tip/share_q3") == [pytest.approx(q3.mean())]
    assert logged(trainer, "tip/selected_share_q3") == [pytest.approx((weights != 0)[q3].mean())]
    shares = [logged(trainer, f"tip/share_q{i}")[0] for i in (1, 2, 3, 4)]
    assert sum(shares) == pytest.approx(1.0)
    assert 0.0 < logged(trainer, "tip/soft_or_overlap")[0] < 1.0
    soft = trained(tmp_path / "soft", token_rule="soft_or", retention_ratio=0.25)
    assert logged(soft, "tip/soft_or_overlap") == [1.0]


def test_stop_tokens_may_count_as_one(tmp_path):
    student, teacher = pair()
    ends = [2, 3, 4]
    for model in (student, teacher):
        model.model.generation_config.eos_token_id = ends
    trainer = trained(tmp_path, (student, teacher), stop_tokens="merged", max_completion_length=6)
    end = student.tokenizer.eos_token_id
    assert trainer._stop_ids.tolist() == sorted({*ends, end})
    from tip_analysis.training.trl_parts import Head

    hidden = torch.randn(5, 32)
    plain, merged = (
        Head(student.model, 1.0, torch.tensor(ids)) for ids in ([], trainer._stop_ids.tolist())
    )
    columns = frozenset({"reverse_kl"})
    one, other = (
        step_statistics(
            columns,
            student_hidden=hidden,
            teacher_hidden=hidden.flip(0),
            student_head=head,
            teacher_head=head,
            vocab_size=student.vocab_size,
        )["reverse_kl"]
        for head in (plain, merged)
    )
    assert (other <= one + 1e-6).all()
    assert (other < one - 1e-6).any()  # merging never adds divergence, and here takes some


def test_evaluation_is_over_all_tokens_as_trl_has_it(tmp_path):
    student, teacher = pair()
    data = Dataset.from_dict({"prompt": PROMPTS[:4]})
    losses = []
    for kind, configuration in (
        (TIPDistillationTrainer, TIPDistillationConfig),
        (trl.DistillationTrainer, trl.DistillationConfig),
    ):
        trainer = kind(
            model=student.model,
            teacher_model=teacher.model,
            args=configuration(**settings(tmp_path, generation_kwargs={"do_sample": False})),
            train_dataset=data,
            eval_dataset=data,
            processing_class=student.tokenizer,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_a_batch_of_which_nothing_is_selected_trains_nothing_and_breaks_nothing(tmp_path):
    """Scope batch with few tokens: most micro-batches hold none of them."""
    trainer = trained(
        tmp_path,
        selection_scope="batch",
        retention_ratio=0.01,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    assert 1 <= sum(mask.sum() for mask in masks_of(trainer).values()) < 8
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"token_rule": "soft_ro"}, UnknownNameError, "did you mean 'soft_or'"),
        ({"token_rule": "gradient_oracle"}, OptionError, "needs measured gradients"),
        ({"retention_ratio": 0.0}, OptionError, r"\(0, 1\]; found 0.0"),
        ({"selection_scope": "step"}, UnknownNameError, "rollout, batch, run"),
        ({"stop_tokens": "one"}, UnknownNameError, "declared, merged"),
        ({"loss_aggregation": "mean"}, UnknownNameError, "rollout, token"),
        ({"weighting": "soft_ro"}, UnknownNameError, "soft_or"),
        ({"weighting": "oracle"}, OptionError, "needs measured gradients"),
        ({"entropy_cut": "middle"}, OptionError, "middle"),
    ],
)
def test_options_that_are_none_are_refused_before_anything_is_loaded(change, error, said, tmp_path):
    with pytest.raises(error, match=said):
        TIPDistillationConfig(**settings(tmp_path, **change))


def test_another_trl_is_refused_by_name(monkeypatch):
    from tip_analysis.training.trl_parts import check_trl

    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(UnsupportedVersionError, match=r"goes with TRL 1\.16, but 1\.17\.0"):
        check_trl()
    monkeypatch.setattr(trl, "__version__", "1.16.9")
    check_trl()

    def other(self, model, inputs):
        return model, inputs

    monkeypatch.setattr(trl.DistillationTrainer, "_compute_loss", other)
    with pytest.raises(UnsupportedVersionError, match=r"another DistillationTrainer\._compute"):
        check_trl()
    assert list(inspect.signature(other).parameters) == ["self", "model", "inputs"]


def test_a_callback_tells_a_tracker_offline(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator  # pyright: ignore
    from tip_analysis.trl import TrackerCallback  # pyright: ignore

    student, teacher = pair()
    trainer = TIPDistillationTrainer(
        student.model,
        teacher.model,
        TIPDistillationConfig(**settings(tmp_path / "out", max_steps=2)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=student.tokenizer,
        callbacks=[TrackerCallback("tensorboard", series="mine")],
    )
    trainer.train()
    read = event_accumulator.EventAccumulator(
        str(tmp_path / "out" / "trackers" / "tensorboard" / "mine")
    )
    read.Reload()
    for name in ("loss", "tip/share_q3", "tip/soft_or_overlap"):
        found = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in read.Scalars(name)]
        assert found == list(enumerate(logged(trainer, name), start=1))


def test_a_plain_configuration_and_a_missing_teacher_are_refused(tmp_path):
    student, teacher = pair()
    with pytest.raises(OptionError, match="takes a TIPDistillationConfig; found a Distillation"):
        TIPDistillationTrainer(
            student.model, teacher.model, trl.DistillationConfig(**settings(tmp_path))
        )
    with pytest.raises(OptionError, match="needs a teacher_model"):
        TIPDistillationTrainer(student.model)


SCRIPT = Path(__file__).parents[1] / "train_with_trl.py"


def launched(folder, processes, *arguments):
    """What three steps end in under `accelerate launch` (gloo)."""
    folder.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes"]
    command += [str(processes), *(["--multi_gpu"] if processes > 1 else [])]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(SCRIPT), str(folder), *arguments],
        check=False,
        env=os.environ | quiet | {"PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    record = json.loads((folder / "log.json").read_text())
    assert record["processes"] == processes
    return record["log"][:3], load_file(folder / "weights.safetensors")


@pytest.mark.parametrize(
    ("rule", "scope", "size", "accumulation"),
    [("soft_or", "rollout", 8, 1), ("q3", "batch", 8, 1), ("soft_or", "batch", 4, 2)],
)
def test_two_processes_end_as_one(rule, scope, size, accumulation, tmp_path):
    one, weights = launched(tmp_path / "1", 1, rule, scope, str(size), str(accumulation))
    two, others = launched(tmp_path / "2", 2, rule, scope, str(size // 2), str(accumulation))
    names = ["loss", "grad_norm", *(name for name in one[0] if name.startswith("tip/"))]
    names += ["entropy"] if accumulation == 1 else []  # else TRL's is a mean over batches' means
    assert "tip/share_q3" in names
    for before, after in zip(one, two, strict=True):
        for name in names:
            assert before[name] == pytest.approx(after[name], rel=1e-4, abs=1e-6), name
    for name, value in weights.items():
        assert (value - others[name]).abs().median() < 1e-6, name


def test_the_arithmetic_student_comes_closer_to_its_teacher(tmp_path):
    student, teacher = load_model("arithmetic-student"), load_model("arithmetic-teacher")
    student.model.requires_grad_(True)
    trainer = TIPDistillationTrainer(
        model=student.model,
        teacher_model=teacher.model,
        args=TIPDistillationConfig(
            **settings(
                tmp_path,
                max_steps=30,
                per_device_train_batch_size=32,
                max_completion_length=48,
                learning_rate=1e-3,
            )
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [problem["problem"] for problem in problems(256, split="train")]}
        ),
        processing_class=student.tokenizer,
    )
    trainer.train()
    divergences = logged(trainer, "tip/reverse_kl")
    assert len(divergences) == 30
    assert np.mean(divergences[-5:]) < 0.7 * np.mean(divergences[:5])


@pytest.mark.real_model
def test_smollm2_is_trained(tmp_path):
    student, teacher = (load_model("smollm2-135m-instruct", dtype="float32") for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():  # a student that has something to learn
        for parameter in student.model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    student.model.requires_grad_(True)
    turns = [[{"role": "user", "content": f"What is {i} + {i}?"}] for i in range(4)]
    trainer = TIPDistillationTrainer(
        model=student.model,
        teacher_model=teacher.model,
        args=TIPDistillationConfig(
            **settings(
                tmp_path,
                max_steps=4,
                per_device_train_batch_size=4,
                max_completion_length=24,
                learning_rate=2e-5,
                generation_kwargs={"do_sample": False},
            )
        ),
        train_dataset=Dataset.from_dict({"prompt": turns}),
        processing_class=student.tokenizer,
    )
    trainer.train()
    divergences = logged(trainer, "tip/reverse_kl")
    assert len(divergences) == 4
    assert divergences[-1] < divergences[0]
    assert all(
        share == pytest.approx(0.5, abs=0.02) for share in logged(trainer, "tip/selected_share")
    )
