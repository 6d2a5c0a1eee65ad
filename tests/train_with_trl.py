"""Three steps of TIP in TRL, by TRL's own interpreter, in as many processes as it is launched with:
OUTPUT_FOLDER RULE SCOPE ROLLOUTS_PER_PROCESS ACCUMULATION."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from datasets import Dataset
from safetensors.torch import save_file
from tiny_models import tiny_language_model
from tip_analysis.trl import TIPDistillationConfig, TIPDistillationTrainer  # pyright: ignore

from tip_analysis.demo.arithmetic.language import problems

out, rule, scope, size, accumulation = sys.argv[1:]
student = tiny_language_model(sharpness=8.0)
student.model.requires_grad_(True)
trainer = TIPDistillationTrainer(
    model=student.model,
    teacher_model=tiny_language_model(seed=1, sharpness=8.0).model,
    args=TIPDistillationConfig(
        output_dir=out,
        token_rule=rule,
        selection_scope=scope,
        retention_ratio=0.3,
        per_device_train_batch_size=int(size),
        gradient_accumulation_steps=int(accumulation),
        generation_kwargs={"do_sample": False},  # each process has random numbers of its own
        max_steps=3,
        max_completion_length=12,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
    ),
    train_dataset=Dataset.from_dict(
        {"prompt": [problem["problem"] for problem in problems(8, split="train")]}
    ),
    processing_class=student.tokenizer,
)
trainer.train()
if trainer.accelerator.is_main_process:
    weights = {n: p.detach().contiguous() for n, p in student.model.named_parameters()}
    save_file(weights, Path(out) / "weights.safetensors")
    record = {"log": trainer.state.log_history, "processes": trainer.accelerator.num_processes}
    (Path(out) / "log.json").write_text(json.dumps(record))
