"""The arithmetic pair: its language, its flaw, its labels, its tokenizer and its shipped
weights."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from transformers import AutoModelForCausalLM, AutoTokenizer

from tip_analysis.core.errors import InputError, OptionError, UnknownNameError
from tip_analysis.core.resources import data_path
from tip_analysis.demo.arithmetic.language import (
    BOS,
    DIGITS,
    EOS,
    FLAWED_PAIRS,
    PHRASES,
    TOKEN_ID,
    VOCABULARY,
    Slot,
    WorkedSolution,
    encode,
    extract_answer,
    format_problem,
    is_held_out,
    label_tokens,
    parse_problem,
    problems,
    sum_digit,
    write_solution,
)
from tip_analysis.demo.arithmetic.tokenizer import build_tokenizer
from tip_analysis.demo.arithmetic.train import (
    NUM_PROMPT_TOKENS,
    ModelOptions,
    TrainOptions,
    measure,
    train,
)

numbers = st.tuples(*[st.integers(10, 99)] * 3)
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def solutions(draw: st.DrawFn, *, slips: bool) -> tuple[str, list[str]]:
    """A problem and a solution, right, flawed, or with digits replaced at random."""
    triple = draw(numbers)
    rng = draw(generators)
    tokens = write_solution(triple, rng, flawed=draw(st.booleans()))
    if slips:
        tokens = [
            DIGITS[rng.integers(10)] if token in DIGITS and rng.random() < 0.1 else token
            for token in tokens
        ]
    return format_problem(triple), tokens


# --- oracle: labels from the bare text, by pattern matching
# -----------------------------------------------------------


def any_of(kind: str) -> str:
    return "(?:" + "|".join(map(re.escape, PHRASES[kind])) + ")"


def pair_being_added(text: str) -> tuple[int, int] | None:
    """The two digits whose sum the text is about to give; None if it is about something else."""
    if re.search(any_of("again") + "$", text):
        text = re.sub(rf"\d(?:{any_of('again')}\d)*{any_of('again')}$", "", text)
    text = re.sub(any_of("carry") + "|" + any_of("write") + r"\d", "", text)
    text = re.sub(rf"\d(?:{any_of('again')}(\d))+", r"\1", text)
    joint = "|".join(any_of(kind) for kind in ("plus", "then", "carried"))
    match = re.search(rf"(\d)(?:{joint})(\d){any_of('makes')}$", text)
    return (int(match[1]), int(match[2])) if match else None


def oracle_labels(problem: str, tokens: list[str]) -> list[str]:
    """Labels of a solution whose steps are in order; digits may be wrong."""
    labels = []
    for position, token in enumerate(tokens):
        before = "".join(tokens[:position])
        if re.search(any_of("makes") + "$|" + any_of("again") + "$", before):
            labels.append("planted_error" if pair_being_added(before) in FLAWED_PAIRS else "plain")
        elif token in DIGITS:
            labels.append("fork" if len(set(operands_left(problem, before))) > 1 else "plain")
        elif token in PHRASES["makes"]:
            labels.append("plain" if re.search(any_of("makes"), before) else "fork")
        else:
            labels.append("plain" if token == EOS else "fork")
    return labels


def operands_left(problem: str, before: str) -> list[str]:
    """The digits that may be taken next; none where the text is not about to take one."""
    if not re.search(
        "|".join(any_of(kind) + "$" for kind in ("ones", "tens", "plus", "then")), before
    ):
        return []
    column = re.split(any_of("tens"), before)
    place = 1 if len(column) == 1 else 0
    left = [problem[3 * index + place] for index in range(3)]
    start = any_of("ones") if place else "^"
    taken = re.findall(rf"(?:{start}|{any_of('plus')}|{any_of('then')})(\d)", column[-1])
    for digit in taken:
        if digit in left:
            left.remove(digit)
    return left


# --- language
# --------------------------------------------------------------------------------------------------


@given(numbers, generators)
@settings(deadline=None, max_examples=80)
def test_every_right_solution_gives_the_sum(triple, rng):
    tokens = write_solution(triple, rng)
    assert extract_answer("".join(tokens)) == str(sum(triple))
    assert tokens[-1] == EOS
    assert len(tokens) <= 64


@given(solutions(slips=False))
@settings(deadline=None, max_examples=80)
def test_labels_equal_the_oracle_on_right_and_flawed_solutions(case):
    problem, tokens = case
    assert label_tokens(problem, tokens) == oracle_labels(problem, tokens)


@given(solutions(slips=True))
@settings(deadline=None, max_examples=80)
def test_labels_equal_the_oracle_when_digits_are_wrong(case):
    problem, tokens = case
    assert label_tokens(problem, tokens[: until_answer(tokens)]) == oracle_labels(
        problem, tokens[: until_answer(tokens)]
    )


def until_answer(tokens: list[str]) -> int:
    return next(index for index, token in enumerate(tokens) if token in PHRASES["answer"])


def test_labels_of_a_solution_to_check_by_eye():
    tokens = [
        "ones: ",
        "7",
        " plus ",
        "8",
        " makes ",
        "4",
        ", check: ",
        "5",
        " carry one",
        ", add ",
        "9",
        " makes ",
        "4",
    ]
    planted = [
        tokens[index]
        for index, label in enumerate(label_tokens("17+28+39=", tokens))
        if label == "planted_error"
    ]
    assert planted == ["4", "5"]
    assert label_tokens("17+28+39=", tokens)[:5] == ["fork", "fork", "fork", "fork", "fork"]
    assert label_tokens("17+28+39=", tokens)[8:] == ["fork", "fork", "plain", "plain", "plain"]


def test_a_wrong_running_digit_makes_a_flawed_pair():
    tokens = ["ones: ", "1", " plus ", "1", " makes ", "7", ", add ", "8", " makes ", "5"]
    assert label_tokens("11+11+18=", tokens)[-1] == "planted_error"


@given(st.lists(st.sampled_from([*VOCABULARY, "elsewhere", ""]), max_size=40), generators)
@settings(deadline=None, max_examples=40)
def test_any_text_is_labelled_from_what_stands_before(tail, rng):
    head = write_solution((17, 48, 36), rng)[: rng.integers(40)]
    tokens = head + tail
    labels = label_tokens("17+48+36=", tokens)
    assert len(labels) == len(tokens)
    assert set(labels) <= {"planted_error", "fork", "plain"}
    for end in rng.integers(len(tokens), size=min(5, len(tokens))):
        assert label_tokens("17+48+36=", [*tokens[:end], "3"]) == labels[: end + 1]


@pytest.mark.parametrize(
    "problem", ["", "12+34=", "12+34+5=", "12+34+56", "What is 12+34+56=", "x"]
)
def test_text_of_another_form_is_plain(problem):
    assert parse_problem(problem) is None
    assert label_tokens(problem, ["ones: ", "7", " plus ", "8", " makes ", "4"]) == ["plain"] * 6


def test_after_a_token_that_cannot_stand_there_everything_is_plain():
    assert label_tokens("17+28+39=", ["ones: ", " plus ", "7", " plus ", "8"]) == [
        "fork",
        "fork",
        "plain",
        "plain",
        "plain",
    ]


def test_the_flaw_acts_on_the_named_pairs_and_no_others():
    wrong = {
        (a, b) for a in range(10) for b in range(10) if sum_digit(a, b, flawed=True) != (a + b) % 10
    }
    assert wrong == {(7, 8), (8, 7), (6, 9), (9, 6), (3, 4), (4, 3)}
    assert all(sum_digit(a, b, flawed=True) == (a + b - 1) % 10 for a, b in wrong)
    assert all(sum_digit(a, b, flawed=False) == (a + b) % 10 for a in range(10) for b in range(10))


@given(solutions(slips=True))
@settings(deadline=None, max_examples=40)
def test_both_writers_agree_except_at_planted_errors(case):
    problem, tokens = case
    right, flawed = (WorkedSolution(parse_problem(problem), flawed=flaw) for flaw in (False, True))
    for token, label in zip(tokens, label_tokens(problem, tokens), strict=True):
        assert (right.options() != flawed.options()) == (label == "planted_error")
        assert (len(right.options()) > 1) == (label == "fork")
        right.feed(token)
        flawed.feed(token)


@given(solutions(slips=True))
@settings(deadline=None, max_examples=40)
def test_options_are_a_distribution_over_tokens_that_can_stand_there(case):
    problem, tokens = case
    solution = WorkedSolution(parse_problem(problem))
    for token in tokens:
        options = solution.options()
        assert sum(p for _, p in options) == pytest.approx(1)
        assert len({option for option, _ in options}) == len(options)
        for option, _ in options:
            branch = copy.deepcopy(solution)
            branch.feed(option)
            assert branch.slot is not Slot.LOST
        solution.feed(token)
        if solution.slot in (Slot.DONE, Slot.LOST):
            assert solution.options() == ()
            break


def test_forks_are_common_and_the_flaw_costs_a_third():
    rng = np.random.default_rng(0)
    rows = problems(1500)
    labels, num_right = [], 0
    for row in rows:
        tokens = write_solution(parse_problem(row["problem"]), rng, flawed=True)
        labels += label_tokens(row["problem"], tokens)
        num_right += extract_answer("".join(tokens)) == row["answer"]
    shares = {label: labels.count(label) / len(labels) for label in set(labels)}
    assert 0.44 < shares["fork"] < 0.54
    assert 0.015 < shares["planted_error"] < 0.04
    assert 0.60 < num_right / len(rows) < 0.75
    assert 30 < len(labels) / len(rows) < 70


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("tens: 1 plus 2 makes 3; so 102<eos>", "102"),
        ("; total 102", "102"),
        ("; answer 097<eos><pad><pad>", "97"),
        ("; so 10; so 11<eos>", "11"),
        ("102", None),
        ("; so <eos>", None),
        ("; so 10 plus <eos>", None),
        ("", None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


def test_prompt_sets_are_disjoint_distinct_and_nested():
    train_set, held_out = problems(2000, 3, split="train"), problems(2000, 3)
    assert len({row["id"] for row in train_set + held_out}) == 4000
    assert all(is_held_out(parse_problem(row["problem"])) for row in held_out)
    assert not any(is_held_out(parse_problem(row["problem"])) for row in train_set)
    assert problems(50, 3) == held_out[:50]
    assert problems(50, 4) != held_out[:50]
    assert all(int(row["answer"]) == sum(parse_problem(row["problem"])) for row in held_out)
    assert {tuple(sorted(parse_problem(row["problem"]))) for row in held_out}.isdisjoint(
        tuple(sorted(parse_problem(row["problem"]))) for row in train_set
    )


def test_bad_requests_are_refused():
    with pytest.raises(OptionError, match="between 1 and 50000"):
        problems(0)
    with pytest.raises(UnknownNameError, match="held_out, train"):
        problems(1, split="test")
    with pytest.raises(InputError, match="no token"):
        encode(["ones: ", "elsewhere"])
    with pytest.raises(InputError, match="arithmetic/referee"):
        data_path("arithmetic/referee")


def test_the_language_needs_no_torch():
    code = "import sys, tip_analysis.demo.arithmetic.language; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- tokenizer
# --------------------------------------------------------------------------------------------------

TOKENIZER = build_tokenizer()


@given(solutions(slips=True))
@settings(deadline=None, max_examples=40)
def test_tokenizer_gives_back_tokens_and_text(case):
    problem, tokens = case
    text = problem + "".join(tokens)
    token_ids = TOKENIZER(text)["input_ids"]
    assert token_ids == encode([BOS, *problem, *tokens])
    assert TOKENIZER.decode(token_ids) == BOS + text
    assert TOKENIZER.decode(token_ids, skip_special_tokens=True) == text.replace(EOS, "")


def test_tokenizer_adds_bos_pads_left_and_marks_unknown_text():
    batch = TOKENIZER(["12+34+56=", "1?2"], padding=True)
    assert batch["input_ids"][0] == encode([BOS, *"12+34+56="])
    assert batch["input_ids"][1][-4:] == encode([BOS, "1", "<unk>", "2"])
    assert batch["attention_mask"][1] == [0] * 6 + [1] * 4
    assert TOKENIZER("12+34+56=", add_special_tokens=False)["input_ids"] == encode("12+34+56=")
    assert TOKENIZER.convert_tokens_to_ids(list(VOCABULARY)) == list(range(len(VOCABULARY)))


# --- shipped weights
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return {
        name: AutoModelForCausalLM.from_pretrained(data_path(f"arithmetic/{name}")).eval()
        for name in ("teacher", "student")
    }


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    num_positive = positive.sum()
    rank_sum = rankdata(scores)[positive].sum() - num_positive * (num_positive + 1) / 2
    return rank_sum / (num_positive * (~positive).sum())


def test_shipped_folders_hold_what_a_loader_needs(models):
    for name, model in models.items():
        tokenizer = AutoTokenizer.from_pretrained(data_path(f"arithmetic/{name}"))
        assert tokenizer.get_vocab() == TOKEN_ID
        assert tokenizer("12+34+56=")["input_ids"] == encode([BOS, *"12+34+56="])
        assert model.config.architectures == ["Qwen3ForCausalLM"]
        assert model.config.vocab_size == len(VOCABULARY)
        assert model.generation_config.eos_token_id == TOKEN_ID[EOS]
        assert (data_path(f"arithmetic/{name}") / "model.safetensors").stat().st_size < 4 * 2**20


def test_shipped_teacher_is_right_and_student_is_not(models):
    assert measure(models["teacher"], 128, seed=5)["accuracy"] >= 0.95
    assert 0.5 <= measure(models["student"], 128, seed=5)["accuracy"] <= 0.8


@pytest.fixture(scope="module")
def student_tokens(models):
    """Statistics of the response tokens of 256 rollouts of the student, float64, straight from the
    logits."""
    rows = problems(256, seed=7)
    torch.manual_seed(0)
    prompts = torch.tensor([encode([BOS, *row["problem"]]) for row in rows])
    with torch.inference_mode():
        output = models["student"].generate(prompts, max_new_tokens=80, do_sample=True, top_k=0)
        student, teacher = (
            models[name](output).logits[:, NUM_PROMPT_TOKENS - 1 : -1].double().log_softmax(-1)
            for name in ("student", "teacher")
        )
    response = output[:, NUM_PROMPT_TOKENS:]
    written = response != TOKEN_ID["<pad>"]
    texts = [
        [VOCABULARY[index] for index in row[keep].tolist()]
        for row, keep in zip(response, written, strict=True)
    ]
    labels = [
        label
        for row, text in zip(rows, texts, strict=True)
        for label in label_tokens(row["problem"], text)
    ]
    student, teacher = student[written], teacher[written]
    return {
        "label": np.array(labels),
        "entropy": -(student.exp() * student).sum(-1).numpy(),
        "reverse_kl": (student.exp() * (student - teacher)).sum(-1).numpy(),
        "forward_kl": (teacher.exp() * (teacher - student)).sum(-1).numpy(),
        "top1_prob": student.exp().amax(-1).numpy(),
    }


def test_planted_errors_are_confident_and_found_by_the_third_quadrant(student_tokens):
    planted = student_tokens["label"] == "planted_error"
    confident = planted & (student_tokens["top1_prob"] >= 0.9)
    assert confident.sum() / planted.sum() > 0.8
    entropy, reverse_kl = student_tokens["entropy"], student_tokens["reverse_kl"]
    third = (entropy <= 0.3) & (reverse_kl > 0.5)
    assert third[confident].mean() >= 0.9
    assert planted[third].mean() >= 0.6


def test_q3_score_ranks_planted_errors_first(student_tokens):
    clipped = np.minimum(student_tokens["entropy"], np.quantile(student_tokens["entropy"], 0.98))
    entropy_hat = (clipped - clipped.min()) / (clipped.max() - clipped.min())
    assert (
        auc(
            student_tokens["forward_kl"] * (1 - entropy_hat),
            student_tokens["label"] == "planted_error",
        )
        >= 0.97
    )


def test_forks_are_uncertain_and_agreed_upon(student_tokens):
    fork = student_tokens["label"] == "fork"
    assert np.median(student_tokens["entropy"][fork]) > 0.6
    assert np.median(student_tokens["reverse_kl"][fork]) < 0.05
    assert np.median(student_tokens["entropy"][~fork]) < 0.1


@pytest.mark.slow
def test_training_a_miniature_pair_learns_the_language_and_the_flaw(tmp_path: Path):
    size = ModelOptions(
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_steps=180,
        num_solutions=4000,
        learning_rate=5e-3,
        final_learning_rate=0.0,
        slip_share=0.25,
        batch_size=48,
    )
    options = TrainOptions(out=tmp_path, teacher=size, student=size, num_eval_problems=8)
    train(options)
    planted_prob = {}
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        text = ["ones: ", "7", " plus ", "8", " makes "]
        with torch.inference_mode():
            logits = model(torch.tensor([encode([BOS, *"17+28+39=", *text])])).logits[0, -1]
        planted_prob[name] = logits.softmax(-1)[[TOKEN_ID["4"], TOKEN_ID["5"]]].tolist()
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == "qwen3"
    assert planted_prob["student"][0] > 0.5 > planted_prob["student"][1]
    assert planted_prob["teacher"][1] > 0.5 > planted_prob["teacher"][0]
