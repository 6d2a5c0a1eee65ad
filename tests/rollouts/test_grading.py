"""Graders: mathematical equality, arithmetic, and functions of the user's own."""

import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tip_analysis.core.errors import InputError, OptionError, TipAnalysisError, UnknownNameError
from tip_analysis.rollouts import grading
from tip_analysis.rollouts.grading import (
    MathGrader,
    default_grader,
    grade,
    register_grader,
    resolve_grader,
)

EQUAL = [
    ("18", "So she makes 9 * 2 = \\boxed{18} dollars.<|im_end|>"),
    ("18", "#### 18"),
    ("18", "The answer is $18.00."),
    ("\\frac{1}{2}", "\\boxed{0.5}"),
    ("\\frac{1}{2}", "therefore the answer is 1/2"),
    ("(3, \\frac{\\pi}{2})", "\\boxed{\\left(3, \\pi/2\\right)}"),
    ("1,000", "It is 1000."),
    ("10\\%", "\\boxed{0.1}"),
    ("p - q", "\\boxed{p-q}"),
    ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}"),
    ("Evelyn", "\\boxed{\\text{Evelyn}}"),
    ("east", "\\boxed{East}"),
    ("\\text{(C)}", "\\boxed{C}"),
    ("$x = 3$", "\\boxed{3}"),
    ("72", "<think>First 5, no, \\boxed{6}</think> The answer is 72."),
    ("The value is $\\frac{1}{2}$ of it", "\\boxed{0.5}"),
    ("no solution", "no solution"),
    ("99999999!", "\\boxed{99999999!}"),
]
DIFFERENT = [
    ("18", "\\boxed{81}"),
    ("18", ""),
    ("18", "I do not know."),
    ("\\frac{1}{2}", "\\boxed{2}"),
    ("(3, \\frac{\\pi}{2})", "\\boxed{(\\frac{\\pi}{2}, 3)}"),
    ("\\text{Evelyn}", "\\boxed{\\text{Bob}}"),
    ("east", "\\boxed{west}"),
    ("72", "<think>It is 72.</think> The answer is \\boxed{71}."),
    ("18", "\\boxed{18"[:-2]),
    ("7", "\\boxed{\\frac{}{}\\sqrt[}"),
]


@pytest.mark.parametrize(("answer", "response"), EQUAL)
def test_math_equal(answer, response):
    assert grade("math", response, answer) == 1.0


@pytest.mark.parametrize(("answer", "response"), DIFFERENT)
def test_math_different(answer, response):
    assert grade("math", response, answer) == 0.0


def test_math_gives_no_verdict_without_an_answer():
    assert grade("math", "\\boxed{18}", None) is None


def test_math_works_in_threads_and_leaves_signals_alone():
    before = signal.getsignal(signal.SIGALRM)
    cases = [(f"\\boxed{{{i}}}", str(i + i % 2)) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        rewards = list(pool.map(lambda case: grade("math", *case), cases))
    assert rewards == [float(i % 2 == 0) for i in range(40)]
    assert signal.getsignal(signal.SIGALRM) is before


def test_what_takes_too_long_gets_nothing_and_the_next_is_graded():
    grader = MathGrader(timeout_seconds=1.0)
    try:
        assert grader("\\boxed{2}", "2") == 1.0
        assert grader("\\boxed{99999999!}", "7") == 0.0
        assert grader.num_timeouts == 1
        assert grader("\\boxed{3}", "3") == 1.0
    finally:
        grader.close()


def test_a_process_that_was_ended_is_started_again():
    grader = MathGrader()
    try:
        assert grader("\\boxed{2}", "2") == 1.0
        os.kill(grader._process.pid, signal.SIGKILL)
        grader._process.wait()
        assert grader("\\boxed{2}", "2") == 1.0
        assert grader.num_timeouts == 0
    finally:
        grader.close()


WORKER_THAT_DIES_ONCE = """
import json, pathlib, sys
flag = pathlib.Path(__file__).with_suffix(".once")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    if not flag.exists():
        flag.touch()
        sys.exit(1)
    print(json.dumps({"reward": float(sys.flags.safe_path)}), flush=True)
"""


def test_a_process_that_dies_at_a_question_is_asked_once_more(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER_THAT_DIES_ONCE)
    monkeypatch.setattr(grading, "_WORKER", tmp_path / "worker.py")
    grader = MathGrader()
    try:
        assert grader("1", "1") == 1.0  # and it runs without the package's own folder on its path
    finally:
        grader.close()


def test_a_process_that_cannot_run_is_an_error_of_ours(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(grading, "_WORKER", tmp_path / "worker.py")
    with pytest.raises(TipAnalysisError, match="ends at once: is math-verify installed"):
        MathGrader()("1", "1")
    assert threading.active_count() < 20


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("ones: 2 plus 6 gives 8; tens: 5 and 1 gives 6; so 102<eos>", "102", 1.0),
        ("ones: 2 plus 6 gives 8; tens: 5 and 1 gives 6; so 102", "0102", 1.0),
        ("ones: 2 plus 6 gives 8; tens: 5 and 1 gives 6; so 201", "102", 0.0),
        ("ones: 2 plus 6 gives 8, then 102", "102", 0.0),
        ("102", "102", 1.0),
        (" 102 <|im_end|>", "102", 1.0),
        ("-3", "-3", 1.0),
        ("", "102", 0.0),
        ("102", None, None),
    ],
)
def test_exact(response, answer, reward):
    assert grade("exact", response, answer) == reward


