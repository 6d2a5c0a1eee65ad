"""Scoring in two phases: the table of one pass, what is refused, what a stored top-k bounds."""

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_language_model
from token_columns import EXACT, FLOATS

from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.cli.main import main
from tip_analysis.core.errors import (
    ConfigurationMismatchError,
    LogitsError,
    ModelError,
    OptionError,
    RunError,
    SchemaError,
    UnknownNameError,
)
from tip_analysis.core.names import Artefact
from tip_analysis.core.run_folder import create_run
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.logits.row_statistics import token_statistics
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.head_alone import head_rows, load_head
from tip_analysis.models.loading import load_model
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring.scorer import Scorer
from tip_analysis.scoring.stage import score_rollouts
from tip_analysis.scoring.teacher_states import TeacherStore, store_teacher_states
from tip_analysis.scoring.top_k_side import LOWER_BOUNDS, NOT_BOUNDED, TopKSide


@pytest.fixture(scope="module")
def student():
    return tiny_language_model(name="student")


@pytest.fixture(scope="module")
def teacher():
    return tiny_language_model("llama", seed=5, padding_rows=3, name="teacher")


@pytest.fixture(scope="module")
def sampled(student, tmp_path_factory):
    run = create_run(tmp_path_factory.mktemp("runs") / "run")
    prompts = [
        Prompt(id=row["id"], problem=row["problem"], solution="so 102")
        for row in problems(5, seed=1)
    ]
    sample_rollouts(
        run, student=student, prompts=prompts, sampling=Sampling(max_new_tokens=20), num_rollouts=3
    )
    rollouts = run.rollouts().collect()
    masks = [
        [index % 4 != 1 for index in range(len(ids))] for ids in rollouts["response_token_ids"]
    ]
    masks[2] = [False] * len(masks[2])
    return rollouts.with_columns(loss_mask=pl.Series(masks, dtype=pl.List(pl.Boolean)))


@pytest.fixture
def run(sampled, tmp_path):
    run = create_run(tmp_path / "run")
    run.begin("rollout", config={"student": {"name": "student"}}).write(0, sampled)
    return run


@pytest.fixture(scope="module")
def one_pass(sampled, student, teacher):
    return Scorer(student, teacher).token_table(sampled)


@pytest.mark.parametrize("budget", [60, 16384], ids=["small batches", "one batch"])
def test_two_phases_give_the_table_of_one_pass_to_the_last_bit(
    run, sampled, student, teacher, budget
):
    whole = create_run(run.path.parent / "whole")
    whole.begin("rollout", config={"student": {"name": "student"}}).write(0, sampled)
    score_rollouts(whole, Scorer(student, teacher, TokenBudget(budget)), shard_size=4)
    stored = store_teacher_states(run, teacher, shard_size=4, budget=TokenBudget(budget))
    assert stored["num_tokens"] == sum(map(sum, sampled["loss_mask"].to_list()))
    summary = score_rollouts(
        run, Scorer(student, teacher, TokenBudget(budget)), shard_size=4, stored=TeacherStore(run)
    )
    assert run.tokens().collect().equals(whole.tokens().collect())
    assert summary == whole.stages()["score"]["summary"]
    assert run.stages()["score"]["config"] == whole.stages()["score"]["config"]
    assert (
        run.stages()["score"]["settings"]["phases"],
        whole.stages()["score"]["settings"]["phases"],
    ) == (2, 1)


def test_states_are_kept_in_the_dtype_of_the_body(run, student):
    teacher = tiny_language_model("qwen2", seed=3, dtype=torch.bfloat16)
    store_teacher_states(run, teacher)
    side = (
        TeacherStore(run)
        .shard(0, run.rollouts().collect(), Scorer(student, teacher))
        .side(run.rollouts().collect()["rollout_id"][:2])
    )
    assert side.hidden.dtype == torch.bfloat16


