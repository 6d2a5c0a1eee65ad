"""The real vLLM, on a CPU (`make vllm`): what it samples, says and takes, against this package's
own sampler and transformers' own numbers."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import Qwen3Config, Qwen3ForCausalLM

from tip_analysis.cli.main import main
from tip_analysis.core.errors import EngineError, MissingExtraError, OptionError
from tip_analysis.core.run_folder import open_run
from tip_analysis.demo.arithmetic.tokenizer import build_tokenizer
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import LanguageModel, load_model
from tip_analysis.models.output_head import OutputHead
from tip_analysis.rollouts.engines.engine import Request
from tip_analysis.rollouts.engines.hf import HFEngine
from tip_analysis.rollouts.engines.opening import Loading, open_engine, opened
from tip_analysis.rollouts.engines.settings import EngineSettings
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.scoring.door import score
from tip_analysis.training.door import ablate

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own, and those of what it imports

EAGER = EngineSettings("vllm", options={"enforce_eager": True})
"""No compilation: tests are short."""
PROMPT = [1, 4, 5, 6, 9]


def tiny_qwen3(folder: Path, *, seed: int = 0) -> Path:
    """A random Qwen3 of head size 64, which vLLM's attention for CPUs takes, with the arithmetic
    pair's tokenizer; its layers weigh enough to tell one prefix from another."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
        model.get_output_embeddings().weight.mul_(2.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_logprobs(model: LanguageModel, prompt: list[int], ids: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model.model(torch.tensor([[*prompt, *ids]])).logits[0].double()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_the_extra_one_line_names_it(capsys, tmp_path):
    with pytest.raises(MissingExtraError, match=r"--engine vllm needs the package .vllm.*\[vllm\]"):
        open_engine(EngineSettings("vllm"), "arithmetic-student", Loading())
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"problem": "12+34+56="}\n')
    command = ["--student", "arithmetic-student", "--prompts", str(problems), "--engine", "vllm"]
    with pytest.raises(SystemExit) as stopped:
        main(["rollout", str(tmp_path / "run"), *command])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "tip-analysis[vllm]" in line
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_qwen3(tmp_path_factory.mktemp("models") / "qwen3"))


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def engine(tiny):
    made = open_engine(EAGER, tiny, Loading(dtype="float32"))
    made.expect(64)
    yield made
    made.close()


def requests(count, prompt=PROMPT, limit=None):
    return [Request(f"r/{row}", prompt, limit) for row in range(count)]


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_ids_logprobs_and_ends_are_the_models_own(engine, model):
    found = engine.generate(requests(32), Sampling(max_new_tokens=24, seed=1))
    reasons = Counter(str(generation.finish_reason) for generation in found)
    assert set(reasons) == {"stop", "length"}
    for generation in found:
        assert (generation.token_ids[-1] == 2) == (generation.finish_reason == "stop")
        expected = own_logprobs(model, PROMPT, generation.token_ids)
        np.testing.assert_allclose(generation.logprobs, expected, atol=2e-4)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_logprobs_are_of_temperature_1_whatever_the_sampling(engine, model):
    sampling = Sampling(max_new_tokens=8, temperature=0.5, top_p=0.8, top_k=5)
    for generation in engine.generate(requests(8), sampling):
        expected = own_logprobs(model, PROMPT, generation.token_ids)
        np.testing.assert_allclose(generation.logprobs, expected, atol=2e-4)


