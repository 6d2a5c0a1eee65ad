"""Kinds of GPU, the machine at hand, and what a plan says of both."""

from pathlib import Path

import pytest

from tip_analysis.cli import main as cli
from tip_analysis.core.errors import UnknownNameError
from tip_analysis.training.ablation import accelerators
from tip_analysis.training.ablation.accelerators import (
    DEFAULT_GPU_KIND,
    GPU_KINDS,
    Device,
    Machine,
    gpu_kind,
    this_machine,
)
from tip_analysis.training.ablation.plans import plan_ablation
from tip_analysis.training.ablation.presets import resolve_preset

ARITHMETIC = resolve_preset("arithmetic")


def values(plan) -> dict[str, str]:
    return dict(plan.table().iter_rows())


def test_twice_the_rates_take_half_the_hours() -> None:
    slow, fast = Device("slow", 80e9, 1e12, 1e11), Device("fast", 80e9, 2e12, 2e11)
    hours = [plan_ablation(ARITHMETIC, device=device).device_hours for device in (slow, fast)]
    assert hours[0] == pytest.approx(2 * hours[1])


def test_the_machine_at_hand_stands_in_the_plan() -> None:
    device = Device("mine", 80e9, 1e12, 1e11)
    here = Machine(device, 2, 5e9, "rates of its maker")
    plan = plan_ablation(ARITHMETIC, here=here)
    own = plan_ablation(ARITHMETIC, device=device)
    found = values(plan)
    assert found["this machine"] == "2 × mine (rates of its maker)"
    assert plan.hours_here == own.device_hours
    assert found["hours here"] == own.wall_time(2)
    assert found["disk here"].endswith("of 5.0 GB that are free")
    assert "35%" in found["assumed"]
    small = plan_ablation(ARITHMETIC, here=Machine(Device("tiny", 1e6), 1, 5e9, "?"))
    assert values(small)["hours here"] == "does not fit"


def test_a_machine_without_a_gpu_is_measured(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accelerators, "_gpu_names", list)
    machine = this_machine(tmp_path / "not" / "there")
    assert machine.num_devices == 1
    assert machine.device.name.startswith("CPU of")
    assert 1e8 < machine.device.peak_flops < 1e15
    assert 1e8 < machine.device.bandwidth < 1e13
    assert machine.disk_bytes > 0


@pytest.mark.parametrize(
    ("names", "kind", "count"),
    [
        (["NVIDIA H100 80GB HBM3"] * 8, "h100", 8),
        (["NVIDIA A100-SXM4-80GB"], "a100-80", 1),
        (["NVIDIA A100-SXM4-40GB"] * 2, "a100-40", 2),
        (["NVIDIA L40S"], "l40s", 1),
        (["NVIDIA GeForce RTX 4090"], "rtx-4090", 1),
        (["NVIDIA H200"], "h200", 1),
    ],
)
def test_gpus_at_hand_are_known_by_their_drivers_names(
    monkeypatch, tmp_path: Path, names: list[str], kind: str, count: int
) -> None:
    monkeypatch.setattr(accelerators, "_gpu_names", lambda: names)
    machine = this_machine(tmp_path)
    assert machine.device == GPU_KINDS[kind]
    assert machine.num_devices == count


def test_kinds_are_named_and_unknown_ones_refused(capsys) -> None:
    assert gpu_kind(DEFAULT_GPU_KIND) == Device("H100 SXM 80 GB")
    with pytest.raises(UnknownNameError, match="kind of GPU 'h1000'"):
        gpu_kind("h1000")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["ablate", "runs/none", "--preset", "arithmetic", "--dry-run", "--gpu-kind", "x"])
    assert stopped.value.code == 2
    assert "valid names: h100" in capsys.readouterr().err


def test_a_dry_run_counts_hours_of_the_kind_that_is_named(capsys, tmp_path: Path) -> None:
    arguments = ["ablate", str(tmp_path / "run"), "--preset", "qwen3-8b-4b", "--dry-run"]
    cli.main([*arguments, "--gpu-kind", "a100-80"])
    shown = capsys.readouterr().out
    for words in ("on 1 × A100", "on 8 × A100", "on 64 × A100", "this machine", "disk here"):
        assert words in shown
