"""Details as lighteval itself writes them, by its own interpreter: TESTS_FOLDER OUTPUT_FOLDER. A
tiny random model answers a task of sums."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, sys.argv[1])
import torch
import xxhash
from lighteval.logging import info_loggers
from lighteval.logging.evaluation_tracker import EvaluationTracker
from lighteval.models.model_input import GenerationParameters
from lighteval.models.transformers.transformers_model import TransformersModelConfig
from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters
from lighteval.tasks.registry import Registry
from small_tokenizers import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

# of the tasks that ship some fetch files from the network when they are imported: none is needed
Registry._load_from_files = Registry._load_from_subdirs = staticmethod(lambda *_: {})
# lighteval hashes texts, which xxhash takes no more from its fourth release on
info_loggers.xxhash = SimpleNamespace(xxh64=lambda text: xxhash.xxh64(text.encode()))
out = Path(sys.argv[2])
data, folder = out / "data", out / "model"
data.mkdir(parents=True)
rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(5)]
(data / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))

TASK = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def prompt(line, task_name=None):
    return Doc(
        task_name=task_name, query=line["question"], choices=[line["answer"]], gold_index=0
    )


TASKS_TABLE = [
    LightevalTaskConfig(
        name="tiny_sums",
        prompt_function=prompt,
        hf_repo={data!r},
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        metrics=[Metrics.exact_match],
        generation_size=10,
        stop_sequence=[],
    )
]
"""
(out / "tiny_task.py").write_text(TASK.replace("{data!r}", repr(str(data))))
tokenizer = make_tokenizer()
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
marks = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
config = LlamaConfig(
    vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=512, **sizes, **marks
)
LlamaForCausalLM(config).save_pretrained(folder)
tokenizer.save_pretrained(folder)
pipeline = Pipeline(
    tasks="tiny_sums",
    pipeline_parameters=PipelineParameters(
        launcher_type=ParallelismManager.ACCELERATE,
        custom_tasks_directory=str(out / "tiny_task.py"),
    ),
    evaluation_tracker=EvaluationTracker(output_dir=str(out / "results"), save_details=True),
    model_config=TransformersModelConfig(
        model_name=str(folder),
        dtype="float32",
        batch_size=2,
        max_length=256,
        device="cpu",
        cache_dir=str(out / "cache"),
        generation_parameters=GenerationParameters(max_new_tokens=10),
    ),
)
pipeline.evaluate()
pipeline.save_and_push_results()