def test_exact_refuses_an_answer_that_is_no_integer():
    with pytest.raises(
        InputError,
        match=r"the grader `exact` compares integers, found the answer '1/2'; use `math`",
    ):
        grade("exact", "1", "1/2")


@given(st.integers(0, 300), st.integers(0, 300))
def test_exact_compares_numbers(found, answer):
    assert grade("exact", f"...; so {found}", str(answer)) == float(found == answer)


def test_none_and_defaults():
    assert grade("none", "18", "18") is None
    assert default_grader(has_answer=True) == "math"
    assert default_grader(has_answer=True, is_toy=True) == "exact"
    assert default_grader(has_answer=False, is_toy=True) == "none"


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(
        UnknownNameError,
        match=r"unknown grader 'maths' \(did you mean 'math'\?\); valid names: math, exact, none",
    ):
        grade("maths", "1", "1")
    with pytest.raises(UnknownNameError, match="module:function"):
        grade(":f", "1", "1")


def test_a_registered_function(monkeypatch):
    monkeypatch.setattr(grading, "GRADERS", dict(grading.GRADERS))
    register_grader("length", lambda response, answer: float(len(response)))
    assert grade("length", "abc", None) == 3.0


OWN = """
import math
def has_answer(response, answer):
    return answer is not None and answer in response
def nothing(response, answer): return None
def text(response, answer): return "1"
def nan(response, answer): return math.nan
def fails(response, answer): raise ZeroDivisionError("by zero")
number = 3
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own_graders.py"
    path.write_text(OWN)
    return path


def test_a_function_in_a_file(own_file):
    assert grade(f"{own_file}:has_answer", "it is 18", "18") == 1.0
    assert grade(f"{own_file}:has_answer", "it is 18", None) == 0.0
    assert grade(f"{own_file}:nothing", "it is 18", "18") is None
    assert resolve_grader(f"{own_file}:has_answer") is resolve_grader(f"{own_file}:has_answer")


def test_a_function_in_a_module_of_the_working_folder(own_file, monkeypatch):
    monkeypatch.chdir(own_file.parent)
    own_file.rename(own_file.with_name("graders_of_my_own.py"))
    before = list(sys.path)
    assert grade("graders_of_my_own:has_answer", "it is 18", "18") == 1.0
    assert sys.path == before
    assert grade("operator:eq", "18", "18") == 1.0


def test_own_functions_that_cannot_be_used(own_file, tmp_path):
    cases = {
        f"{own_file}:gone": (
            OptionError,
            "expected a function 'gone'; .*own_graders.py has no such name",
        ),
        f"{own_file}:number": (OptionError, "expected a function 'number'; .* has a int there"),
        f"{tmp_path}/no.py:f": (OptionError, r"the grader's file .*no\.py does not exist"),
        "no_such_module_here:f": (OptionError, "cannot be imported: ModuleNotFoundError"),
        f"{own_file}:text": (
            InputError,
            "has to return a finite number, a bool or None; it returned '1'",
        ),
        f"{own_file}:nan": (InputError, "it returned nan"),
        f"{own_file}:fails": (
            InputError,
            r"own_graders\.py:fails raised ZeroDivisionError: by zero",
        ),
    }
    (tmp_path / "broken.py").write_text("import nothing_like_this_exists")
    cases[f"{tmp_path}/broken.py:f"] = (
        OptionError,
        "cannot be imported: ModuleNotFoundError: No module named 'nothing_like",
    )
    for name, (error, message) in cases.items():
        with pytest.raises(error, match=message):
            grade(name, "it is 18", "18")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["math500", "aime24", "math_train_int_600"])
def test_reference_answers_and_solutions_are_graded_right(name):
    path = Path(__file__).parents[2] / "shared" / "data" / f"{name}.jsonl"
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert grade("math", f"thus $\\boxed{{{row['answer']}}}$.", row["answer"]) == 1.0, row
        if row.get("solution") and "\\boxed" in row["solution"]:
            assert grade("math", row["solution"], row["answer"]) == 1.0, row
