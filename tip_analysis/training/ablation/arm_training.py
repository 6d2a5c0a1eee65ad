"""One arm of an ablation under one seed: train, evaluate along the way, leave one whole Parquet
file.

Writes `ablations/<key>-part-00000.parquet` (`schema.AblationTable`), complete or absent. While an
arm is trained its checkpoints lie in `ablations/.work/<key>/`, where a run that was killed finds
them; a lock beside them keeps a second process from training the same arm, and goes with the
process that holds it.
"""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
import torch

from tip_analysis.analysis.accuracy import accuracy
from tip_analysis.analysis.arms import ALL, Arm
from tip_analysis.analysis.repeated_samples import mean_majority, num_correct
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import ConfigurationMismatchError, RunError
from tip_analysis.core.locks import locked
from tip_analysis.core.names import (
    Mode,
    SamplingEngine,
    Scope,
    TeacherContext,
    TrackerName,
    set_names,
)
from tip_analysis.core.record import config_hash
from tip_analysis.core.run_folder import Run, Stage
from tip_analysis.core.schema import AblationTable, DynamicsTable
from tip_analysis.core.stages import own_folder
from tip_analysis.core.table_files import read
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import LanguageModel, load_model
from tip_analysis.rollouts.bad_rows import BadRows
from tip_analysis.rollouts.encoded import EncodedPrompt, encode_usable, with_room
from tip_analysis.rollouts.engines.engine import Engine
from tip_analysis.rollouts.engines.hf import HFEngine
from tip_analysis.rollouts.engines.opening import Loading, open_engine
from tip_analysis.rollouts.engines.settings import EngineSettings
from tip_analysis.rollouts.environments.episodes import Asked, Limits
from tip_analysis.rollouts.environments.registry import resolve_environment
from tip_analysis.rollouts.environments.stage import ask_all
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.rendering import resolve_template
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import longest_sequence
from tip_analysis.training.ablation.arm_figures import (
    evaluation_figures,
    open_arm_tracker,
    step_figures,
)
from tip_analysis.training.agents import Playground, sample_tasks
from tip_analysis.training.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from tip_analysis.training.data import FixedRollouts, OnPolicyRollouts, fixed_rollouts
from tip_analysis.training.drift import measure_drift
from tip_analysis.training.evaluation import Samples, sample_problems
from tip_analysis.training.kept_weights import (
    begin_keeping,
    keep_weights,
    kept_steps,
    steps_on_record,
)
from tip_analysis.training.options import TrainingOptions
from tip_analysis.training.peak_memory import peak_memory_bytes, reset_peak_memory
from tip_analysis.training.processes import ALONE, Processes
from tip_analysis.training.step_selection import step_statistics
from tip_analysis.training.students import prepare_student
from tip_analysis.training.trackers import Tracker, require_tracker
from tip_analysis.training.trainer import StepRecord, Trainer

logger = logging.getLogger(__name__)

DRIFT_ROLLOUTS = 64
"""Fixed rollouts on which drift is measured, the first ones."""

_OF_RECORD = ("step", "loss", "learning_rate", "grad_norm", "tokens_seen", "tokens_trained")
"""Columns of `DynamicsTable` that every step's record has."""
_OBSERVED = tuple(
    name
    for name in polars_schema(DynamicsTable)
    if name not in ("arm_key", "rule", "retention_ratio", "seed", *_OF_RECORD)
)
"""Columns that only observed steps have."""

Report = Callable[[Mapping[str, Any]], None]
"""Told what an arm is doing: `rule`, `retention_ratio`, `seed`, `step` and what there is to say of
it."""