def test_both_phases_resume_and_array_jobs_share_them(run, one_pass, student, teacher):
    first = store_teacher_states(run, teacher, shard_size=4, part=(1, 2))
    assert first == {"num_shards": 4, "num_shards_missing": 2}
    scorer = Scorer(student, teacher)
    with pytest.raises(RunError, match=r"part-00000.safetensors is missing, altered or discarded"):
        score_rollouts(run, scorer, shard_size=4, stored=TeacherStore(run))
    store_teacher_states(run, teacher, shard_size=4, part=(0, 2))
    shard = run.path / "teacher_states" / "part-00001.safetensors"
    kept = {path: path.stat().st_mtime_ns for path in shard.parent.iterdir() if path != shard}
    shard.write_bytes(shard.read_bytes()[:-8])
    assert run.altered_shards() == ["teacher_states/part-00001.safetensors"]
    with pytest.raises(RunError, match=r"part-00001.safetensors is missing, altered or discarded"):
        score_rollouts(run, scorer, shard_size=4, stored=TeacherStore(run))
    assert (
        len(list((run.path / "tokens").iterdir())) == 1
    )  # what came before the altered shard is kept
    store_teacher_states(run, teacher, shard_size=4)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    score_rollouts(run, scorer, shard_size=4, stored=TeacherStore(run))
    table = run.tokens().collect()
    assert table.select(EXACT).equals(one_pass.select(EXACT))
    for name in FLOATS:
        np.testing.assert_allclose(
            table[name].to_numpy(), one_pass[name].to_numpy(), rtol=2e-4, atol=2e-6, err_msg=name
        )


def test_states_of_another_signature_are_refused(run, student, teacher):
    with pytest.raises(RunError, match="--phase teacher"):
        TeacherStore(run)
    store_teacher_states(run, teacher)
    store = TeacherStore(run)
    store.require(teacher="teacher", teacher_context="none", shard_size=64)
    with pytest.raises(ConfigurationMismatchError, match="shard_size: 64 → 8"):
        store.require(teacher="teacher", shard_size=8)
    with pytest.raises(ConfigurationMismatchError, match="'teacher' → 'other'"):
        store.require(teacher="other")
    other = tiny_language_model("llama", seed=6, padding_rows=3, name="teacher")
    with pytest.raises(ModelError, match="output head of teacher is not that"):
        score_rollouts(run, Scorer(student, other), stored=store)
    with pytest.raises(ConfigurationMismatchError, match="weights_fingerprint"):
        store_teacher_states(run, other)
    run.stage("rollout").write(
        1, run.rollouts().head(1).collect().with_columns(rollout_id=pl.lit("new/0"))
    )
    with pytest.raises(ConfigurationMismatchError, match="the rollouts have changed"):
        store.require(teacher="teacher")


def test_a_head_that_answers_otherwise_is_refused(run, student, teacher, monkeypatch):
    store_teacher_states(run, teacher)
    monkeypatch.setattr(
        teacher.head, "_finish", lambda logits: logits * 1.5
    )  # the weights are the same
    with pytest.raises(ModelError, match="does not give the logits"):
        score_rollouts(run, Scorer(student, teacher), stored=TeacherStore(run))


def test_unknown_forms_and_sizes_are_refused(run, student, teacher):
    with pytest.raises(UnknownNameError, match="hidden, topk"):
        store_teacher_states(run, teacher, form="logits")
    with pytest.raises(OptionError, match="--store-k"):
        store_teacher_states(run, teacher, form="topk", store_k=0)
    store_teacher_states(run, teacher, form="topk", store_k=3)
    with pytest.raises(RunError, match="over 50 tokens, but student and teacher share 47"):
        score_rollouts(run, Scorer(student, teacher, top_k=2), stored=TeacherStore(run))
    store_teacher_states(run, teacher, form="topk", store_k=3, vocab_size=47, overwrite=True)
    with pytest.raises(OptionError, match="--top-k 5"):
        score_rollouts(run, Scorer(student, teacher), stored=TeacherStore(run))


