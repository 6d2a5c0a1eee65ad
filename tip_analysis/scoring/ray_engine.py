"""Scoring spread over Ray actors, on one machine or many that share the run folder.

Every actor holds both models and turns shards of rollouts into shards of the token table, exactly
as one process does. A worker that is lost costs the shard it was working on, which another one
makes: Ray Data starts it again and gives it its work again. Needs the optional extra `[ray]`.

Ray is started in this process's name and stopped at the end, unless it runs here already or
RAY_ADDRESS names a cluster.
"""

import logging
import os
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import polars as pl
import torch

from tip_analysis.core.errors import InputError, OptionError
from tip_analysis.core.names import StopTokens, TeacherContext
from tip_analysis.core.optional import require
from tip_analysis.core.progress import track
from tip_analysis.core.run_folder import open_run
from tip_analysis.core.text import first_line
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import load_model
from tip_analysis.rollouts.teacher_prompts import num_shards
from tip_analysis.scoring.scorer import Scorer
from tip_analysis.scoring.stage import ScoringWork, begin_scoring, finish_scoring, score_shard

STARTS = 3
"""Attempts at starting Ray: it waits 15 s for its own helpers, which a busy machine may need longer
to load the first time."""

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}


@dataclass(frozen=True)
class ScoringJob:
    """Everything that a worker needs to know."""

    run: str
    """Run folder: an absolute path that every worker sees."""
    student: str
    teacher: str
    teacher_context: TeacherContext = TeacherContext.NONE
    shard_size: int = 64
    top_k: int = 5
    stop_tokens: StopTokens = StopTokens.DECLARED
    token_budget: int = 16384
    dtype: str = "auto"
    device: str = "auto"
    overwrite: bool = False
    session: str | None = None
    """What all workers of one scoring that overwrites have in common, those started again
    included."""

    def begin(self) -> ScoringWork:
        """Load both models, and begin the stage or go on with it."""
        student = load_model(self.student, dtype=self.dtype, device=self.device)
        same = self.teacher == self.student
        teacher = (
            student if same else load_model(self.teacher, dtype=self.dtype, device=self.device)
        )
        scorer = Scorer(
            student,
            teacher,
            TokenBudget(self.token_budget),
            self.top_k,
            stop_tokens=self.stop_tokens,
        )
        return begin_scoring(
            open_run(self.run),
            scorer,
            self.teacher_context,
            self.shard_size,
            overwrite=self.session or False,
        )


class _Worker:
    """An actor: both models, ready to score one shard after another.

    An error of ours is an answer, not a failure: it must reach the user as it is. It also makes the
    file `stop`, at which all workers have no more work, so that the pool ends by itself.
    """

    def __init__(self, job: ScoringJob, num_threads: int, stop: Path) -> None:
        torch.set_num_threads(num_threads)
        self.stop = stop
        self.error: InputError | None = None
        try:
            self.work = job.begin()
        except InputError as error:
            self.error = error

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        rollouts = tokens = 0
        try:
            if self.error is not None:
                raise self.error
            for index in map(int, batch["index"]):
                if self.stop.exists():
                    continue
                if not self.work.stage.is_whole(
                    index
                ):  # it may be: made just before a failure, or by an earlier session
                    tokens += score_shard(self.work, index)
                rollouts += self.work.shard(index).height
        except InputError as error:
            self.stop.touch()
            return {"rollouts": [rollouts], "tokens": [tokens], "error": [pickle.dumps(error)]}
        return {"rollouts": [rollouts], "tokens": [tokens], "error": [b""]}


def score_with_ray(job: ScoringJob, *, num_workers: int | None = None) -> dict[str, Any]:
    """Score every rollout of a run with Ray Data over a pool of actors.

    Args:
        job: models and options.
        num_workers: actors; by default one for each GPU of the cluster, or one for each machine
            without GPUs. The CPUs are shared out evenly: each actor computes with as many
            threads.

    Returns:
        The stage's summary, as `run.json` has it.

    Raises:
        InputError: as `scoring.score_rollouts`; or Ray does not start.
        MissingExtraError: Ray is not installed.
        OptionError: more workers than there are CPUs.
    """
    run = open_run(job.run)
    count = num_shards(run, job.shard_size)
    with _cluster() as ray:
        resources = ray.cluster_resources()
        num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        num_workers = num_workers or num_gpus or max(1, len(ray.nodes()))
        if not 1 <= num_workers <= num_cpus:
            raise OptionError(
                f"--ray-workers must lie between 1 and the cluster's {num_cpus} CPUs, found"
                f" {num_workers}"
            )
        if job.overwrite:
            job = replace(job, session=uuid4().hex)
        threads = num_cpus // num_workers
        stop = run.path / f".stop-{uuid4().hex}"
        scored = ray.data.from_items(
            [{"index": index} for index in range(count)], override_num_blocks=max(1, count)
        ).map_batches(
            _Worker,
            fn_constructor_args=(job, threads, stop),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=min(num_workers, max(1, count)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=threads,
            num_gpus=num_gpus / num_workers if num_gpus else None,
        )
        errors = []
        try:
            with track("scoring", run.rollouts().select(pl.len()).collect().item()) as advance:
                for batch in scored.iter_batches(batch_size=1):
                    advance(int(batch["rollouts"][0]), tokens=int(batch["tokens"][0]))
                    errors += filter(None, batch["error"])
        finally:
            stop.unlink(missing_ok=True)
    if errors:
        raise pickle.loads(errors[0])
    return finish_scoring(run, run.stage("score"))


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, started if need be, and stopped again if it was."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    require("ray", "--engine ray")
    import ray  # pyright: ignore[reportMissingImports]  # an optional extra
    import ray.data  # pyright: ignore[reportMissingImports]

    ours = not ray.is_initialized()
    if ours:
        _start(ray)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _start(ray: Any) -> None:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names."""
    for attempt in range(1, STARTS + 1):
        try:
            with warnings.catch_warnings(), _stderr_closed():
                warnings.simplefilter("ignore")  # about Ray's own releases to come
                ray.init(
                    address=os.environ.get("RAY_ADDRESS", "local"),
                    include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            return
        except Exception as error:  # Ray raises plain exceptions here
            ray.shutdown()
            if attempt == STARTS:
                reason = first_line(error)
                raise InputError(
                    f"Ray did not start in {STARTS} attempts: {reason} Start it with `ray start"
                    " --head` and set RAY_ADDRESS=auto, or use --shard i/n"
                ) from error


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Drop what compiled code says on stderr: Ray reports there that it was told to be quiet."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