@dataclass(frozen=True)
class StudyOptions:
    """Everything that the arms of a study share."""

    student: "str | LanguageModel"
    """Name of the student (loaded again for each arm), or the model (copied for each arm)."""
    teacher: "str | LanguageModel"
    """Name of the teacher, or the model."""
    prompts: Sequence[Prompt] = ()
    """What is trained on; not used offline."""
    evaluation_prompts: Sequence[Prompt] = ()
    """Held-out problems with answers."""
    mode: Mode | str = Mode.ON_POLICY
    """`on_policy`, or `offline`: on the run's own rollouts and masks."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    """Training options but for rule, retention ratio and seed, which the arms set."""
    sampling: Sampling = field(default_factory=Sampling)
    """Of training rollouts; the seed is the arm's."""
    evaluation_sampling: Sampling = field(default_factory=Sampling)
    """Of evaluation samples; the seed is the arm's."""
    num_samples: int = 16
    """k, evaluation samples a problem."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    checkpoint_every: int = 20
    """Steps between checkpoints, which are what a killed arm goes on from."""
    keep_every: int = 0
    """Steps between weights that stay in the run folder, for `track`; 0 keeps none."""
    grader: str = "math"
    """Name of the grader."""
    template: str = "plain"
    """The text around a problem."""
    teacher_context: TeacherContext | str = TeacherContext.NONE
    """`none`, or `solution`: the teacher is shown the reference solution."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Switches for the chat template."""
    max_prompt_tokens: int | None = None
    """Longer prompts are left out of training."""
    bad_rows: BadRows = field(default_factory=BadRows)
    """What is done with prompts that cannot be used, and which were left out already."""
    dtype: str = "auto"
    """Dtype in which models are loaded."""
    device: str = "auto"
    """Device on which models are loaded."""
    token_budget: int = 65_536
    """Tokens a batch of the own sampler, room for responses included."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """What students write with."""
    environment: str | None = None
    """The environment that students act in, which grades; None for single turns."""
    limits: Limits = field(default_factory=Limits)
    """How far a trajectory may go."""
    tracker: TrackerName | str = TrackerName.NONE
    """What is told of each arm step by step; it decides no number."""

    def __post_init__(self) -> None:
        require_tracker(self.tracker)
        set_names(self, tracker=TrackerName, mode=Mode, teacher_context=TeacherContext)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of an arm, beside models, prompts, rule, ratio and seed."""
        training = self.training.identity()
        for name in ("rule", "retention_ratio", "seed"):
            training.pop(name)
        return {
            "mode": self.mode,
            **training,
            "sampling": {
                name: value for name, value in asdict(self.sampling).items() if name != "seed"
            },
            "evaluation_sampling": {
                name: value
                for name, value in asdict(self.evaluation_sampling).items()
                if name != "seed"
            },
            "num_samples": self.num_samples,
            "evaluate_every": self.evaluate_every,
            "grader": self.grader,
            "template": resolve_template(self.template),
            "teacher_context": self.teacher_context,
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "max_prompt_tokens": self.max_prompt_tokens,
            **({} if self.engine.engine is SamplingEngine.HF else {"engine": self.engine.engine}),
            **self._environment_identity(),
        }

    def _environment_identity(self) -> dict[str, Any]:
        if self.environment is None:
            return {}
        return {**resolve_environment(self.environment).identity(), **self.limits.identity()}