@pytest.mark.parametrize("store_k", [6, 16, 47, 1000])
def test_a_stored_top_k_bounds_divergences_and_keeps_the_teachers_own(
    run, one_pass, student, teacher, store_k
):
    store_teacher_states(run, teacher, form="topk", store_k=store_k, vocab_size=student.vocab_size)
    score_rollouts(run, Scorer(student, teacher), stored=TeacherStore(run))
    table = run.tokens().collect()
    for name in one_pass.columns:
        if name in NOT_BOUNDED:
            assert table[name].null_count() == table.height
        elif name == "approximation":
            assert table[name].unique().to_list() == ["top-k"]
        elif name == "artefact":
            known = table[name].is_null() | (table[name] == one_pass[name])
            of_the_teacher = one_pass[name].is_in([Artefact.PADDED_MASS, Artefact.STOP_TOKEN])
            assert (known.fill_null(False) | of_the_teacher).all()
        elif name not in LOWER_BOUNDS:
            assert_same_column(table[name], one_pass[name])
    for name in LOWER_BOUNDS:
        bound, exact = (frame.filter("loss_mask")[name].to_numpy() for frame in (table, one_pass))
        assert (bound <= exact * (1 + 1e-4) + 1e-6).all()
        assert (bound < 0.999 * exact).any() == (store_k < 40)
        if store_k >= 47:
            np.testing.assert_allclose(bound, exact, rtol=1e-3, atol=1e-6)
    config, mass = (
        run.stages()["score"]["config"],
        run.stages()["teacher"]["summary"]["mean_tail_mass"],
    )
    assert config["teacher_store"] == {"form": "topk", "store_k": min(store_k, 47)}
    assert config["lower_bounds"] == list(LOWER_BOUNDS)
    assert (mass == 0) == (store_k >= 47)
    with pytest.raises(SchemaError, match="'teachability' needs a score for every token"):
        select_tokens(add_scores(table), rule="teachability", retention_ratio=0.5)


def assert_same_column(left, right):
    """Equal; or, of numbers, to rounding."""
    if left.name in FLOATS:
        np.testing.assert_allclose(
            left.to_numpy(), right.to_numpy(), rtol=1e-5, atol=1e-6, err_msg=left.name
        )
    elif left.name.endswith("logprobs"):
        pairs = [column.explode().to_numpy() for column in (left, right)]
        np.testing.assert_allclose(*pairs, rtol=1e-5, atol=1e-6, err_msg=left.name)
    else:
        assert left.equals(right), left.name


def test_the_tail_counts_as_one_token():
    """By eye: the teacher's tail of two tokens, 0.3 and 0.1, takes the student's shape, 1 : 1."""
    student, teacher = (
        torch.tensor([[0.5, 0.25, 0.25]]).log(),
        torch.tensor([[0.6, 0.3, 0.1]]).log(),
    )
    side = TopKSide(
        {
            "teacher_topk_ids": torch.tensor([[0]]),
            "teacher_topk_logprobs": teacher[:, :1],
            "log_tail_mass": torch.tensor([0.4]).log(),
        }
    )
    rebuilt = side.logits(slice(0, 1), student)
    torch.testing.assert_close(rebuilt.exp(), torch.tensor([[0.6, 0.2, 0.2]]))
    found = token_statistics(student=student, teacher=rebuilt)["reverse_kl"].item()
    two_tokens = 0.5 * np.log(0.5 / 0.6) + 0.5 * np.log(0.5 / 0.4)
    assert found == pytest.approx(two_tokens, rel=1e-5)


def test_a_student_without_a_tail_takes_it_evenly():
    side = TopKSide(
        {
            "teacher_topk_ids": torch.tensor([[1]]),
            "teacher_topk_logprobs": torch.tensor([[0.6]]).log(),
            "log_tail_mass": torch.tensor([0.4]).log(),
        }
    )
    student = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    torch.testing.assert_close(
        side.logits(slice(0, 1), student).exp(), torch.tensor([[0.2, 0.6, 0.2]])
    )
    assert (
        token_statistics(student=student, teacher=side.logits(slice(0, 1), student))[
            "forward_kl"
        ].item()
        == np.inf
    )


