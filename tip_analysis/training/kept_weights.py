"""The student's weights at some steps of an arm, kept in the run folder for `track`.

Writes `checkpoints/<arm>-part-NNNNN.safetensors`, NNNNN being the step: trainable weights alone,
each file on record with its hash, complete or absent. Unlike the checkpoints that a training goes
on from, they stay.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tip_analysis.analysis.arms import Arm
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.record import Record, stage_of
from tip_analysis.core.run_folder import Run, Stage
from tip_analysis.models.loading import LanguageModel
from tip_analysis.training.options import TrainingOptions
from tip_analysis.training.students import prepare_student
from tip_analysis.training.trainer import Trainer


def begin_keeping(run: Run, arm_key: str, arm: Arm, seed: int, every: int, last: int) -> Stage:
    """The record of an arm's kept weights; more steps may be added to it."""
    return run.begin(
        "keep",
        key={"arm_key": arm_key},
        config={
            "arm_key": arm_key,
            "rule": arm.rule,
            "retention_ratio": arm.retention_ratio,
            "seed": seed,
            "num_steps": last,
        },
        settings={"keep_every": every},
    )


def kept_steps(every: int, last: int) -> list[int]:
    """The steps whose weights are kept: the first, every so many, the last."""
    return sorted({0, *range(every, last, every), last})


def keep_weights(stage: Stage, trainer: Trainer) -> None:
    """Write the weights of the step that a trainer has reached, unless they are there."""
    if stage.is_whole(trainer.step):
        return
    tensors = {name: value.detach().contiguous() for name, value in trainer.parameters.items()}
    stage.write_file(trainer.step, lambda part: save_file(tensors, part), num_rows=len(tensors))


def kept_arm(run: Run, arm: Arm, seed: int) -> tuple[Stage, Record]:
    """The kept weights of an arm under a seed, and the arm's own configuration.

    Raises:
        RunError: none were kept; names the arms that have some, and the command that keeps them.
    """
    found = []
    for key, record in run.stages().items():
        config = record["config"]
        if stage_of(key) != "keep" or not record["shards"]:
            continue
        known = Arm(str(config.get("rule")), float(config.get("retention_ratio", 1.0)))
        if known == arm and config.get("seed") == seed:
            arms = run.stages().get(str(config.get("arm_key")))
            if arms is not None:
                return run.stage(key), arms["config"]
        found.append(f"{known} (seed {config.get('seed')})")
    have = ", ".join(found) or "none"
    raise RunError(
        f"{run.path} has no kept weights of {arm} under seed {seed}, but of {have};"
        f" `tip-analysis ablate {run.path} --rules {arm} --seeds {seed} --keep-every N …` keeps"
        " them"
    )


def steps_on_record(stage: Stage) -> list[int]:
    """The steps whose weights were kept."""
    names = stage.entry()["shards"]
    return sorted(int(name.split("part-")[1].split(".")[0]) for name in names)


def student_at(
    student: LanguageModel, stage: Stage, step: int, options: TrainingOptions
) -> LanguageModel:
    """The student with the weights of a step.

    Args:
        student: as it was before training; left as it is.
        stage: of `kept_arm`.
        step: one of `steps_on_record`.
        options: of the arm, which say whether it trained adapters.

    Raises:
        RunError: the file is missing or was altered, or holds another model's weights.
    """
    if not stage.is_whole(step):
        raise RunError(f"{stage.path(step)} is missing or was altered; run `ablate` again")
    trained = prepare_student(student, replace(options, gradient_checkpointing=False))
    weights = load_file(stage.path(step))
    mine = {n: p for n, p in trained.model.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in mine.items()} != {n: w.shape for n, w in weights.items()}:
        raise RunError(f"{stage.path(step)} holds other weights than those of {student.name}")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(weights[name])
    trained.model.requires_grad_(False)
    return trained


def arm_options(config: Mapping[str, Any]) -> TrainingOptions:
    """What of an arm's configuration decides which weights it trains.

    Raises:
        OptionError: an option on record is out of its range.
    """
    rank, precision = config.get("lora_rank", 0), config.get("precision", "float32")
    if not isinstance(rank, int) or not isinstance(precision, str):
        raise OptionError(f"the arm's record holds lora_rank={rank!r}, precision={precision!r}")
    return TrainingOptions(
        lora_rank=rank, precision=precision, lora_alpha=float(config.get("lora_alpha", 32.0))
    )
