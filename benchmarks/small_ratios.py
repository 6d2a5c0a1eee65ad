"""Why small retention ratios collapse on the arithmetic pair: the same arms under other optimizers.

    python benchmarks/small_ratios.py --out runs/small_ratios --seeds 0 1 2

Each condition is one study in a run folder of its own, which is resumed where it was interrupted.
Writes benchmarks/results/small_ratios.json: accuracy and held-out divergence of every arm, seed and
condition, from which docs/concepts/small_ratios.md takes its tables.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tip_analysis.analysis.arms import Arm
from tip_analysis.core.run_folder import create_run
from tip_analysis.training.ablation.presets import resolve_preset
from tip_analysis.training.ablation.problem_sets import load_evaluation_sets, load_prompts
from tip_analysis.training.ablation.study import run_ablation, study_from_preset

ARMS = (Arm("all"), Arm("entropy", 0.1), Arm("entropy_sampling", 0.5), Arm("soft_or", 0.5))
CONDITIONS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
    "adamw, epsilon 1e-2": {"adam_epsilon": 1e-2},
    "adamw, matched update norm": {"match_update_norm": 0.06},
    "adamw, warm-up of 10 steps": {"warmup_steps": 10},
}
RESULTS = Path(__file__).parent / "results" / "small_ratios.json"


def run_condition(
    name: str, out: Path, arms: list[Arm], seeds: list[int], jobs: int
) -> list[dict[str, Any]]:
    preset = resolve_preset("arithmetic", **CONDITIONS[name])
    study = study_from_preset(
        preset,
        prompts=load_prompts(preset.prompts or ""),
        evaluation_prompts=load_evaluation_sets(preset.evaluation_sets),
    )
    folder = out / name.replace(", ", "-").replace(" ", "-")
    rows = run_ablation(create_run(folder), study, arms=arms, seeds=seeds, jobs=jobs)
    kept = ["rule", "retention_ratio", "seed", "step", "accuracy", "best_at_k"]
    kept += ["heldout_reverse_kl", "problem_accuracy", "losses"]
    return [{"condition": name} | row for row in rows.select(kept).to_dicts()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/small_ratios"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS))
    parser.add_argument("--arms", nargs="+", default=list(map(str, ARMS)))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    arms = [Arm.parse(text) for text in options.arms]
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:  # each pass is whole, so that a run that is cut off is balanced
        for name in options.conditions:
            rows += run_condition(name, options.out, arms, [seed], options.jobs)
            conditions = {name: CONDITIONS[name] for name in options.conditions}
            found = json.dumps({"conditions": conditions, "rows": rows}, indent=1)
            options.results.write_text(found + "\n")


if __name__ == "__main__":
    main()
