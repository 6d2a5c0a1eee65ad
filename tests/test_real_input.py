"""The main job on real weights and real problems: SmolLM2 on GSM8K, its own teacher once it is
shown the solution."""

import pytest
from shared_data import shared_file

from tip_analysis.analysis.quadrants import assign_quadrants, quadrant_shares
from tip_analysis.cli.main import main
from tip_analysis.core.run_folder import open_run

PROBLEMS = shared_file("gsm8k_train_1k.jsonl")


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.shared
def test_smollm2_shown_the_solution_teaches_itself(tmp_path):
    run, model = str(tmp_path / "run"), "smollm2-135m-instruct"
    prompts = [
        "--prompts",
        str(PROBLEMS),
        "--limit",
        "4",
        "--num-rollouts",
        "1",
        "--max-new-tokens",
        "48",
    ]
    main(["rollout", run, "--student", model, "--template", "boxed", *prompts])
    main(["score", run, "--teacher", model, "--teacher-context", "solution"])
    tokens = open_run(run).tokens().collect()
    generated = open_run(run).rollouts().collect()["sampled_logprobs"].explode()
    assert (tokens["student_logprob"] - generated).abs().median() < 0.1  # bfloat16 logits
    assert tokens["reverse_kl"].max() > 0.1
    assert quadrant_shares(assign_quadrants(tokens))["share"].min() > 0.0