def test_a_teacher_that_answers_no_numbers_is_refused_in_its_own_phase(run):
    broken = tiny_language_model(seed=5, name="broken")
    broken.model.lm_head.weight[3] = torch.nan
    with pytest.raises(LogitsError, match=r"rollout '.*', position 0: teacher logits.*NaN"):
        store_teacher_states(run, broken, form="topk")


# ----------------------------------------------------------------------------------- the head alone


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models on disk, as other tools write them."""
    root = tmp_path_factory.mktemp("models")
    models = {
        "student": tiny_language_model(name="student"),
        "teacher": tiny_language_model("llama", seed=5, tied=False, padding_rows=3),
    }
    models |= {name: tiny_language_model(name, seed=2) for name in ARCHITECTURES}
    for name, model in models.items():
        model.model.save_pretrained(
            root / name, max_shard_size="20KB" if name == "teacher" else "1GB"
        )
        model.tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ["teacher", *ARCHITECTURES])
def test_a_head_alone_answers_as_the_whole_model_does(folders, name, caplog):
    alone = load_head(str(folders / name), dtype="float32", device="cpu")
    whole = load_model(str(folders / name), dtype="float32", device="cpu")
    hidden = torch.randn(5, 32)
    assert torch.equal(alone.head(hidden), whole.head(hidden))
    assert alone.vocab_size == whole.vocab_size == head_rows(str(folders / name))
    held = sum(
        parameter.numel()
        for parameter in alone.model.parameters()
        if parameter.device.type != "meta"
    )
    assert held == whole.head.linear.weight.numel()
    assert not caplog.records


def test_a_head_that_cannot_be_read_apart_comes_with_the_whole_model(folders, monkeypatch, caplog):
    monkeypatch.setattr("tip_analysis.models.head_alone._weight_files", lambda *_: {})
    alone = load_head(str(folders / "teacher"), dtype="float32", device="cpu")
    whole = load_model(str(folders / "teacher"), dtype="float32", device="cpu")
    hidden = torch.randn(5, 32)
    assert torch.equal(alone.head(hidden), whole.head(hidden))
    assert "cannot be read apart" in caplog.text
    assert (
        sum(parameter.numel() for parameter in alone.model.parameters())
        == whole.head.linear.weight.numel()
    )


def test_models_that_are_not_there_are_named():
    for load in (lambda: load_head("/nowhere", dtype="float32"), lambda: head_rows("/nowhere")):
        with pytest.raises(ModelError, match="/nowhere"):
            load()


def test_the_command_scores_in_two_phases(folders, sampled, tmp_path, capsys):
    runs = [create_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        stage = run.begin("rollout", config={"student": {"name": str(folders / "student")}})
        stage.write(0, sampled)
        stage.finish()
    one, two = (
        [
            "score",
            str(run.path),
            "--teacher",
            str(folders / "teacher"),
            "--shard-size",
            "4",
            "--dtype",
            "float32",
        ]
        for run in runs
    )
    main(one)
    with pytest.raises(SystemExit, match="2"):
        main([*two, "--phase", "student"])
    assert "holds no teacher's states" in capsys.readouterr().err
    main([*two, "--phase", "teacher"])
    assert "num tokens" in capsys.readouterr().out
    main(["status", str(runs[1].path)])
    assert "--phase student" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*two, "--phase", "student", "--teacher-context", "solution"])
    assert "teacher_context: 'none' → 'solution'" in capsys.readouterr().err
    main([*two, "--phase", "student", "--discard-teacher-states"])
    assert not (runs[1].path / "teacher_states").exists()
    teacher = runs[1].stages()["teacher"]
    assert teacher["shards"] == {}
    assert teacher["discarded"]
    main([*two, "--phase", "student", "--discard-teacher-states"])  # as after a kill: nothing to do
    assert runs[0].tokens().collect().equals(runs[1].tokens().collect())
