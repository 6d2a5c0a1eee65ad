"""Several training processes at once: Ctrl-C in a terminal, and a process that is killed."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def study(tmp_path):
    """A study of two processes in a process group of its own, as a shell would start it."""
    command = [sys.executable, "-m", "tip_analysis", "ablate", str(tmp_path / "run")]
    command += ["--preset", "arithmetic", "--rules", "q3:0.5", "entropy:0.5", "--seeds", "0", "1"]
    command += ["--jobs", "2", "--steps", "500", "--limit", "16"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    yield process
    for member in descendants(process):
        member.kill()
    process.kill()
    process.communicate()


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def trainers(process: subprocess.Popen) -> list[psutil.Process]:
    """Its training processes, once there are two."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [one for one in descendants(process) if "spawn_main" in " ".join(one.cmdline())]
        if len(found) >= 2:
            return found
        time.sleep(0.1)
    raise AssertionError("no training process was started")


@pytest.mark.parametrize("delay", [0.0, 2.0, 20.0])
def test_ctrl_c_ends_all_of_them_with_one_line(study, delay):
    started = trainers(study)
    time.sleep(delay)
    os.killpg(study.pid, signal.SIGINT)
    _, said = study.communicate(timeout=120)
    assert said.decode() == "interrupted; the same command goes on from here\n"
    assert study.returncode == 130
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


@pytest.mark.parametrize("delay", [0.0, 20.0])
def test_a_killed_process_is_one_line(study, delay):
    started = trainers(study)
    time.sleep(delay)
    started[0].kill()
    _, said = study.communicate(timeout=300)
    (line,) = said.decode().splitlines()
    assert line.startswith("error: a training process ended abruptly")
    assert study.returncode == 1
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
