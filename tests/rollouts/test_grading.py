"""Graders: mathematical equality, arithmetic, and functions of the user's own."""

import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

import pytest
from grading_pairs import PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import shared_file

from tip_analysis.core.errors import InputError, OptionError, TipAnalysisError, UnknownNameError
from tip_analysis.rollouts import grading
from tip_analysis.rollouts.grading import (
    MathGrader,
    default_grader,
    grade,
    register_grader,
    resolve_grader,
)


@pytest.mark.parametrize(("answer", "response", "is_same", "reason"), PAIRS)
def test_pairs_of_answer_and_response(answer, response, is_same, reason):
    assert grade("math", response, answer) == float(is_same), reason


def test_the_table_of_pairs_is_large_and_has_no_pair_twice():
    assert len({(answer, response) for answer, response, *_ in PAIRS}) == len(PAIRS) >= 250


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        ("<|im_start|>assistant\n<think>\n", "It is \\boxed{72}", 0.0),
        ("<|im_start|>assistant\n<think>\n", "hm</think>It is \\boxed{72}", 1.0),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "It is \\boxed{72}", 1.0),
        ("What does <think> mean?", "It is \\boxed{72}", 1.0),
    ],
)
def test_a_thought_that_the_template_opens_is_the_responses_to_close(prompt, response, reward):
    assert grade("math", response, "72", prompt_text=prompt) == reward


@given(
    st.floats(1e-12, 1e12, allow_nan=False),
    st.sampled_from([2.0, 1.5, 1.001, 1.00001]),
    st.sampled_from(["\\boxed{%s}", "The answer is %s", "#### %s"]),
)
@settings(max_examples=60, deadline=None)
def test_numbers_are_compared_relative_to_their_size(number, factor, shape):
    written = f"{Decimal(repr(number)):f}"
    assert grade("math", shape % written, json.dumps(number)) == 1.0
    assert grade("math", shape % json.dumps(number), written) == 1.0
    assert grade("math", shape % repr(number * factor), json.dumps(number)) == 0.0


@given(st.integers(-(10**18), 10**18), st.integers(-3, 3))
@settings(max_examples=60, deadline=None)
def test_whole_numbers_are_equal_or_not_however_large(number, difference):
    for written in (f"{number + difference:,}", str(number + difference)):
        assert grade("math", f"\\boxed{{{written}}}", str(number)) == float(difference == 0)


@given(
    st.fractions(0, 10**4, max_denominator=1000),
    st.sampled_from(
        [("km", "m", 1000), ("m", "cm", 100), ("hours", "minutes", 60), ("kg", "g", 1000)]
    ),
    st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_a_quantity_equals_itself_in_a_smaller_unit_only_with_its_own_number(number, units, wrong):
    large, small, size = units
    number += Fraction(1, 1000)
    given_as = f"\\frac{{{number.numerator}}}{{{number.denominator}}} \\text{{ {large}}}"
    other = number * size * wrong
    response = f"\\boxed{{\\frac{{{other.numerator}}}{{{other.denominator}}} \\text{{ {small}}}}}"
    assert grade("math", response, given_as) == float(wrong == 1)


@given(st.text(max_size=40), st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_text_gets_a_reward(response, answer):
    assert grade("math", response, answer) in (0.0, 1.0)
    assert grade("math", f"\\boxed{{{response}", answer) == 0.0 or "}" in response


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
        assert grader("\\boxed{9^{9^{9^{9}}}}", "7") == 0.0
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
    path = shared_file(f"{name}.jsonl")
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert grade("math", f"thus $\\boxed{{{row['answer']}}}$.", row["answer"]) == 1.0, row
        if row.get("solution") and "\\boxed" in row["solution"]:
            assert grade("math", row["solution"], row["answer"]) == 1.0, row


def test_a_registered_grader_keeps_its_name_in_errors_and_its_verdicts_are_checked(monkeypatch):
    monkeypatch.setattr(grading, "GRADERS", dict(grading.GRADERS))

    def broken(response, answer):
        raise KeyError("no such unit")

    register_grader("broken", broken)
    with pytest.raises(InputError, match="grader broken raised KeyError"):
        grade("broken", "1", "1")
    register_grader("not a number", lambda response, answer: float("nan"))
    with pytest.raises(InputError, match="finite number"):
        grade("not a number", "1", "1")
    with pytest.raises(OptionError, match="already"):
        register_grader("math", broken)
    register_grader("broken", lambda response, answer: 0.25, overwrite=True)
    assert grade("broken", "1", "1") == 0.25
    for name in ("", " x", "a:b"):
        with pytest.raises(OptionError, match="needs a name"):
            register_grader(name, broken)