class ArmRunner:
    """Trains arms one after another in one process; the teacher is loaded once."""

    def __init__(
        self,
        run: Run,
        study: StudyOptions,
        report: Report = lambda event: None,
        processes: Processes = ALONE,
    ) -> None:
        self.run = run
        self.processes = processes
        self.study = study
        self.report = report
        self._keys: dict[tuple[Arm, int], str] = {}
        self._begun: dict[tuple[Arm, int], dict[str, Any]] = {}
        self.teacher = self._load(study.teacher)
        student = self._load(study.student)
        self.student_record = student.describe()
        self.teacher_record = self.teacher.describe()
        self.bad_rows = deepcopy(study.bad_rows)
        self._asked: dict[str, Asked] = {}
        self.prompts = self._with_room(
            student,
            self._without_long(self._encode(student, study.prompts, study.teacher_context)),
            study.sampling,
        )
        solved = all(prompt.solution is not None for prompt in study.evaluation_prompts)
        self.teacher_knows_problems = study.teacher_context == TeacherContext.NONE or solved
        context = study.teacher_context if self.teacher_knows_problems else TeacherContext.NONE
        self.problems = self._with_room(
            student,
            self._encode(student, study.evaluation_prompts, context),
            study.evaluation_sampling,
        )
        self.benchmarks = [problem.prompt.benchmark for problem in self.problems]
        self.engine = None if study.engine.engine is SamplingEngine.HF else self._open(student)
        self.author = student if study.mode == Mode.OFFLINE else None  # drift is measured from it

    def _load(self, model: str | LanguageModel) -> LanguageModel:
        return (
            model
            if isinstance(model, LanguageModel)
            else load_model(model, dtype=self.study.dtype, device=self.study.device)
        )

    def _open(self, student: LanguageModel) -> Engine:
        """The engine of all arms, long enough for every prompt and problem."""
        study = self.study
        engine = open_engine(study.engine, student, Loading(study.dtype, study.device))
        engine.expect(longest_sequence(self.prompts, study.sampling))
        engine.expect(longest_sequence(self.problems, study.evaluation_sampling))
        return engine

    def close(self) -> None:
        """Stop the engine."""
        if self.engine is not None:
            self.engine.close()

    def _encode(
        self,
        student: LanguageModel,
        prompts: Sequence[Prompt],
        teacher_context: TeacherContext | str,
    ) -> list[EncodedPrompt]:
        study = self.study
        if study.environment is not None:
            return self._ask(student, prompts, teacher_context)
        return encode_usable(
            prompts,
            self.bad_rows,
            student=student,
            teacher=self.teacher,
            template=study.template,
            teacher_context=teacher_context,
            chat_template_kwargs=study.chat_template_kwargs,
        )

    def _ask(
        self,
        student: LanguageModel,
        prompts: Sequence[Prompt],
        teacher_context: TeacherContext | str,
    ) -> list[EncodedPrompt]:
        """Tasks as the environment shows them."""
        study = self.study
        assert study.environment is not None
        asked = ask_all(
            prompts,
            resolve_environment(study.environment),
            self.bad_rows,
            student,
            study.sampling,
            study.chat_template_kwargs,
            teacher=self.teacher,
            teacher_context=teacher_context,
        )
        self._asked |= {one.id: one for one in asked}
        return [one.shown for one in asked]

    @property
    def playground(self) -> Playground | None:
        """The environment with the tasks that were encoded; None for single turns."""
        study = self.study
        if study.environment is None:
            return None
        source = resolve_environment(study.environment)
        return Playground(source, self._asked, study.limits, study.chat_template_kwargs)

    def _with_room(
        self, student: LanguageModel, prompts: list[EncodedPrompt], sampling: Sampling
    ) -> list[EncodedPrompt]:
        return with_room(
            prompts, self.bad_rows, student=student, max_new_tokens=sampling.max_new_tokens
        )

    def _without_long(self, prompts: list[EncodedPrompt]) -> list[EncodedPrompt]:
        longest = self.study.max_prompt_tokens
        kept = [prompt for prompt in prompts if longest is None or len(prompt.token_ids) <= longest]
        if len(kept) < len(prompts):
            logger.warning(
                "%d of %d prompts have more than %s tokens and are left out",
                len(prompts) - len(kept),
                len(prompts),
                longest,
            )
        return kept

    def run_arm(self, arm: Arm, seed: int) -> str:
        """Train and evaluate one arm, unless its file is there; returns `done`, or `kept` where it
        was there."""
        if not self.processes.is_first:
            return self._help(arm, seed)
        stage = self._begin(arm, seed)
        work = own_folder(own_folder(self.run.path, "ablations"), ".work") / stage.key
        with locked(work.with_suffix(".lock"), f"{self.run.path}: {arm} under seed {seed}"):
            kept = self._keeping(arm, seed, stage.key)
            there = stage.is_whole(0) and not self._lacks(kept)
            status = self.processes.of_first("kept" if there else "done")
            self.processes.of_first(stage.key)
            if status == "kept":
                rows = read(stage.path(0)).rows(named=True)
            else:
                rows = self._train(arm, seed, stage.key, work, kept)
                if not stage.is_whole(0):
                    stage.write(0, pl.DataFrame(rows, schema=polars_schema(AblationTable)))
            if kept is not None:
                kept.finish(steps=steps_on_record(kept))
            stage.finish(**_summary(rows))
            shutil.rmtree(work, ignore_errors=True)
        return status

    def _help(self, arm: Arm, seed: int) -> str:
        """Do a further process's part of an arm, which writes nothing."""
        status, key = self.processes.of_first(""), self.processes.of_first("")
        self._keys[arm, seed] = key
        if status == "done":
            self._train(arm, seed, key, self.run.path / "ablations" / ".work" / key)
        return status

    def arm_key(self, arm: Arm, seed: int) -> str:
        """The key of an arm's rows and of its record in `run.json`, once it was begun."""
        return self._keys[arm, seed]

    def _begin(self, arm: Arm, seed: int) -> Stage:
        study = self.study
        inputs = {"evaluation_prompts": _prompts_hash(study.evaluation_prompts)}
        if study.mode == Mode.OFFLINE:
            inputs |= {
                "rollouts": self.run.table_hash("rollouts"),
                "tokens": self.run.table_hash("tokens"),
            }
        else:
            inputs["prompts"] = _prompts_hash(study.prompts)
        config = {
            "student": self.student_record,
            "teacher": self.teacher_record,
            **study.identity(),
            "seed": seed,
        }
        config |= {"rule": arm.rule, "retention_ratio": arm.retention_ratio} | arm.changes
        settings = {
            "device": str(self.teacher.device),
            "num_threads": torch.get_num_threads(),
            **self.bad_rows.record(),
        }
        self._begun[arm, seed] = {"config": config, "inputs": inputs, "settings": settings}
        stage = self.run.begin("ablate", **self._begun[arm, seed], additive=True)
        self._keys[arm, seed] = stage.key
        return stage

    def _write_dynamics(self, trainer: Trainer, arm: Arm, seed: int, key: str) -> None:
        """The observed steps of an arm, before its own rows, so that rows are never without."""
        rows = [
            {
                "arm_key": key,
                "rule": arm.rule,
                "retention_ratio": arm.retention_ratio,
                "seed": seed,
                **{name: getattr(record, name) for name in _OF_RECORD},
                **{name: record.observed.get(name) for name in _OBSERVED},
            }
            for record in trainer.history
            if record.observed
        ]
        if not rows:
            return
        stage = self.run.begin("dynamics", **self._begun[arm, seed], additive=True)
        if not stage.is_whole(0):
            stage.write(0, pl.DataFrame(rows, schema=polars_schema(DynamicsTable)))
        stage.finish(num_rows=len(rows))

    def _keeping(self, arm: Arm, seed: int, key: str) -> Stage | None:
        """Where an arm's weights are kept; None where none are to be."""
        every, last = self.study.keep_every, self.study.training.num_steps
        if not every or arm.is_untrained:
            return None
        return begin_keeping(self.run, key, arm, seed, every, last)

    def _lacks(self, kept: Stage | None, until: int | None = None) -> bool:
        """Whether weights of a step before `until` are to be kept and are not there."""
        if kept is None:
            return False
        steps = kept_steps(self.study.keep_every, self.study.training.num_steps)
        return any(not kept.is_whole(step) for step in steps if until is None or step < until)

    def _train(
        self, arm: Arm, seed: int, key: str, work: Path, kept: Stage | None = None
    ) -> list[dict[str, Any]]:
        names = {"student": self.student_record["name"], "teacher": self.teacher_record["name"]}
        tracker = open_arm_tracker(
            self.study.tracker if self.processes.is_first else TrackerName.NONE,
            self.run,
            f"{arm}-seed{seed}-{key}",
            {**self.study.identity(), **asdict(arm), "seed": seed, **names},
        )
        try:
            return self._go_on(arm, seed, key, work, kept, tracker)
        finally:
            tracker.close()

    def _go_on(
        self, arm: Arm, seed: int, key: str, work: Path, kept: Stage | None, tracker: Tracker
    ) -> list[dict[str, Any]]:
        trainer = self._trainer(arm, seed)
        latest = next(iter(checkpoints(work)), None)
        if latest is not None and self._lacks(kept, int(latest.name.removeprefix("step-"))):
            shutil.rmtree(work, ignore_errors=True)  # weights of earlier steps are wanted too
        rows = _resume(trainer, work, self.processes)
        wanted = kept_steps(self.study.keep_every, trainer.options.num_steps) if kept else []
        if kept is not None and trainer.step in wanted:
            keep_weights(kept, trainer)
        device = trainer.student.device
        last = 0 if arm.is_untrained else trainer.options.num_steps
        peak = 0
        while not rows or rows[-1]["step"] < last:
            until = min(last, _next_multiple(trainer.step, self.study.evaluate_every, last))
            while trainer.step < until:
                reset_peak_memory(device)
                record = trainer.train_step()
                peak = max(peak, peak_memory_bytes(device))
                self._say(
                    arm,
                    seed,
                    step=trainer.step,
                    num_steps=last,
                    loss=record.loss,
                    time_s=record.time_s,
                )
                if kept is not None and trainer.step in wanted:
                    keep_weights(kept, trainer)
                tracker.log(step_figures(record), trainer.step)
                due = trainer.step % self.study.checkpoint_every == 0
                if due and trainer.step < last:
                    self._keep(trainer, work, rows)
            begun = rows[-1]["step"] if rows else 0
            since = self._record(trainer, trainer.history[begun:], arm, seed, key, last)
            since["peak_memory_bytes"] = max(peak, peak_memory_bytes(device) if not peak else 0)
            found = [row | since for row in self._evaluate(trainer, seed)]
            rows += found
            tracker.log(evaluation_figures(found), trainer.step)
            self._say(
                arm,
                seed,
                step=trainer.step,
                num_steps=last,
                accuracies={row["benchmark"]: row["accuracy"] for row in found},
            )
            if trainer.step < last:
                self._keep(trainer, work, rows)
        if self.processes.is_first:
            self._write_dynamics(trainer, arm, seed, key)
        return rows

    def _keep(self, trainer: Trainer, work: Path, rows: list[dict[str, Any]]) -> None:
        if self.processes.is_first:
            save_checkpoint(trainer, work, rows)

    def _trainer(self, arm: Arm, seed: int) -> Trainer:
        study = self.study
        rule = ALL.rule if arm.is_untrained else arm.base_rule
        own = {"rule": rule, "retention_ratio": arm.retention_ratio, "seed": seed} | arm.changes
        options = replace(study.training, **own)
        borrowed = isinstance(study.student, LanguageModel)
        student = prepare_student(self._load(study.student), options, copy_weights=borrowed)
        return Trainer(
            student=student,
            teacher=self.teacher,
            source=self._source(student, options),
            options=options,
            processes=self.processes,
        )

    def _source(
        self, student: LanguageModel, options: TrainingOptions
    ) -> OnPolicyRollouts | FixedRollouts:
        study = self.study
        if study.mode == Mode.OFFLINE:
            return fixed_rollouts(
                self.run,
                student,
                rule=options.rule,
                retention_ratio=options.retention_ratio,
                selection_scope=options.selection_scope,
                mask_seed=options.seed,
                prompts_per_step=options.prompts_per_step,
                seed=options.seed,
                normalization_scope=Scope.RUN,
                divergence_clip=options.divergence_clip,
                weighting=options.weighting,
                cuts=options.cuts,
            )
        sampling = replace(study.sampling, seed=options.seed)
        budget = TokenBudget(study.token_budget)
        return OnPolicyRollouts(
            self.prompts,
            sampling,
            options.prompts_per_step,
            options.rollouts_per_prompt,
            budget,
            self.engine,
            self.playground,
            self.processes,
        )

    def _evaluate(self, trainer: Trainer, seed: int) -> list[dict[str, Any]]:
        """Accuracy, divergence from the teacher and drift of the student as it is: one row per
        benchmark."""
        study = self.study
        how: dict[str, Any] = {
            "num_samples": study.num_samples,
            "sampling": replace(study.evaluation_sampling, seed=seed),
            "benchmarks": self.benchmarks,
        }
        with trainer.precision():
            engine = self._engine_of(trainer.student)
            if (playground := self.playground) is not None:
                tasks = [self._asked[problem.id] for problem in self.problems]
                samples = sample_tasks(engine, playground, tasks, **how)
            else:
                how |= {"grader": study.grader, "processes": self.processes}
                samples = sample_problems(engine, self.problems, **how)
        drift = self._drift(trainer)
        return [self._result(trainer, part) | drift for part in samples.by_benchmark()]

    def _result(self, trainer: Trainer, samples: Samples) -> dict[str, Any]:
        """What one benchmark's samples say."""
        found = accuracy(samples.rewards)
        return {
            "benchmark": samples.benchmarks[0],
            "accuracy": found.accuracy,
            "accuracy_se": None if math.isnan(found.accuracy_se) else found.accuracy_se,
            "best_at_k": found.best_at_k,
            "num_problems": found.num_problems,
            "num_samples": found.num_samples,
            "heldout_reverse_kl": (
                heldout_reverse_kl(trainer, samples) if self.teacher_knows_problems else None
            ),
            "problem_ids": [problem.id for problem in samples.problems],
            "problem_accuracy": samples.rewards.mean(1).tolist(),
            "problem_best": samples.rewards.max(1).tolist(),
            "problem_correct": num_correct(samples.rewards).tolist(),
            "majority_at_k": mean_majority(samples.rewards, samples.answers),
            "response_tokens": float(np.mean(samples.num_tokens)),
            "truncated_share": float(np.mean(samples.truncated)),
        }

    def _engine_of(self, student: LanguageModel) -> Engine:
        """What the student writes with, its weights as they are now."""
        engine = self.engine or HFEngine(student, TokenBudget(self.study.token_budget))
        engine.update(student)
        return engine

    def _drift(self, trainer: Trainer) -> dict[str, float | None]:
        """How far the student is from the author of fixed rollouts; null on policy."""
        if not isinstance(trainer.source, FixedRollouts) or self.author is None:
            return {"drift_reverse_kl": None, "effective_sample_size": None}
        drift = measure_drift(trainer, self.author, trainer.source.all_rollouts()[:DRIFT_ROLLOUTS])
        return {
            "drift_reverse_kl": drift.reverse_kl,
            "effective_sample_size": drift.effective_sample_size,
        }

    def _record(
        self,
        trainer: Trainer,
        records: Sequence[StepRecord],
        arm: Arm,
        seed: int,
        key: str,
        num_steps: int,
    ) -> dict[str, Any]:
        """What training did since the evaluation before."""
        options, losses = trainer.options, [record.loss for record in records]
        return {
            "arm_key": key,
            "rule": arm.rule,
            "retention_ratio": arm.retention_ratio,
            "selection_scope": options.selection_scope,
            "seed": seed,
            "mode": self.study.mode,
            "loss": str(options.loss),
            "weighting": options.weighting,
            "loss_normalizer": options.loss_normalizer,
            "loss_aggregation": options.loss_aggregation,
            "step": trainer.step,
            "num_steps": num_steps,
            "tokens_trained": sum(record.tokens_trained for record in trainer.history),
            "tokens_seen": sum(record.tokens_seen for record in trainer.history),
            "train_loss": float(np.mean(losses)) if losses else None,
            "losses": losses,
            "learning_rate": records[-1].learning_rate if records else 0.0,
            "step_time_s": median(record.time_s for record in records) if records else None,
        }

    def _say(self, arm: Arm, seed: int, **event: Any) -> None:
        self.report(
            {"rule": arm.rule, "retention_ratio": arm.retention_ratio, "seed": seed, **event}
        )


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the record of an arm keeps of its last evaluation."""
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    counts = {name: last[0][name] for name in ("tokens_trained", "tokens_seen")}
    return {"accuracy": {row["benchmark"]: row["accuracy"] for row in last}, **counts}


def _resume(trainer: Trainer, work: Path, processes: Processes) -> list[dict[str, Any]]:
    """Go on from the last sound checkpoint, if there is any; returns the rows so far. Further
    processes read the one that the first found sound."""
    if not processes.is_first:
        found = processes.of_first("")
        return load_checkpoint(trainer, work / found) if found else []
    rows, found = _last_sound(trainer, work)
    processes.of_first(found)
    return rows


def _last_sound(trainer: Trainer, work: Path) -> tuple[list[dict[str, Any]], str]:
    for checkpoint in checkpoints(work):
        try:
            return load_checkpoint(trainer, checkpoint), checkpoint.name
        except ConfigurationMismatchError:
            raise
        except RunError as error:
            logger.warning("%s; training goes on from before it", error)
            shutil.rmtree(checkpoint, ignore_errors=True)
    return [], ""


@torch.no_grad()
def heldout_reverse_kl(trainer: Trainer, samples: Samples) -> float:
    """Mean over problems of the mean over tokens of KL(P_S ‖ P_T), nats, on the first sample of
    each problem."""
    rollouts = samples.first_rollouts()
    written = [rollout.written for rollout in rollouts]
    with trainer.precision():
        statistics = step_statistics(
            frozenset({"reverse_kl"}),
            student_hidden=trainer.hidden(trainer.student, rollouts, written),
            teacher_hidden=trainer.hidden(trainer.teacher, rollouts, written, teacher=True),
            student_head=trainer.student.head,
            teacher_head=trainer.teacher.head,
            vocab_size=trainer.vocab_size,
        )
    index = np.repeat(np.arange(len(rollouts)), [int(mask.sum()) for mask in written])
    return float(
        np.mean(
            np.bincount(index, weights=statistics["reverse_kl"].astype(np.float64))
            / np.bincount(index)
        )
    )


def _next_multiple(step: int, every: int, last: int) -> int:
    return last if every <= 0 else (step // every + 1) * every


def _prompts_hash(prompts: Sequence[Prompt]) -> str:
    fields = [[p.id, p.problem, p.messages, p.answer, p.solution] for p in prompts]
    benchmarks = [prompt.benchmark for prompt in prompts]
    return config_hash([fields, benchmarks])
