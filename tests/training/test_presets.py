import dataclasses
from dataclasses import replace

import polars as pl
import pytest
import torch
from tiny_models import tiny_language_model
from transformers import AutoConfig, AutoModelForCausalLM

from tip_analysis.analysis.paper_claims import paper_results
from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.run_folder import create_run
from tip_analysis.core.schema import RolloutTable
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.models.batching import TokenBudget
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring.stage import Scorer, score_rollouts
from tip_analysis.training.ablation.plans import (
    SHAPES,
    Device,
    ModelShape,
    estimate_memory,
    lora_parameters,
    plan_ablation,
    sampling_seconds,
    training_seconds,
)
from tip_analysis.training.ablation.presets import PRESETS, deviations_from_paper, resolve_preset
from tip_analysis.training.ablation.problem_sets import (
    load_evaluation_sets,
    load_prompts,
    short_name,
)
from tip_analysis.training.ablation.study import run_ablation, study_from_preset
from tip_analysis.training.options import TrainingOptions

MATH = ("qwen3-8b-4b", "llama-70b-8b", "qwen2.5-14b-1.5b")
AGENTIC = ("qwen3-14b-1.7b-agentic", "qwen3-32b-1.7b-agentic")
ARCHITECTURE = {
    "qwen3-8b-4b": "qwen3",
    "llama-70b-8b": "llama",
    "qwen2.5-14b-1.5b": "qwen2",
    "qwen3-14b-1.7b-agentic": "qwen3",
    "qwen3-32b-1.7b-agentic": "qwen3",
}


def resolved(name, **overrides):
    own = {"teacher": "Qwen/Qwen3-8B"} if name == "qwen3-8b-4b" else {}
    own |= {"evaluation_sets": ("held_out.jsonl",)} if name in AGENTIC else {}
    return resolve_preset(name, **(own | overrides))


@pytest.mark.parametrize("name", [*MATH, *AGENTIC])
def test_arms_are_those_of_the_papers_tables(name):
    preset = PRESETS[name]
    paper = paper_results().filter(pl.col("pair") == preset.paper_pair)
    expected = set(paper.select("rule", "retention_ratio").unique().rows())
    assert {(arm.rule, arm.retention_ratio) for arm in preset.parsed_arms()} == expected


def test_hyperparameters_of_table_9():
    for name in (*MATH, *AGENTIC):
        training = PRESETS[name].training
        assert training.learning_rate == (3e-7 if name == "llama-70b-8b" else 1e-6)
        assert (training.prompts_per_step, training.rollouts_per_prompt, training.chunk_size) == (
            8,
            16,
            512,
        )
        assert (
            training.schedule,
            PRESETS[name].max_prompt_tokens,
            PRESETS[name].max_new_tokens,
        ) == ("cosine", *((4096, 24_576) if name in AGENTIC else (2048, 8192)))
        assert PRESETS[name].num_samples == 16


@pytest.mark.parametrize("name", [*MATH, *AGENTIC])
def test_a_plan_names_benchmarks_thinking_epoch_and_deviations(name):
    table = plan_ablation(resolved(name)).table()
    rows = dict(table.iter_rows())
    deviations = table.filter(item="deviation")["value"].to_list()
    if name in MATH:
        assert [short_name(s) for s in rows["benchmarks"].split(", ")] == [
            "MATH-500",
            "aime_2024",
            "aime25",
        ]
        assert rows["steps per epoch"] == "1,739 (13,918 prompts)"
        assert resolved(name).training.num_steps == 1739
    assert rows["thinking"].startswith("on" if name in AGENTIC else "off")
    assert any("teacher: " in line for line in deviations) == (
        name in ("qwen3-8b-4b", "qwen2.5-14b-1.5b")
    )
    assert {"on 1 × H100 80 GB", "on 8 × H100 80 GB", "on 64 × H100 80 GB", "disk"} <= rows.keys()
    changed = resolved(name, learning_rate=1e-5, num_samples=4, epochs=2)
    lines = deviations_from_paper(changed)
    assert set(deviations) < set(lines)
    assert any(line.startswith("learning rate: ") and "here 1e-05" in line for line in lines)
    assert any(line.startswith("num samples: 16") for line in lines)
    assert any(line.startswith("epochs: ") and "2" in line for line in lines)


