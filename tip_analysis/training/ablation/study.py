"""`ablate`: train every arm (rule × retention ratio) under every seed, with a live table while it
runs.

Each arm and seed is one whole Parquet file in `ablations/` or none (`arm_training`). Run again, a
study skips what is done and goes on from the checkpoint of what was interrupted, be it by kill -9.
Arms of one seed share prompts, steps, rollouts a step and random numbers; `all` is trained once a
seed whatever the ratios, and the student as it was is evaluated once a seed.

Under `accelerate launch` all processes train one arm after another together (`processes`).

With `jobs` above 1, arms run in spawned processes of `threads` threads each; a process ends by
itself when the one that started it is gone. Results differ between numbers of threads by rounding,
which sampling can turn into other tokens.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from tip_analysis.analysis.arms import UNTRAINED, Arm
from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.weightings import weighting_of
from tip_analysis.core.errors import OptionError, PromptFileError, TipAnalysisError
from tip_analysis.core.names import Mode, SamplingEngine
from tip_analysis.core.run_folder import Run
from tip_analysis.core.terminal import stderr_console
from tip_analysis.rollouts.environments.episodes import Limits
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.training.ablation.arm_training import ArmRunner, StudyOptions
from tip_analysis.training.ablation.presets import Preset
from tip_analysis.training.processes import Processes, launched_processes

Task = tuple[Arm, int]


def run_ablation(
    run: Run,
    study: StudyOptions,
    *,
    arms: Sequence[Arm],
    seeds: Sequence[int] = (0,),
    jobs: int = 1,
    threads: int = 1,
) -> pl.DataFrame:
    """Train and evaluate all arms under all seeds; what is done already is kept.

    Args:
        run: the run folder; offline, the one that holds rollouts and masks.
        study: what the arms share.
        arms: as `parse_arms` gives them.
        seeds: at least one.
        jobs: processes at once; 1 stays in this one.
        threads: of each spawned process.

    Returns:
        The study's rows of the ablation table, those of the untrained student included.

    Raises:
        OptionError: nothing to do, or options that contradict each other.
        TipAnalysisError: a process ended abruptly; what was done is kept.
    """
    _check(study, arms, seeds, jobs)
    processes = launched_processes()
    if processes.size > 1:
        study = _in_parallel(study, jobs, processes)
    seeds = list(dict.fromkeys(seeds))
    tasks = [(arm, seed) for seed in seeds for arm in (Arm(UNTRAINED), *dict.fromkeys(arms))]
    with _board(tasks, shown=processes.is_first) as board:
        if jobs == 1:
            runner = ArmRunner(run, study, board, processes)
            with contextlib.closing(runner):
                for arm, seed in tasks:
                    board.begin(arm, seed)
                    board.end(arm, seed, runner.run_arm(arm, seed))
            keys = [runner.arm_key(arm, seed) for arm, seed in tasks]
        else:
            keys = _run_in_processes(run, study, tasks, board, jobs, threads)
    processes.wait()  # the first one has written the last arm by then
    rows = run.ablations().filter(pl.col("arm_key").is_in(keys)).collect()
    return rows.sort("rule", "retention_ratio", "seed", "step", maintain_order=True)


def study_from_preset(
    preset: Preset,
    *,
    prompts: Sequence[Prompt],
    evaluation_prompts: Sequence[Prompt],
    **options: Any,
) -> StudyOptions:
    """What the arms of a preset share.

    Args:
        preset: as `resolve_preset` gives it.
        prompts: what it trains on (`load_prompts`); none offline.
        evaluation_prompts: its held-out problems (`load_evaluation_sets`).
        options: further fields of `StudyOptions`.
    """
    sampling = Sampling(max_new_tokens=preset.max_new_tokens)
    both: dict[str, Any] = {"sampling": sampling, "evaluation_sampling": sampling}
    both |= {"limits": Limits(preset.max_turns)}
    shared = {name: getattr(preset, name) for name in _SHARED}
    given: dict[str, Any] = {"prompts": tuple(prompts)}
    given |= {"evaluation_prompts": tuple(evaluation_prompts)}
    return StudyOptions(**(both | shared | options | given))


_SHARED = ("student", "teacher", "mode", "training", "num_samples", "grader", "template")
_SHARED += ("max_prompt_tokens", "chat_template_kwargs", "environment")
"""Fields that a study has of its preset."""


def _check(study: StudyOptions, arms: Sequence[Arm], seeds: Sequence[int], jobs: int) -> None:
    if not arms or not seeds:
        raise OptionError("an ablation needs at least one arm and one seed")
    if study.mode == Mode.ON_POLICY and not study.prompts:
        raise OptionError("on-policy training needs prompts to train on")
    if not study.evaluation_prompts:
        raise OptionError("an ablation needs held-out problems to evaluate on")
    if study.checkpoint_every < 1 or study.evaluate_every < 0 or study.keep_every < 0:
        raise OptionError(
            "checkpoint_every must be at least 1, evaluate_every and keep_every at least 0"
        )
    for prompt in study.evaluation_prompts:
        if prompt.answer is None and study.environment is None:
            raise PromptFileError(f"evaluation prompt {prompt.id!r} has no answer to grade against")
    for arm in arms:
        _check_weighting(study, arm)
    if jobs < 1:
        raise OptionError(f"--jobs must be at least 1, found {jobs}")
    if study.engine.engine is SamplingEngine.SERVER:
        raise OptionError(
            "ablate trains the student, whose weights a server cannot be given: --engine hf or vllm"
        )
    if jobs > 1 and study.engine.engine is SamplingEngine.VLLM:
        raise OptionError(
            "--engine vllm takes the device for itself: train arms one after another, --jobs 1"
        )
    if jobs > 1 and not (isinstance(study.student, str) and isinstance(study.teacher, str)):
        raise OptionError(
            "with --jobs above 1, models must be given by name: each process loads its own"
        )


def _check_weighting(study: StudyOptions, arm: Arm) -> None:
    """Refuse an arm whose weights cannot be made, before any arm is trained."""
    name = arm.changes.get("weighting", study.training.weighting)
    kind, chosen = weighting_of(name), rule_of(arm.base_rule)
    if kind.of_selection and not (chosen.sampled or chosen.keeps_all):
        raise OptionError(
            f"the weighting {name} needs a rule that samples tokens, such as entropy_sampling;"
            f" found the arm {arm}"
        )
    if kind.needs_gradients and study.mode == Mode.ON_POLICY:
        raise OptionError(
            f"the weighting {name} needs measured gradients: train with --mode offline on a run"
            f" that has them; found the arm {arm}"
        )


def _in_parallel(study: StudyOptions, jobs: int, processes: Processes) -> StudyOptions:
    """The study on the device that this process was given.

    Raises:
        OptionError: arms are to run beside each other as well, all processes on one device, or
            with an engine that takes the device for itself.
    """
    if study.engine.engine is not SamplingEngine.HF:
        raise OptionError(
            f"--engine {study.engine.engine} takes a device for itself: under accelerate launch"
            " leave it at hf"
        )
    if study.environment is not None:
        raise OptionError("--environment is for one process: leave accelerate launch out")
    if jobs > 1:
        raise OptionError(
            "under accelerate launch all processes train one arm together: leave --jobs at 1"
        )
    if study.device not in ("auto", str(processes.device).partition(":")[0]):
        raise OptionError(
            f"--device {study.device}: under accelerate launch each process has a device of its"
            " own; leave it out"
        )
    return replace(study, device=str(processes.device))


def _run_in_processes(
    run: Run, study: StudyOptions, tasks: Sequence[Task], board: "_Board", jobs: int, threads: int
) -> list[str]:
    context = multiprocessing.get_context("spawn")
    events, stop = context.Queue(), context.Event()
    arguments = (run.path, study, events, threads, os.getpid(), stop)
    with _environment(
        OMP_NUM_THREADS=str(threads),
        POLARS_MAX_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
    ):
        executor = ProcessPoolExecutor(
            min(jobs, len(tasks)), mp_context=context, initializer=_start, initargs=arguments
        )
        try:
            with _without_interrupts():
                futures = [executor.submit(_run_task, task) for task in tasks]
            _follow(futures, events, board)
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            stop.set()  # arms go on from their checkpoints when the command is run again
            raise
        except BrokenProcessPool as error:
            raise TipAnalysisError(
                "a training process ended abruptly (out of memory, for one); finished arms are"
                " kept: run the command again, with fewer --jobs if memory ran out"
            ) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
            _drain(events, board)


def _follow(futures: Sequence[Future[str]], events: Any, board: "_Board") -> None:
    """Show what processes report until all tasks are done; the first error ends the study."""
    while True:
        with contextlib.suppress(queue.Empty):
            board(events.get(timeout=0.2))
        for future in futures:
            if future.done():
                future.result()
        if all(future.done() for future in futures):
            return


def _drain(events: Any, board: "_Board") -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            board(events.get(timeout=0.05))


_runner: ArmRunner | None = None
_runner_error: Exception | None = None


def _start(
    path: Path, study: StudyOptions, events: Any, threads: int, parent: int, stop: Any
) -> None:
    """Set up a spawned process; an error here is kept for the first task, since a pool would hide
    it."""
    global _runner, _runner_error
    threading.Thread(target=_end_with, args=(parent, stop), daemon=True).start()
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        _runner = ArmRunner(Run(path), study, events.put)
    except Exception as error:
        _runner_error = error


def _run_task(task: Task) -> str:
    if _runner is None:
        raise _runner_error or TipAnalysisError("the training process was not set up")
    arm, seed = task
    about = {"rule": arm.rule, "retention_ratio": arm.retention_ratio, "seed": seed}
    _runner.report(about | {"status": "running"})
    _runner.report(about | {"status": _runner.run_arm(arm, seed)})
    return _runner.arm_key(arm, seed)


def _end_with(parent: int, stop: Any) -> None:
    """End this process when its parent is gone or says so, so that none trains on for nobody."""
    while os.getppid() == parent and not stop.wait(0.5):
        pass
    os._exit(1)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside never see Ctrl-C, which goes to all of a terminal's
    processes: this one sees it, when the block is over, and ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables for processes that are started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Board:
    """The live table: one row per arm, one cell per seed; silent without a terminal."""

    def __init__(self, tasks: Sequence[Task], live: Live | None) -> None:
        self._arms = list(dict.fromkeys(arm for arm, _ in tasks))
        self._seeds = list(dict.fromkeys(seed for _, seed in tasks))
        self._state: dict[Task, dict[str, Any]] = {task: {"status": "waiting"} for task in tasks}
        self._live = live

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take in what an arm reports."""
        task = (Arm(event["rule"], event["retention_ratio"]), event["seed"])
        self._state[task].update(event)
        if self._live is not None:
            self._live.update(self.table())

    def begin(self, arm: Arm, seed: int) -> None:
        """An arm begins."""
        self(
            {
                "rule": arm.rule,
                "retention_ratio": arm.retention_ratio,
                "seed": seed,
                "status": "running",
            }
        )

    def end(self, arm: Arm, seed: int, status: str) -> None:
        """An arm is done."""
        self(
            {
                "rule": arm.rule,
                "retention_ratio": arm.retention_ratio,
                "seed": seed,
                "status": status,
            }
        )

    def table(self) -> Table:
        """What there is to see now."""
        done = sum(state["status"] in ("done", "kept") for state in self._state.values())
        table = Table(
            title=f"arms: {done} of {len(self._state)} done",
            box=None,
            title_justify="left",
            header_style="bold",
        )
        table.add_column("arm")
        for seed in self._seeds:
            table.add_column(f"seed {seed}", justify="right", min_width=14)
        for arm in self._arms:
            table.add_row(str(arm), *(_cell(self._state[arm, seed]) for seed in self._seeds))
        return table


def _cell(state: Mapping[str, Any]) -> Text:
    status = state["status"]
    if status in ("waiting", "kept"):
        return Text("·" if status == "waiting" else "kept", style="dim")
    if status == "running":
        loss = f" {state['loss']:.3f}" if "loss" in state else ""
        return Text(f"{state.get('step', 0)}/{state.get('num_steps', '…')}{loss}", style="cyan")
    accuracies = state.get("accuracies", {}).values()
    shown = " / ".join(f"{100 * value:.1f}" for value in accuracies)
    return Text(f"{shown} %" if shown else "done", style="green")


@contextlib.contextmanager
def _board(tasks: Sequence[Task], *, shown: bool) -> Iterator[_Board]:
    if not (shown and sys.stderr.isatty()):
        yield _Board(tasks, None)
        return
    with Live(console=stderr_console(), refresh_per_second=4) as live:
        board = _Board(tasks, live)
        live.update(board.table())
        yield board
