"""Models from strangers: used, or refused in one line, in little time and memory; nothing outside
is touched."""

import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from faults.model_folders import good_folders, model_cases, write_weights_outside
from faults.run_folders import run_case

SHORT, WHOLE = 60, 2000
"""Mutations in the gate, and in the marked target."""
SECONDS, BYTES = 30, 2**30
"""What a case may take, on a busy machine."""

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, as commands do


@pytest.fixture(scope="module")
def goods(tmp_path_factory) -> list[Path]:
    return good_folders(tmp_path_factory.mktemp("good"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Endless templates and patterns are stopped sooner than they are for users."""
    monkeypatch.setattr("tip_analysis.rollouts.template_limits.SECONDS", 1.0)
    monkeypatch.setattr("tip_analysis.rollouts.template_limits.BYTES", 2**27)
    monkeypatch.setattr("tip_analysis.models.adapter_patterns.SECONDS", 2.0)


@contextmanager
def limited():
    """At most so much more memory, and so much time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, hard))

    def late(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run_all(cases, capfd, tmp_path: Path, count_check) -> None:
    """Each case ends with 0 or 2, says one line at most, and leaves all else alone."""
    outside = [tmp_path / "x", tmp_path / "x.safetensors"]
    for path in outside:
        write_weights_outside(path)
    before = [path.read_bytes() for path in outside]
    statuses = []
    for name, arguments in cases:
        capfd.readouterr()
        with limited():
            status = run_case(arguments)
        said = capfd.readouterr().err.splitlines()
        case = f"{name}: {said}"
        assert status in (0, 2), case
        assert len([line for line in said if not line.startswith("WARNING: ")]) <= 1, case
        assert status == 0 or said[-1].startswith("error: "), case
        assert not [line for line in said if "memory" in line or "allocate" in line], case
        statuses.append(status)
        count_check("model folders: mutations")
    assert [path.read_bytes() for path in outside] == before
    assert set(statuses) == {0, 2}


def test_good_models_are_used(goods, tmp_path, capfd):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"problem": "x"}')
    for good in goods:
        name = good / "model.gguf" if good.name == "gguf" else good
        command = ["rollout", str(tmp_path / good.name), "--student", str(name)]
        command += ["--prompts", str(prompts), "--max-new-tokens", "2", "--num-rollouts", "1"]
        assert run_case([*command, "--dtype", "float32", "--device", "cpu"]) == 0, (
            capfd.readouterr()
        )


def test_spoiled_models(goods, capfd, tmp_path, count_check):
    run_all(model_cases(0, SHORT, goods, tmp_path / "a" / "b"), capfd, tmp_path, count_check)


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_many_spoiled_models(goods, capfd, tmp_path, count_check):
    run_all(model_cases(1, WHOLE, goods, tmp_path / "a" / "b"), capfd, tmp_path, count_check)