def test_the_switch_for_thinking_reaches_the_study():
    for name, switch in (("qwen3-8b-4b", False), (AGENTIC[0], True)):
        study = study_from_preset(resolved(name), prompts=(), evaluation_prompts=())
        assert study.chat_template_kwargs == {"enable_thinking": switch}
        assert study.identity()["chat_template_kwargs"] == {"enable_thinking": switch}


def test_epochs_become_steps():
    preset = resolve_preset("arithmetic", epochs=3)
    assert preset.with_steps(35).training.num_steps == 3 * (35 // 8)
    assert resolve_preset("arithmetic").with_steps(35).training.num_steps == 60


def test_hours_on_several_devices_by_hand():
    plan = plan_ablation(resolved("qwen3-8b-4b"))
    one = replace(plan, num_devices=4, device_hours=60.0, num_trainings=6)
    assert one.wall_time(1) == "does not fit: a training needs 4"
    assert one.wall_time(8) == "30.0 hours"
    assert one.wall_time(64) == "10.0 hours"


def test_what_is_missing_is_asked_for():
    with pytest.raises(OptionError, match=r"needs --teacher \(the paper's teacher"):
        resolve_preset("qwen3-8b-4b")
    with pytest.raises(OptionError, match="--evaluation-prompts"):
        resolve_preset("qwen3-14b-1.7b-agentic")
    with pytest.raises(UnknownNameError, match="llama-70b-8b"):
        resolve_preset("llama-70b")
    with pytest.raises(UnknownNameError, match="learning_rate"):
        resolve_preset("arithmetic", learning_rat=1.0)


def test_overrides_reach_preset_and_training():
    preset = resolve_preset(
        "arithmetic", learning_rate=5e-4, num_steps=7, seeds=(4,), max_new_tokens=50, teacher=None
    )
    assert (preset.training.learning_rate, preset.training.num_steps) == (5e-4, 7)
    assert (preset.seeds, preset.max_new_tokens, preset.teacher) == ((4,), 50, "arithmetic-teacher")
    assert PRESETS["arithmetic"].training.num_steps == 60
    assert dataclasses.is_dataclass(preset)


def test_prompts_of_a_preset(tmp_path):
    preset = resolve_preset("arithmetic")
    train = load_prompts(preset.prompts, limit=5)
    assert [prompt.id for prompt in train] == [row["id"] for row in problems(5, split="train")]
    held_out = load_evaluation_sets(preset.evaluation_sets)
    assert len(held_out) == 128
    assert not {p.id for p in held_out} & {p.id for p in load_prompts(preset.prompts)}
    (tmp_path / "mine.jsonl").write_text('{"id": "a", "problem": "1+1=", "answer": "2"}\n', "utf-8")
    both = load_evaluation_sets([str(tmp_path / "mine.jsonl"), "arithmetic:held_out:2"])
    assert both[0].id == "mine/a"
    assert both[1].id.startswith("arithmetic/arithmetic-")
    assert short_name("HuggingFaceH4/MATH-500:test") == "MATH-500"
    with pytest.raises(OptionError, match="SPLIT:NUMBER"):
        load_prompts("arithmetic:train:many")


# -------------------------------------------------------------------------------------------- plans

TINY = ModelShape(2, 8, 16, 4, 2, 4, vocab_size=100, tied=False)
HAND = replace(
    PRESETS["arithmetic"],
    training=TrainingOptions(
        num_steps=10,
        prompts_per_step=2,
        rollouts_per_prompt=4,
        chunk_size=5,
        precision="bfloat16",
        gradient_checkpointing=True,
        micro_batch_size=1,
    ),
    arms=("all", "q3:0.1"),
    seeds=(0, 1, 2),
    max_prompt_tokens=20,
    max_new_tokens=40,
    num_samples=4,
)


def test_parameters_by_hand():
    # Attention 8·(16 + 8 + 8) + 16·8 = 384, feed-forward 3·8·16 = 384, norms 16; twice; embeddings
    # and head 1600; final norm 8.
    assert TINY.num_parameters == 2 * (384 + 384 + 16) + 1600 + 8
    assert replace(TINY, tied=True).num_parameters == TINY.num_parameters - 800
    # Rank 3: q 8→16, k and v 8→8, o 16→8, three of 8↔16: inputs + outputs 24 + 16 + 16 + 24 + 72 =
    # 152 a layer.
    assert lora_parameters(TINY, 3) == 2 * 3 * 152


def test_memory_by_hand():
    found, full_logits = estimate_memory(HAND, TINY, TINY, sampler_tokens=1000)
    P = 3176
    assert found.weights == 4 * P + 2 * P
    assert (found.gradients, found.optimizer, found.teacher) == (4 * P, 8 * P, 2 * P)
    tokens = 1 * (20 + 40)
    assert found.activations == 2 * tokens * 8 * 2 + 2 * tokens * (8 * 8 + 4 * 8 + 3 * 16)
    assert found.logits == 10 * 5 * 100 * 4
    assert found.head_gradient == 8 * 100 * 8
    assert found.sampler == 2 * 2 * 2 * 8 * 1000  # keys and values, 2 bytes each
    assert full_logits == 10 * 40 * 100 * 4
    assert found.peak == 20 * P + max(found.sampler, found.activations + 20_000 + 6_400)
    lora = replace(HAND, training=replace(HAND.training, lora_rank=3))
    adapted, _ = estimate_memory(lora, TINY, TINY, sampler_tokens=1000)
    assert (adapted.weights, adapted.gradients, adapted.head_gradient) == (
        2 * P + 4 * 912,
        4 * 912,
        0,
    )


def test_time_and_tokens_by_hand():
    P = 3176
    device = Device("one", memory_bytes=1e5, peak_flops=1e6, bandwidth=1e12, utilization=0.5)
    # Training 8 P_S + 2 P_T, and 2 P_S to score in micro-batches, on 8 rollouts of 20 + 5 tokens.
    assert training_seconds(HAND, TINY, TINY, 20, device) == pytest.approx(
        (8 + 2 + 2) * P * 8 * 25 / 5e5
    )
    assert sampling_seconds(TINY, 8, 20, 40, 1000, device) == pytest.approx(2 * P * 8 * 20 / 5e5)
    slow = replace(device, peak_flops=1e12, bandwidth=1e6)
    # 8 rollouts, two batches of 5 at most; 40 steps each; all weights and half of 5 rollouts' keys
    # and values.
    cache = 2 * 2 * 2 * 8 * 5 * 20 / 2
    assert sampling_seconds(TINY, 8, 20, 40, 200, slow) == pytest.approx(
        2 * 40 * (2 * P + cache) / 5e5
    )
    plan = plan_ablation(
        HAND,
        student=TINY,
        teacher=TINY,
        num_evaluation_problems=3,
        sampler_tokens=1000,
        device=device,
    )
    assert plan.num_trainings == 6
    assert plan.tokens_per_step == 8 * 20
    assert plan.generated_tokens == 8 * 20 * 10 * 6
    assert plan.evaluation_tokens == 3 * 4 * 20 * (6 + 3)
    step = training_seconds(HAND, TINY, TINY, 20, device) + sampling_seconds(
        TINY, 8, 20, 40, 1000, device
    )
    evaluation = sampling_seconds(TINY, 12, 20, 40, 1000, device)
    assert plan.device_hours == pytest.approx((60 * step + 9 * evaluation) / 3600)
    assert plan.num_devices == -(-plan.memory.peak // 90_000)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_can_be_planned(name):
    plan = plan_ablation(resolved(name))
    rows = dict(plan.table().iter_rows())
    assert rows["preset"] == name
    assert rows["student"]
    assert "GB" in rows["memory: peak"]
    assert (plan.generated_tokens == 0) == (name in AGENTIC)
    assert plan.full_logits_bytes > plan.memory.logits or name == "arithmetic"
    with pytest.raises(OptionError, match="shape of the student"):
        plan_ablation(replace(resolved(name), student="somebody/else"))


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-4B", "Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"]
)
def test_shapes_count_what_transformers_counts(name):
    """The whole model, built without memory from a config of this shape."""
    shape = SHAPES[name]
    kind = "qwen3" if "Qwen3" in name else "qwen2" if "Qwen2" in name else "llama"
    options = {"head_dim": shape.head_dim} if kind != "qwen2" else {}
    config = AutoConfig.for_model(
        kind,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=shape.tied,
        **options,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters


# ---------------------------------------------------------------------------------- families' paths


def small(preset):
    """A preset cut down to seconds: every choice of it stays, numbers shrink."""
    training = replace(
        preset.training,
        num_steps=2,
        prompts_per_step=2,
        rollouts_per_prompt=2,
        learning_rate=1e-2,
        chunk_size=4,
    )
    return replace(
        preset,
        training=training,
        max_new_tokens=8,
        num_samples=2,
        template="plain",
        arms=("all", "q3:0.2"),
    )


def models(name):
    architecture = ARCHITECTURE[name]
    tied = architecture != "llama"
    student = tiny_language_model(architecture, tied=tied, sharpness=8.0, name="tiny-student")
    padding = 3 if architecture == "qwen2" else 0  # Qwen2.5-14B has more rows in its head than 1.5B
    return student, tiny_language_model(
        architecture, tied=False, seed=1, padding_rows=padding, sharpness=8.0, name="tiny-teacher"
    )


def prompts(count, split):
    return [
        Prompt(row["id"], problem=row["problem"], answer=row["answer"])
        for row in problems(count, split=split)
    ]


@pytest.mark.parametrize("name", MATH)
def test_the_path_of_each_family(name, tmp_path):
    preset = small(resolved(name))
    student, teacher = models(name)
    study = study_from_preset(
        preset,
        prompts=prompts(4, "train"),
        evaluation_prompts=prompts(3, "held_out"),
        student=student,
        teacher=teacher,
    )
    study = replace(study, grader="exact")
    table = run_ablation(create_run(tmp_path / "run"), study, arms=preset.parsed_arms(), seeds=[0])
    assert set(table["rule"]) == {"untrained", "all", "q3"}
    trained = table.filter(pl.col("rule") != "untrained")
    assert (trained["losses"].list.len() == 2).all()
    assert trained["train_loss"].is_finite().all()


def multi_turn_run(path, student, teacher):
    """A run whose rollouts hold a tool's answer in the middle, which the student did not write."""
    own = create_run(path / "own")
    sample_rollouts(
        own,
        student=student,
        prompts=prompts(4, "train"),
        sampling=Sampling(max_new_tokens=9),
        num_rollouts=2,
    )
    frame = own.rollouts().collect()
    mask = [[not 3 <= t < 6 for t in range(len(ids))] for ids in frame["response_token_ids"]]
    logprobs = [
        [value if keep else None for value, keep in zip(values, keeps, strict=True)]
        for values, keeps in zip(frame["sampled_logprobs"], mask, strict=True)
    ]
    frame = frame.with_columns(
        pl.Series("loss_mask", mask, dtype=pl.List(pl.Boolean)),
        pl.Series("sampled_logprobs", logprobs, dtype=pl.List(pl.Float32)),
        source=pl.lit("given"),
    )
    run = create_run(path / "run")
    stage = run.begin("rollout", config={"source": "given"})
    stage.write(0, validate(frame, RolloutTable))
    stage.finish()
    score_rollouts(run, Scorer(student, teacher, TokenBudget(10_000)))
    return run


@pytest.mark.parametrize("name", AGENTIC)
def test_the_path_of_multi_turn_rollouts_with_tool_tokens_masked(name, tmp_path):
    preset = small(resolved(name))
    student, teacher = models(name)
    run = multi_turn_run(tmp_path, student, teacher)
    study = study_from_preset(
        preset,
        prompts=(),
        evaluation_prompts=prompts(3, "held_out"),
        student=student,
        teacher=teacher,
        grader="exact",
    )
    table = run_ablation(run, study, arms=preset.parsed_arms(), seeds=[0])
    written = run.tokens().filter("loss_mask").collect().height
    everything = table.filter(rule="all").row(0, named=True)
    assert everything["tokens_trained"] == everything["tokens_seen"] == written
    assert written < run.tokens().collect().height
    assert everything["mode"] == "offline"
    assert everything["drift_reverse_kl"] > 0
