"""Completions as TRL logs them, by its own interpreter: TESTS_FOLDER OUTPUT_FOLDER."""

import sys

sys.path.insert(0, sys.argv[1])
import torch
from datasets import Dataset
from small_tokenizers import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

out = sys.argv[2]
tok = make_tokenizer()
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
marks = {"bos_token_id": 0, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **sizes, **heads, **marks))


def accuracy(completions, log_extra=None, **_):
    texts = [c[0]["content"] for c in completions]
    if log_extra:
        log_extra("length_seen", [float(len(t)) for t in texts])
        log_extra("note", texts)
    return [float(len(t) % 3) for t in texts]


questions = [{"role": "user", "content": f"What is {i} + {i}?"} for i in range(4)]
data = Dataset.from_list([{"prompt": [question]} for question in questions])
args = GRPOConfig(
    output_dir=out,
    per_device_train_batch_size=8,
    num_generations=4,
    max_steps=2,
    max_completion_length=12,
    log_completions=True,
    report_to=[],
    use_cpu=True,
    logging_steps=1,
    save_strategy="no",
    disable_tqdm=True,
)
GRPOTrainer(
    model=model, processing_class=tok, reward_funcs=[accuracy], args=args, train_dataset=data
).train()
