"""Our own trainer in one process and in two (gloo), and the command under `accelerate launch`."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import tip_analysis as tip
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import SamplingEngine
from tip_analysis.rollouts.engines.settings import EngineSettings
from tip_analysis.training.ablation.arm_training import StudyOptions
from tip_analysis.training.ablation.study import _in_parallel
from tip_analysis.training.processes import ALONE, Processes, launched_processes

SCRIPT = Path(__file__).parents[1] / "train_in_processes.py"
SIZES = (1, 2)


def launch(processes, *arguments):
    """Run a script or a module under `accelerate launch`, on CPUs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--num_processes", str(processes), *(["--multi_gpu"] if processes > 1 else [])]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)],
        check=False,
        env=os.environ | quiet | {"PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
    )


def trained(folder, size, options):
    out = folder / f"{size}.json"
    ended = launch(size, SCRIPT, out, json.dumps(options))
    assert ended.returncode == 0, ended.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["size"] == size
    return record["history"], [
        load_file(out.with_suffix(f".{rank}.safetensors")) for rank in range(size)
    ]


CASES = [
    {"rule": "soft_or", "retention_ratio": 0.3},
    {"rule": "q3", "retention_ratio": 0.2, "selection_scope": "batch", "micro_batch_size": 1},
    {"rule": "all", "loss_aggregation": "token", "micro_batch_size": 2},
    {"rule": "entropy_sampling", "retention_ratio": 0.5, "lora_rank": 2},
    {
        "rule": "soft_or",
        "retention_ratio": 0.1,
        "selection_scope": "run",
        "prompts_per_step": 1,
        "rollouts_per_prompt": 1,
    },
    {"offline": True, "rule": "soft_or", "retention_ratio": 0.5, "rescore_every": 2},
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "options", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])]
)
def test_two_processes_end_with_the_weights_of_one(options, tmp_path):
    """Float64, so that a rounding is far below any fault; some steps have fewer rollouts than
    processes."""
    (one, (weights,)), (two, ranks) = (trained(tmp_path, size, options) for size in SIZES)
    for before, after in zip(one, two, strict=True):
        for name in ("loss", "grad_norm"):
            assert after[name] == pytest.approx(before[name], rel=1e-9)
        for name in ("tokens_seen", "tokens_trained", "num_rollouts", "updated"):
            assert after[name] == before[name]
    for name, value in weights.items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-7, atol=1e-9)
        assert torch.equal(ranks[0][name], ranks[1][name])  # bit for bit on all processes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_trains_in_two_processes_and_one_of_them_writes(tmp_path):
    tables = {}
    for size in SIZES:
        run = tmp_path / f"run-{size}"
        arguments = ["-m", "tip_analysis", "ablate", run, "--preset", "arithmetic", "--rules"]
        arguments += ["soft_or:0.5", "all", "--seeds", 0, "--steps", 3, "--limit", 24]
        arguments += ["--num-samples", 2, "--evaluate-every", 2]
        ended = launch(size, *arguments)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ended.stdout.count("arms on") == 1  # said once
        tables[size] = tip.open_run(run).ablations().collect().sort("rule", "step")
        again = launch(size, *arguments)
        assert again.returncode == 0, again.stderr[-3000:]
        assert tip.open_run(run).ablations().collect().height == tables[size].height
        assert not list((run / "ablations" / ".work").glob("*/step-*"))
    one, two = tables[1], tables[2]
    keys = ["rule", "retention_ratio", "seed", "step", "tokens_seen", "tokens_trained"]
    assert one.select(keys).equals(two.select(keys))
    for name in ("accuracy", "heldout_reverse_kl"):
        assert two[name].to_list() == pytest.approx(one[name].to_list(), rel=1e-4)
    losses = [table.filter(pl.col("step") == 3)["losses"].to_list() for table in (one, two)]
    for before, after in zip(*losses, strict=True):
        assert after == pytest.approx(before, rel=1e-4)


def test_a_study_takes_the_device_of_its_process_and_no_other():
    study = StudyOptions(student="a", teacher="b")
    second = Processes(1, 2, torch.device("cuda:1"))
    assert _in_parallel(study, 1, second).device == "cuda:1"
    assert _in_parallel(StudyOptions(student="a", teacher="b", device="cuda"), 1, second)
    with pytest.raises(OptionError, match="leave --jobs at 1"):
        _in_parallel(study, 2, second)
    vllm = replace(study, engine=EngineSettings(SamplingEngine.VLLM))
    with pytest.raises(OptionError, match="--engine vllm takes a device for itself"):
        _in_parallel(vllm, 1, second)
    with pytest.raises(OptionError, match="--device cuda:0: under accelerate launch"):
        _in_parallel(StudyOptions(student="a", teacher="b", device="cuda:0"), 1, second)


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_processes() is ALONE
    assert ALONE.gather(3) == [3]
    assert ALONE.of_first("a") == "a"
    assert ALONE.sum(0.1) == 0.1
    assert ALONE.spread(range(3), lambda part: [10 * i for i in part]) == [0, 10, 20]


def test_parts_are_everything_once():
    items = list(range(7))
    parts = [Processes(rank, 3).part(items) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items
    assert [Processes(0, 3).part(items, rank) for rank in range(3)] == parts
