import logging
import math
import re
import struct
from typing import ClassVar

import pytest

import tip_analysis as tip
from tip_analysis.core.errors import MissingExtraError, UnknownNameError
from tip_analysis.core.names import TrackerName
from tip_analysis.training import trackers
from tip_analysis.training.ablation.arm_training import StudyOptions
from tip_analysis.training.trackers import NOTHING, open_tracker

REAL = [TrackerName.TENSORBOARD, TrackerName.WANDB, TrackerName.TRACKIO]


class Kept:
    """A tracker that keeps what it is told."""

    said: ClassVar[list] = []

    def __init__(self, folder, project, series, config):
        self.series = series
        Kept.said.append(("begin", project, series, dict(config)))

    def log(self, values, step):
        Kept.said.append(("log", self.series, step, values))

    def close(self):
        Kept.said.append(("close", self.series))


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(trackers, "require", lambda package, purpose: None)
    monkeypatch.setitem(trackers._KINDS, TrackerName.WANDB, Kept)
    Kept.said = []
    return Kept.said


def study(run, **changes):
    return tip.ablate(
        run,
        preset="arithmetic",
        arms=["soft_or:0.5", "all"],
        seeds=[0],
        num_steps=2,
        prompts_per_step=2,
        rollouts_per_prompt=2,
        num_samples=1,
        limit=8,
        **changes,
    )


def test_an_arm_tells_its_tracker_of_every_step_and_evaluation_and_keeps_its_numbers(
    kept, tmp_path
):
    tracked = study(tmp_path / "tracked", tracker="wandb")
    plain = study(tmp_path / "plain")
    numbers = ["rule", "step", "losses", "accuracy", "heldout_reverse_kl", "arm_key"]
    assert tracked.select(numbers).equals(plain.select(numbers))
    begun = [entry for entry in kept if entry[0] == "begin"]
    assert len(begun) == 3  # the untrained student, and two arms
    assert {entry[1] for entry in begun} == {"tracked"}
    series = next(entry for entry in begun if entry[3]["rule"] == "soft_or")
    assert series[3]["retention_ratio"] == 0.5
    assert series[3]["student"] == "arithmetic-student"
    told = [entry for entry in kept if entry[:2] == ("log", series[2])]
    assert [step for _, _, step, _ in told] == [1, 2, 2]
    first, second, evaluated = (values for _, _, _, values in told)
    row = tracked.filter(rule="soft_or").row(0, named=True)
    assert [first["train/loss"], second["train/loss"]] == row["losses"]
    assert sum(first[f"tip/share_q{i}"] for i in (1, 2, 3, 4)) == pytest.approx(1.0)
    assert first["tip/selected_share"] == pytest.approx(
        first["train/tokens_trained"] / first["train/tokens_seen"]
    )
    assert evaluated[f"evaluation/{row['benchmark']}/accuracy"] == row["accuracy"]
    assert sum(entry[0] == "close" for entry in kept) == 3


def test_a_tracker_that_fails_ends_no_training(kept, monkeypatch, caplog, tmp_path):
    def fail(self, values, step):
        raise ConnectionError("no route")

    monkeypatch.setattr(Kept, "log", fail)
    tracker = open_tracker("wandb", tmp_path, project="p", series="s", config={})
    with caplog.at_level(logging.WARNING):
        tracker.log({"a": 1.0}, 0)
        tracker.log({"a": 1.0}, 1)
        tracker.close()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["wandb fails (ConnectionError: no route); training goes on without it"]


def test_what_is_no_number_is_not_told(kept, tmp_path):
    tracker = open_tracker("wandb", tmp_path, project="p", series="s", config={})
    tracker.log({"a": math.nan, "b": math.inf, "c": 2}, 3)
    assert kept[-1] == ("log", "s", 3, {"c": 2.0})


def test_names_and_packages_are_checked_before_anything_is_loaded(monkeypatch, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'wandb'"):
        StudyOptions("a", "b", tracker="wandbb")
    monkeypatch.setattr("tip_analysis.core.optional._is_installed", lambda package: False)
    said = "--tracker wandb needs the package 'wandb', .* \"tip-analysis[trackers]\""
    with pytest.raises(MissingExtraError, match=said.replace("[", r"\[").replace("]", r"\]")):
        StudyOptions("a", "b", tracker="wandb")
    assert open_tracker("none", tmp_path, project="p", series="s", config={}) is NOTHING
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------- the real ones, by `make interop`


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No way out: a tracker that opened a connection to anywhere but this machine would fail."""
    import socket

    connect = socket.socket.connect

    def local(self, address):
        host = address[0] if isinstance(address, tuple) else "unix"
        if isinstance(host, str) and not re.match(r"unix|127\.|localhost|::1", host):
            raise AssertionError(f"a tracker went to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return tmp_path


def told(name, folder):
    tracker = open_tracker(
        name, folder, project="tip-test", series="soft_or-0.5", config={"seed": 3}
    )
    for step in (1, 2, 3):
        tracker.log({"train/loss": step / 4, "tip/share_q3": 0.125}, step)
    tracker.close()


@pytest.mark.interop
@pytest.mark.filterwarnings("default")
def test_tensorboards_files_hold_what_was_told(offline):
    pytest.importorskip("tensorboard")
    told("tensorboard", offline)
    from tensorboard.backend.event_processing import event_accumulator  # pyright: ignore

    read = event_accumulator.EventAccumulator(str(offline / "tensorboard" / "soft_or-0.5"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["tip/share_q3", "train/loss"]
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]


def wandb_records(data):
    """The records of a run's file: LevelDB's log format (blocks of 32 KiB; checksum, length, and
    whether a record is whole or its first, middle or last part), after 7 bytes of its own."""
    at, parts = 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


@pytest.mark.interop
@pytest.mark.filterwarnings("default")
def test_wandbs_offline_run_holds_what_was_told(offline):
    pytest.importorskip("wandb")
    told("wandb", offline)
    (path,) = offline.glob("wandb/offline-run-*/run-*.wandb")
    from wandb.proto import wandb_internal_pb2  # pyright: ignore

    losses = []
    for data in wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        losses += [
            float(item.value_json)
            for item in record.history.item
            if (item.key or "/".join(item.nested_key)) == "train/loss"
        ]
    assert losses == [0.25, 0.5, 0.75]


@pytest.mark.interop
@pytest.mark.filterwarnings("default")
def test_trackios_database_holds_what_was_told(offline, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(offline / "trackio"))
    trackio = pytest.importorskip("trackio")
    told("trackio", offline)
    rows = trackio.SQLiteStorage.get_logs("tip-test", "soft_or-0.5")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.interop
@pytest.mark.filterwarnings("default")
def test_a_study_is_followed_by_a_real_tracker(offline):
    pytest.importorskip("tensorboard")
    study(offline / "run", tracker="tensorboard")
    series = [path.name for path in (offline / "run" / "trackers" / "tensorboard").iterdir()]
    assert len(series) == 3
    assert all(re.fullmatch(r"[\w.~%-]+", name) for name in series)
