"""Scoring spread over Ray actors, on one machine or many that share the run folder.

Every actor holds both models and turns shards of rollouts into shards of the token table, exactly as one process does. A
worker that is lost costs the shard it was working on, which another one makes. Needs the optional extra `[ray]`.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tip_analysis.artifacts import open_run
from tip_analysis.batching import TokenBudget
from tip_analysis.errors import InputError, OptionError
from tip_analysis.models import load_model
from tip_analysis.progress import track
from tip_analysis.scoring import Scorer, ScoringWork, begin_scoring, finish_scoring, score_shard


@dataclass(frozen=True)
class ScoringJob:
    """Everything that a worker needs to know."""

    run: str
    """Run folder: an absolute path that every worker sees."""
    student: str
    teacher: str
    teacher_context: str = "none"
    shard_size: int = 64
    top_k: int = 5
    token_budget: int = 16384
    dtype: str = "auto"
    device: str = "auto"
    overwrite: bool = False

    def load(self) -> tuple[Scorer, ScoringWork]:
        """Load both models, and begin the stage or go on with it."""
        student = load_model(self.student, dtype=self.dtype, device=self.device)
        same = self.teacher == self.student
        teacher = student if same else load_model(self.teacher, dtype=self.dtype, device=self.device)
        scorer = Scorer(student, teacher, TokenBudget(self.token_budget), self.top_k)
        work = begin_scoring(open_run(self.run), scorer, self.teacher_context, self.shard_size)
        return scorer, work


class _Worker:
    """An actor: both models, ready to score one shard after another."""

    def __init__(self, job: ScoringJob, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.scorer, self.work = job.load()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        done: dict[str, list[int]] = {"rollouts": [], "tokens": []}
        for index in map(int, batch["index"]):
            whole = self.work.stage.is_whole(index)  # made before a failure that Ray could not know to be after it
            done["tokens"].append(0 if whole else score_shard(self.scorer, self.work, index))
            done["rollouts"].append(self.work.shard(index).height)
        return done


def score_with_ray(job: ScoringJob, *, num_workers: int | None = None) -> dict[str, Any]:
    """Score every rollout of a run with Ray Data over a pool of actors.

    Args:
        job: models and options.
        num_workers: actors; by default one for each GPU of the cluster, or one for each machine without GPUs.

    Returns:
        The stage's summary, as `run.json` has it.

    Raises:
        InputError: as `scoring.score_rollouts`; or Ray is not installed.
        OptionError: more workers than there are processors.
    """
    ray = _start_ray()
    run = open_run(job.run)
    if job.overwrite:
        run.discard("score")
    num_shards = -(-run.rollouts().select("rollout_id").collect().height // job.shard_size)
    resources = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    num_workers = num_workers or num_gpus or max(1, len(ray.nodes()))
    if not 1 <= num_workers <= num_cpus:
        raise OptionError(f"--ray-workers must lie between 1 and the cluster's {num_cpus} processors, found {num_workers}")
    threads = max(1, num_cpus // num_workers)
    shards = ray.data.from_items([{"index": index} for index in range(num_shards)], override_num_blocks=max(1, num_shards))
    scored = shards.map_batches(
        _Worker,
        fn_constructor_args=(job, threads),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
        num_cpus=threads,
        num_gpus=num_gpus / num_workers if num_gpus else None,
        max_restarts=-1,
        max_task_retries=-1,
    )
    try:
        with track("scoring", run.rollouts().collect().height) as advance:
            for batch in scored.iter_batches(batch_size=1):
                advance(int(sum(batch["rollouts"])), tokens=int(sum(batch["tokens"])))
    except ray.exceptions.RayError as error:
        raise _own_error(error) from error
    return finish_scoring(run, run.stage("score"))


def _start_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("--engine ray needs Ray: pip install 'tip-analysis[ray]'") from error
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray


def _own_error(error: BaseException) -> BaseException:
    """The error of ours that a worker met, out of what Ray wraps it in."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, InputError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error
