"""Scoring over Ray actors: the table of one process, whatever happens to a worker."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny_models import tiny_language_model

from tip_analysis.core.errors import ConfigurationMismatchError, InputError, OptionError, RunError
from tip_analysis.core.run_folder import create_run, open_run
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.models.loading import load_model
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring import ray_engine
from tip_analysis.scoring.ray_engine import ScoringJob, score_with_ray
from tip_analysis.scoring.stage import Scorer, score_rollouts

slow = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is an optional extra"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two actors need two CPUs"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


def test_ray_that_is_not_installed_is_named(monkeypatch, job):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "tip-analysis\[ray\]"'):
        score_with_ray(job)


def test_a_cluster_that_does_not_start_is_tried_again_and_then_named():
    calls = []

    def init(**_):
        calls.append("init")
        raise Exception("The current node timed out during startup.\nMore")

    fake = SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown"))
    with pytest.raises(
        InputError,
        match=r"did not start in 3 attempts: The current node timed out during startup\. Start it",
    ):
        ray_engine._start(fake)
    assert calls == ["init", "shutdown"] * ray_engine.STARTS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model in {
        "student": tiny_language_model(),
        "teacher": tiny_language_model("llama", seed=5),
    }.items():
        model.model.save_pretrained(folder / name)
        model.tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def rollouts(models, tmp_path_factory):
    run = create_run(tmp_path_factory.mktemp("runs") / "run")
    prompts = [Prompt(id=row["id"], problem=row["problem"]) for row in problems(10, seed=1)]
    student = load_model(str(models / "student"), dtype="float32", device="cpu")
    sample_rollouts(
        run, student=student, prompts=prompts, sampling=Sampling(max_new_tokens=20), num_rollouts=4
    )
    return run.rollouts().collect()


@pytest.fixture
def run(models, rollouts, tmp_path):
    run = create_run(tmp_path / "run")
    run.begin("rollout", config={"student": {"name": str(models / "student")}}).write(0, rollouts)
    return run


@pytest.fixture
def job(run, models):
    names = {name: str(models / name) for name in ("student", "teacher")}
    return ScoringJob(run=str(run.path), **names, shard_size=1, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def cluster():
    """Ray, started once for all tests, as the engine starts it."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    with ray_engine._cluster() as ray:
        yield ray


@pytest.fixture(scope="module")
def one_process(cluster, models, rollouts, tmp_path_factory):
    """The table of one process with as many threads as each of two actors has."""
    run = create_run(tmp_path_factory.mktemp("whole") / "run")
    run.begin("rollout", config={}).write(0, rollouts)
    student, teacher = (
        load_model(str(models / name), dtype="float32", device="cpu")
        for name in ("student", "teacher")
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(int(cluster.cluster_resources()["CPU"]) // 2)
    try:
        score_rollouts(run, Scorer(student, teacher), shard_size=1)
    finally:
        torch.set_num_threads(threads)
    return run


def workers() -> list[psutil.Process]:
    """Processes of the actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Worker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class TestCluster:
    pytestmark = slow

    def test_two_actors_give_the_table_of_one_process(self, one_process, run, job):
        summary = score_with_ray(job, num_workers=2)
        assert run.tokens().collect().equals(one_process.tokens().collect())
        assert summary == one_process.stages()["score"]["summary"]
        assert run.stages()["score"]["config"] == one_process.stages()["score"]["config"]
        made = {path: path.stat().st_mtime_ns for path in (run.path / "tokens").iterdir()}
        score_with_ray(job, num_workers=2)  # nothing is left to do
        assert {path: path.stat().st_mtime_ns for path in made} == made

    def test_a_killed_actor_loses_nothing(self, one_process, run, job):
        killed: list[tuple[int, int]] = []

        def kill_one() -> None:
            while not (done := len(list(run.path.glob("tokens/*.parquet")))):
                time.sleep(0.002)
            victim = workers()[0]
            victim.send_signal(signal.SIGKILL)
            killed.append((victim.pid, done))

        killer = threading.Thread(target=kill_one, daemon=True)
        killer.start()
        score_with_ray(job, num_workers=2)
        killer.join()
        assert killed[0][1] < 40
        assert run.tokens().collect().equals(one_process.tokens().collect())
        assert not list(run.path.rglob("*.part"))
        assert run.altered_shards() == []

    def test_errors_of_ours_arrive_as_they_are(self, cluster, run, job, capfd):
        with pytest.raises(OptionError, match="--ray-workers must lie between 1 and"):
            score_with_ray(job, num_workers=10_000)
        with pytest.raises(RunError, match="has no solution"):
            score_with_ray(replace(job, teacher_context="solution"), num_workers=1)
        assert capfd.readouterr() == ("", "")
        assert not [path for path in run.path.iterdir() if path.name.startswith(".stop")]
        run.begin("score", config={"student": "another"}).write_file(
            0, lambda path: path.touch(), num_rows=0
        )
        with pytest.raises(ConfigurationMismatchError, match="begun with another configuration"):
            score_with_ray(job, num_workers=1)
        score_with_ray(replace(job, overwrite=True, shard_size=20), num_workers=1)
        assert run.tokens().collect().height > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is an optional extra")
def test_the_command_starts_ray_by_itself_and_is_quiet(run, models):
    command = [
        sys.executable,
        "-m",
        "tip_analysis",
        "score",
        str(run.path),
        "--teacher",
        str(models / "teacher"),
    ]
    command += ["--engine", "ray", "--shard-size", "20", "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "num scored tokens" in done.stdout
    assert open_run(run.path).stages()["score"]["finished"]
    wrong = subprocess.run(
        [*command, "--teacher-context", "solution"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1


class TestLostDriver:
    pytestmark = slow

    def test_what_a_killed_driver_began_another_process_finishes(self, rollouts, run, models):
        whole = create_run(run.path.with_name("whole"))
        whole.begin("rollout", config={}).write(0, rollouts)
        names = [str(models / name) for name in ("student", "teacher")]
        student, teacher = (load_model(name, dtype="float32", device="cpu") for name in names)
        score_rollouts(whole, Scorer(student, teacher), shard_size=1)
        command = [sys.executable, "-m", "tip_analysis", "score", str(run.path)]
        command += ["--teacher", names[1], "--shard-size", "1", "--dtype", "float32"]
        # Two workers on two CPUs have one thread each, as this process has (see conftest.py), and
        # sums of floats depend on the number of threads.
        driver = subprocess.Popen(
            [*command, "--engine", "ray", "--ray-workers", "2"],
            env=os.environ | {"RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while not (done := len(list(run.path.glob("tokens/*.parquet")))):
            assert driver.poll() is None, "the driver ended before its first shard"
            time.sleep(0.002)
        left = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
        assert done < 40
        subprocess.run(command, check=True, capture_output=True)
        assert torch.get_num_threads() == 1
        assert run.tokens().collect().equals(whole.tokens().collect())
        assert open_run(run.path).stages()["score"]["finished"]
        assert not list(run.path.rglob("*.part"))
        _, alive = psutil.wait_procs(left, timeout=300)
        assert not alive, "Ray's own processes end when the driver does"