@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.7, "temperature": 1.3}]
)
def test_first_tokens_follow_the_distribution_of_the_own_sampler(engine, model, how):
    count = 4000
    sampling = Sampling(max_new_tokens=1, seed=7, **how)
    theirs = Counter(g.token_ids[0] for g in engine.generate(requests(count), sampling))
    own = HFEngine(model, TokenBudget(100_000))
    ours = Counter(g.token_ids[0] for g in own.generate(requests(count), sampling))
    common = [token for token in {*ours, *theirs} if ours[token] + theirs[token] >= 20]
    table = [[counts[token] for token in common] for counts in (ours, theirs)]
    table = np.array([[*row, count - sum(row)] for row in table])
    table = table[:, table.sum(0) > 0]
    assert len(common) >= 3
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_rerun_with_the_same_batch_gives_the_same_and_another_seed_another(engine):
    sampling = Sampling(max_new_tokens=16, seed=3)
    first, again = (engine.generate(requests(16), sampling) for _ in range(2))
    assert [g.token_ids for g in first] == [g.token_ids for g in again]
    assert len({tuple(g.token_ids) for g in first}) > 8  # each rollout has a seed of its own
    other = engine.generate(requests(16), Sampling(max_new_tokens=16, seed=4))
    assert [g.token_ids for g in first] != [g.token_ids for g in other]


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_any_prefix_is_continued_and_each_request_has_its_limit(engine, model):
    turns = [
        Request("a/1", [1, 4, 5]),
        Request("b/2", [1, 9, 9, 4, 2, 7, 8], 3),
        Request("c", [1], 1),
    ]
    found = engine.generate(turns, Sampling(max_new_tokens=5))
    for request, generation in zip(turns, found, strict=True):
        assert 1 <= len(generation.token_ids) <= (request.max_new_tokens or 5)
        expected = own_logprobs(model, list(request.token_ids), generation.token_ids)
        np.testing.assert_allclose(generation.logprobs, expected, atol=2e-4)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_greedy_is_the_most_likely_token(engine, model):
    (generation,) = engine.generate(requests(1), Sampling(max_new_tokens=6, temperature=0.0))
    context = list(PROMPT)
    for token in generation.token_ids:
        assert token == int(model.model(torch.tensor([context])).logits[0, -1].argmax())
        context.append(token)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_weights_are_handed_over(engine, tiny, tmp_path):
    """Last in the module's order for the shared engine: it ends with the weights it began with."""
    changed = load_model(str(tiny_qwen3(tmp_path / "other", seed=9)), dtype="float32", device="cpu")
    sampling = Sampling(max_new_tokens=12, seed=2)
    before = engine.generate(requests(8), sampling)
    engine.update(changed)
    for generation in engine.generate(requests(8), sampling):
        expected = own_logprobs(changed, PROMPT, generation.token_ids)
        np.testing.assert_allclose(generation.logprobs, expected, atol=2e-4)
    engine.update(load_model(tiny, dtype="float32", device="cpu"))
    assert [g.token_ids for g in engine.generate(requests(8), sampling)] == [
        g.token_ids for g in before
    ]


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_adapters_are_merged_into_a_copy(engine, model):
    from peft import LoraConfig, get_peft_model

    base = load_model(model.name, dtype="float32", device="cpu").model
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    student = LanguageModel("adapted", adapted, model.tokenizer, OutputHead(adapted))
    kept = {name: value.clone() for name, value in adapted.state_dict().items()}
    engine.update(student)
    (generation,) = engine.generate(requests(1), Sampling(max_new_tokens=12))
    expected = own_logprobs(student, PROMPT, generation.token_ids)
    np.testing.assert_allclose(generation.logprobs, expected, atol=5e-4)
    assert all(torch.equal(value, kept[name]) for name, value in adapted.state_dict().items())
    engine.update(model)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_model_that_vllm_cannot_run_is_one_line():
    with (
        opened(EAGER, "arithmetic-student", Loading(dtype="float32")) as made,
        pytest.raises(
            EngineError, match=r"vLLM (cannot start|failed) on arithmetic-student"
        ) as raised,
    ):
        made.generate(requests(1), Sampling(max_new_tokens=2))
    assert "\n" not in str(raised.value)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_the_chain_on_the_command_line(tiny, tmp_path):
    problems = tmp_path / "p.jsonl"
    problems.write_text(
        "\n".join(
            f'{{"id": "p{i}", "problem": "{10 + i}+22+33=", "answer": "1"}}' for i in range(4)
        )
    )
    run = tmp_path / "run"
    options = ["--engine", "vllm", "--engine-options", "enforce_eager=true", "--dtype", "float32"]
    asked = ["--student", tiny, "--prompts", str(problems), "--max-new-tokens", "16"]
    main(["rollout", str(run), *asked, *options, "--num-rollouts", "2", "--grader", "exact"])
    rows = open_run(run).rollouts().collect()
    assert rows["engine"].unique().to_list() == ["vllm"]
    record = open_run(run).stages()["rollout"]
    assert record["config"]["engine"] == "vllm"
    assert record["settings"]["vllm"].startswith("vllm")
    assert record["settings"]["max_model_len"] == max(map(len, rows["prompt_token_ids"])) + 16
    found = score(run, teacher=tiny, dtype="float32", device="cpu")
    assert found["num_logprobs_compared"] == found["num_scored_tokens"]
    assert found["logprob_gap_median"] < 1e-4
    assert found["logprob_gap_max"] < 1e-3
    main(
        [
            "evaluate",
            str(tmp_path / "e"),
            "--model",
            tiny,
            *asked[2:],
            *options,
            "--num-samples",
            "2",
        ]
    )
    assert open_run(tmp_path / "e").evaluations().collect().height == 8


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_ablate_trains_on_policy_with_it(tiny, tmp_path):
    prompts = [
        Prompt(id=f"p{i}", problem=f"{10 + i}+22+33=", answer="1", benchmark="b") for i in range(4)
    ]
    problems = tmp_path / "p.jsonl"
    problems.write_text("\n".join(f'{{"problem": "{p.problem}", "answer": "1"}}' for p in prompts))
    rows = ablate(
        tmp_path / "run",
        student=tiny,
        teacher=str(tiny_qwen3(tmp_path / "teacher", seed=3)),
        prompts=str(problems),
        evaluation_sets=(str(problems),),
        arms=("all",),
        seeds=(0,),
        num_steps=6,
        prompts_per_step=4,
        rollouts_per_prompt=8,
        max_new_tokens=12,
        num_samples=8,
        learning_rate=1e-3,
        schedule="constant",
        warmup_steps=0,
        grader="exact",
        engine=EAGER,
        dtype="float32",
        device="cpu",
    )
    trained = rows.filter(rule="all")
    assert trained["tokens_seen"].item() > 0
    held_out = dict(rows.select("rule", "heldout_reverse_kl").iter_rows())
    assert held_out["all"] < held_out["untrained"]
    with pytest.raises(OptionError, match="--jobs 1"):
        ablate(tmp_path / "other", preset="arithmetic", engine=EAGER, jobs=2)
