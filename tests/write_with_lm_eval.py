"""Samples as lm-evaluation-harness itself writes them, by its own interpreter: TESTS_FOLDER
OUTPUT_FOLDER. A tiny random model answers a task of sums under two filters."""

import json
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from small_tokenizers import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

out = Path(sys.argv[2])
data = out / "sums.jsonl"
rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(5)]
data.write_text("\n".join(map(json.dumps, rows)))
task = {
    "task": "tiny_sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {
        "until": ["\n\n"],
        "max_gen_toks": 10,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    },
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {
            "name": "number",
            "filter": [
                {"function": "regex", "regex_pattern": "(\\d+)"},
                {"function": "take_first"},
            ],
        },
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
tokenizer = make_tokenizer()
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
marks = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes, **marks)
model = HFLM(LlamaForCausalLM(config), tokenizer=tokenizer, batch_size=4, max_length=256)
tracker = EvaluationTracker(output_path=str(out / "results"))
tracker.general_config_tracker.log_experiment_args("hf", "pretrained=tiny", None, None, False)
for chat in (False, True):
    named = task | {"task": "tiny_chat" if chat else "tiny_sums"}
    results = simple_evaluate(
        model=model,
        tasks=[named],
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
        apply_chat_template=chat,
        bootstrap_iters=0,
        random_seed=0,
    )
    tracker.save_results_aggregated(results, results["samples"])
    for name, samples in results["samples"].items():
        tracker.save_results_samples(name, samples)
