"""The whole path on a real model: LoRA on SmolLM2, whose teacher is itself with the solution before
its eyes.

That it runs to the end and resumes is what is tested; nothing is claimed of accuracy after ten
steps.
"""

import polars as pl
import pytest
from shared_data import shared_file

from tip_analysis.analysis.arms import parse_arms
from tip_analysis.core.run_folder import create_run
from tip_analysis.rollouts.prompts import read_prompts
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.training.ablation.arm_training import StudyOptions
from tip_analysis.training.ablation.study import run_ablation
from tip_analysis.training.options import TrainingOptions
from tip_analysis.training.trainer import Trainer

GSM8K = shared_file("gsm8k_train_1k.jsonl")
MODEL = "smollm2-135m-instruct"

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]


def test_three_arms_of_ten_steps_run_to_the_end_and_resume(tmp_path, monkeypatch):
    prompts = read_prompts(GSM8K, limit=12)
    study = StudyOptions(
        student=MODEL,
        teacher=MODEL,
        prompts=prompts[:10],
        evaluation_prompts=prompts[10:],
        training=TrainingOptions(
            num_steps=10,
            prompts_per_step=2,
            rollouts_per_prompt=2,
            learning_rate=1e-4,
            lora_rank=8,
            chunk_size=64,
            micro_batch_size=2,
        ),
        sampling=Sampling(max_new_tokens=16),
        evaluation_sampling=Sampling(max_new_tokens=16),
        num_samples=1,
        checkpoint_every=3,
        template="boxed",
        teacher_context="solution",
        dtype="float32",
    )
    arms = parse_arms(["all", "soft_or:0.5", "q3:0.1"], [])
    run = create_run(tmp_path / "run")
    original = Trainer.train_step
    steps = []

    def train_step(self):
        if self.options.rule == "soft_or" and self.step == 7:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(run, study, arms=arms, seeds=[0])
    monkeypatch.setattr(
        Trainer,
        "train_step",
        lambda self: steps.append((self.options.rule, self.step)) or original(self),
    )
    table = run_ablation(run, study, arms=arms, seeds=[0])
    assert steps[0] == ("soft_or", 6), "the interrupted arm goes on from its checkpoint"
    assert ("all", 0) not in steps, "the finished arm is kept"
    trained = table.filter(pl.col("rule") != "untrained")
    assert trained["losses"].list.len().to_list() == [10, 10, 10]
    assert trained["train_loss"].is_finite().all()
    assert (trained["train_loss"] > 0).all()
    shares = {
        row["rule"]: row["tokens_trained"] / row["tokens_seen"]
        for row in trained.iter_rows(named=True)
    }
    assert shares["all"] == 1.0
    assert 0.4 < shares["soft_or"] <= 0.5
    assert shares["q3"] <= 0.1
    first = {row["rule"]: row["losses"][0] for row in trained.iter_rows(named=True)}
    assert first["q3"] > first["all"], "overconfident tokens diverge more than all do"
