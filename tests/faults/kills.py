"""Every stage, killed (or told that the disk is full) at every file event, and run again.

`python kills.py FOLDER KIND,… SPACING SCENARIO…` imports everything once and forks a process for
each trial, which is killed for good; another fork runs the same command again and compares what is
there with an undisturbed run. Each trial is one JSON line: scenario, kind, event, and what is wrong
(null).
Nothing here runs a Polars query before a fork: its threads do not survive one.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import polars as pl
import torch
from faults.file_events import Counter, die_in_writing, fail, kill, watch

from tip_analysis.cli.main import main
from tip_analysis.core import provenance
from tip_analysis.core.record import stage_of
from tip_analysis.core.run_folder import open_run
from tip_analysis.core.schema import TABLES
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.logits import cpu_kernel
from tip_analysis.models.loading import load_model

SMALL = ["--max-new-tokens", "20", "--token-budget", "4096"]
STUDENT, TEACHER = ("--student", "arithmetic-student"), ("--teacher", "arithmetic-teacher")
ROLLOUT = ["rollout", "run", *STUDENT, "--prompts", "p.jsonl", "--num-rollouts", "2", *SMALL]
SCORE = ["score", "run", *TEACHER, "--shard-size", "3"]
_ARM = "ablate run --rules entropy --ratios 0.5 --seeds 0 --prompts p.jsonl --steps 3"
_STEPS = "--evaluation-prompts p.jsonl --prompts-per-step 2 --rollouts-per-prompt 1"
_SAMPLES = "--num-samples 1 --checkpoint-every 1 --max-new-tokens 16"
ABLATE = [*f"{_ARM} {_STEPS} {_SAMPLES}".split(), *STUDENT, *TEACHER]


@dataclass(frozen=True)
class Scenario:
    """A command, those that come before it, and the stages that it fills."""

    command: list[str]
    before: tuple[list[str], ...] = ()
    fills: tuple[str, ...] = ()


_ROLLED, _SCORED = (ROLLOUT,), (ROLLOUT, SCORE)
_MASKS = [*["select", "run", "--rules", "soft_or", "q3", "--ratios", "0.5"]]
_GRADIENTS = [*["gradients", "run", "--num-probes", "2", "--limit", "3", "--loss", "reverse_kl"]]
_SCREEN = ["screen", "run", "--ratios", "0.5"]
_RANK = ["rank-rules", "run", "--rules", "q3", "entropy", "--ratios", "0.5", "--num-resamples", "9"]
_INFLUENCE = ["influence", "run", "--limit", "3"]
_INTERVENE = ["intervene", "run", "--num-tokens", "3", "--num-continuations", "1"]
_KEEP = [*ABLATE, "--keep-every", "2"]
_TRACK = ["track", "run", "--arm", "entropy:0.5", "--limit", "3"]
_STATES = [*SCORE, "--phase", "teacher"]
_EXPORT = ["export", "run", "--to", "flat", "--entropy-cut", "0.3"]
_EVALUATE = (
    "evaluate run --model arithmetic-student --prompts p.jsonl --num-samples 2 --grader exact"
)
_REPORT = ["report", "run", "-o", "page.html"]
SCENARIOS = {
    "rollout": Scenario(ROLLOUT, fills=("rollout",)),
    "rollout again": Scenario([*ROLLOUT, "--seed", "1", "--overwrite"], (*_SCORED, _MASKS)),
    "import": Scenario(["import", "run", "--from", "text", "--files", "t.jsonl", *STUDENT]),
    "teacher": Scenario(_STATES, _ROLLED, fills=("teacher",)),
    "student": Scenario(
        [*SCORE, "--phase", "student", "--discard-teacher-states"], (ROLLOUT, _STATES)
    ),
    "score": Scenario(SCORE, _ROLLED, fills=("score", "vocabulary")),
    "score again": Scenario([*SCORE, "--top-k", "3", "--overwrite"], (*_SCORED, _MASKS)),
    "gradients": Scenario(_GRADIENTS, _SCORED, fills=("gradients",)),
    "gradients again": Scenario([*_GRADIENTS, "--overwrite"], (*_SCORED, _GRADIENTS)),
    "select": Scenario(_MASKS, _SCORED, fills=("select",)),
    "screen": Scenario(_SCREEN, (*_SCORED, _MASKS), fills=("screen",)),
    "screen again": Scenario([*_SCREEN, "--overwrite"], (*_SCORED, _SCREEN)),
    "select again": Scenario([*_MASKS, "--overwrite"], (*_SCORED, _MASKS)),
    "evaluate": Scenario([*_EVALUATE.split(), *SMALL], _ROLLED, fills=("evaluate",)),
    "ablate": Scenario(ABLATE, _ROLLED, fills=("ablate", "dynamics")),
    "rank-rules": Scenario(_RANK, (*_SCORED, _GRADIENTS), fills=("rank",)),
    "rank-rules again": Scenario([*_RANK, "--overwrite"], (*_SCORED, _GRADIENTS, _RANK)),
    "influence": Scenario(_INFLUENCE, _SCORED, fills=("influence",)),
    "intervene": Scenario(_INTERVENE, _SCORED, fills=("intervene",)),
    "keep": Scenario(_KEEP, _SCORED, fills=("keep",)),
    "track": Scenario(_TRACK, (*_SCORED, _KEEP), fills=("track",)),
    "export": Scenario(_EXPORT, (*_SCORED, _MASKS)),
    "export again": Scenario(
        [*["export", "run", "--to", "flat", "--entropy-cut", "mean", "--overwrite"]],
        (*_SCORED, _MASKS, _EXPORT),
    ),
    "report": Scenario(_REPORT, (*_SCORED, _MASKS)),
}


UNDISTURBED = {
    "demo": "the stages of others, one after the other",
    "status": "writes nothing",
    "compare": "writes nothing",
    "claims": "writes nothing",
}
"""Commands without a scenario, and why."""


def in_child(work: Callable[[], None]) -> int:
    """Fork, work, and end; the wait status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def run_command(folder: Path, command: list[str]) -> int:
    """The command as a process of its own would run it, in `folder`; its exit status."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(
            folder.parent / f"{folder.name}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        )
        os.dup2(file, number)
    sys.argv = ["tip-analysis", *command]
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def finished(folder: Path, command: list[str]) -> str | None:
    """Run a command to its end in a fork; what is wrong if it does not end well."""

    def work() -> None:
        os._exit(run_command(folder, command))

    status = os.waitstatus_to_exitcode(in_child(work))
    if status == 0:
        return None
    return f"`{' '.join(command)}` ended with {status}: {said(folder)[-600:]}"


def said(folder: Path) -> str:
    """What the last command in `folder` said on stderr."""
    return (folder.parent / f"{folder.name}.stderr").read_text("utf-8", "replace")


def undisturbed(base: Path, scenario: Scenario) -> tuple[list[str], Path]:
    """The events of an undisturbed run, and its folder. What the run imported is imported here too,
    so that no trial does so again."""
    whole, log = base.with_name(f"{base.name} whole"), base.with_name(f"{base.name}.events")
    shutil.copytree(base, whole)

    def work() -> None:
        counter, before = Counter(), set(sys.modules)
        watch(whole, counter)
        status = run_command(whole, scenario.command)
        log.write_text(json.dumps([counter.names, sorted(set(sys.modules) - before)]))
        os._exit(status)

    if status := in_child(work):
        raise SystemExit(f"the undisturbed {scenario.command} ended with {status}: {said(whole)}")
    filled = {
        stage_of(key) for key in json.loads((whole / "run" / "run.json").read_bytes())["stages"]
    }
    if not filled.issuperset(scenario.fills):
        raise SystemExit(f"{scenario.command} fills {filled}; expected {scenario.fills}")
    events, modules = json.loads(log.read_text())
    for module in modules:
        with suppress(Exception):
            import_module(module)
    return events, whole


def disturbed(folder: Path, command: list[str], kind: str, event: int) -> int:
    """Run a command that is killed, or told that the disk is full, at an event."""

    def work() -> None:
        if kind == "write":
            die_in_writing(event)
        else:
            watch(folder, Counter(event, kill if kind == "kill" else fail))
        status = run_command(folder, command)
        if kind == "kill":
            kill()  # the last event is behind it
        os._exit(status)

    return in_child(work)


def check(
    folder: Path, whole: Path, scenario: Scenario, kind: str, status: int, decided: dict
) -> str | None:
    """What is wrong after a trial; None if nothing is. Where an earlier trial left the same files,
    the same command goes on in the same way: `decided` holds what came of it."""
    if kind == "fail" and not os.WIFEXITED(status):
        return f"died: {status}"
    if kind == "fail":
        code, lines = os.waitstatus_to_exitcode(status), said(folder).strip().splitlines()
        if code not in (0, 2) or len([line for line in lines if not line.startswith("WARN")]) > 1:
            return f"ended with {code}, saying {lines[-3:]}"
    left = state(folder)
    if left not in decided:
        decided[left] = wrong_after_another_run(folder, whole, scenario.command)
    return decided[left]


def wrong_after_another_run(folder: Path, whole: Path, command: list[str]) -> str | None:
    """Run the same command again, to its end, and compare."""
    answer = folder.parent / f"{folder.name}.answer"

    def work() -> None:
        if (status := run_command(folder, command)) == 0:
            answer.write_text(json.dumps(differs(folder, whole)))
        os._exit(status)

    answer.unlink(missing_ok=True)
    status = os.waitstatus_to_exitcode(in_child(work))
    if status:
        return f"the same command again ended with {status}: {said(folder)[-600:]}"
    return json.loads(answer.read_text())


_VARIES = re.compile(
    rb'\d{4}-\d\d-\d\dT[\d:.+]+|"wall_time_s": [\d.e-]+|"session": "[0-9a-f]{32}"|"process": \d+'
)
"""What differs between two runs that stopped at the same place."""


def state(folder: Path) -> str:
    """What lies in a folder, without what no command goes by: times, and who made a part file."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"\.\d+-\d+\.part", ".part", str(path.relative_to(folder)))
        content = path.read_bytes() if path.is_file() and is_kept(path) else b""
        content = _VARIES.sub(b"", content) if b"schema_version" in content[:100] else content
        digest.update(f"{name} {path.is_dir()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def differs(folder: Path, whole: Path) -> str | None:
    """How a folder differs from that of an undisturbed run."""
    found, expected = (
        sorted(str(p.relative_to(top)) for p in top.rglob("*") if p.is_file() and is_kept(p))
        for top in (folder, whole)
    )
    if generations(found) != generations(expected):
        return f"files: {sorted(set(found) ^ set(expected))}"
    if leftovers := [str(p) for p in folder.rglob("*.part")]:
        return f"part files stay: {leftovers}"
    if (folder / "run" / "run.json").is_file():
        one, other = open_run(folder / "run"), open_run(whole / "run")
        one.verify()
        if records(one.record()) != records(other.record()):
            return "the records differ"
        for table in set(TABLES) - {"ablations"}:
            if one.has(table) and not one.table(table).collect().equals(
                other.table(table).collect(), null_equal=True
            ):
                return f"{table} differ"
        if one.has("ablations"):
            times = ["step_time_s", "peak_memory_bytes"]
            frames = [run.ablations().drop(times).collect() for run in (one, other)]
            if not frames[0].equals(frames[1]):
                return "ablations differ"
    for name in expected:
        if name.startswith("flat/") and name.endswith(".parquet"):
            frames = [pl.read_parquet(top / name, glob=False) for top in (folder, whole)]
            if not frames[0].equals(frames[1]):
                return f"{name} differs"
        if name.endswith(".html") and stripped(folder / name) != stripped(whole / name):
            return "the pages differ"
    return None


def is_kept(path: Path) -> bool:
    """Whether a file is part of the outcome: locks are not."""
    return not path.name.endswith(".lock")


def generations(names: list[str]) -> list[str]:
    """Names without the number of times that a stage was started afresh."""
    return sorted(re.sub(r"\.g\d+", "", name) for name in names)


def stripped(page: Path) -> str:
    """A page without times, and without the names that Matplotlib takes from memory addresses."""
    times = r"\d{4}-\d\d-\d\d[T ][\d:+]*|\d+(\.\d+)? (ms|s|min)\b"
    return re.sub(rf"{times}|-[mp][0-9a-f]{{10}}\b", "", page.read_text("utf-8"))


def records(record: dict) -> dict:
    """A record without times, and without what starting afresh twice leaves."""
    kept = {}
    for key, stage in record["stages"].items():
        shards = {re.sub(r"\.g\d+", "", name): shard for name, shard in stage["shards"].items()}
        if stage["table"] == "ablations":
            shards = {name: shard["num_rows"] for name, shard in shards.items()}
        kept[key] = {
            "finished": bool(stage["finished"]),
            "shards": shards,
            "discarded": "discarded" in stage,
            **{name: stage[name] for name in ("table", "config", "inputs", "summary")},
        }
    return kept | {"superseded": record.get("superseded", [])}


def every(events: list[str], kind: str, spacing: int) -> Iterator[int]:
    """Which events are tried: all, or every so many; in the middle of writes, some sizes."""
    if kind == "write":
        yield from (1, 60, 300, 700, 1500, 3000, 6000, 12000)[:: max(1, spacing // 4)]
    else:
        last = len(events) + (kind == "kill")
        yield from range(0, last, spacing)


def main_of_trials(folder: Path, kinds: list[str], spacing: int, names: list[str]) -> None:
    """Try every scenario at every event, in each kind of disturbance."""
    rows = [json.dumps(row) for row in problems(4, seed=3)]
    texts = [json.dumps({"problem": row["problem"], "response": "46"}) for row in problems(4)]
    for name in names:
        base = folder / name
        base.mkdir(parents=True)
        (base / "p.jsonl").write_text("\n".join(rows))
        (base / "t.jsonl").write_text("\n".join(texts))
        for command in SCENARIOS[name].before:
            if (wrong := finished(base, command)) is not None:
                raise SystemExit(wrong)
        try_scenario(name, base, kinds, spacing)


def try_scenario(name: str, base: Path, kinds: list[str], spacing: int) -> None:
    """Print what each trial of a scenario came to."""
    scenario, decided, trial = SCENARIOS[name], {}, base.parent / "trial"
    events, whole = undisturbed(base, scenario)
    for kind in kinds:
        for event in every(events, kind, spacing):
            shutil.copytree(base, trial)
            status = disturbed(trial, scenario.command, kind, event)
            wrong = check(trial, whole, scenario, kind, status, decided)
            what = events[event] if kind != "write" and event < len(events) else "the end"
            verdict = {"scenario": name, "kind": kind, "event": event, "what": what, "wrong": wrong}
            print(json.dumps(verdict), flush=True)
            shutil.rmtree(trial)


def warm_up() -> None:
    """Load what every trial needs."""
    torch.set_num_threads(1)
    provenance._git_commit = lambda: None
    model = load_model("arithmetic-student", device="cpu")
    logits = torch.randn(2, model.vocab_size)
    cpu_kernel.row_totals(logits, logits, 5, 16)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["POLARS_MAX_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warm_up()
    main_of_trials(Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), sys.argv[4:])
