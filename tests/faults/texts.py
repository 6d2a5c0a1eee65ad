"""Files of prompts and of other tools' rollouts, spoiled in every way that `mutations` knows: each
is read to the end or refused in one line."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from faults.mutations import json_lines, mutate, spoil
from small_tokenizers import ALTERNATING_TEMPLATE, GENERATION_TEMPLATE, make_tokenizer

from tip_analysis.core.run_folder import create_run
from tip_analysis.rollouts.importers.formats import FORMATS, import_rollouts
from tip_analysis.rollouts.prompts import read_prompts
from tip_analysis.rollouts.rendering import render, student_messages
from tip_analysis.rollouts.stage import store_imported

USER, ASSISTANT = (
    {"role": "user", "content": "What is 12 + 34?"},
    {"role": "assistant", "content": "It is 46."},
)
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
TOOL = {"role": "tool", "content": "46"}

PROMPTS = [
    {"id": "a", "problem": "What is 12 + 34?", "answer": "46", "solution": "12 + 34 = 46"},
    {"id": 7, "messages": [{"role": "system", "content": "Be brief."}, USER], "answer": 46},
    {"prompt": [USER, ASSISTANT, USER], "reward_model": {"ground_truth": ["46"]}, "extra": [1]},
    {"prompt": "How many clips?", "metadata": {"level": {"a": 1}}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "12 + 34"}]}]},
]
RESPONSE = {
    "prompt_token_ids": [4, 5],
    "choices": [{"token_ids": [6, 2], "finish_reason": "stop", "text": "46"}],
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "native": [
        {"prompt_token_ids": [4, 5], "response_token_ids": [6, 2], "loss_mask": [True, False]},
        {
            "rollout_id": "p/0",
            "prompt_id": "p",
            "sample_index": 0,
            "batch_id": 0,
            "messages": json.dumps([USER]),
            "prompt_token_ids": [4, 5],
            "response_token_ids": [6, 2],
            "reward": 1.0,
            "seed": 0,
            "temperature": 1.0,
            "finish_reason": "stop",
            "ids_origin": "exact",
            "sampled_logprobs": [-0.1, -0.2],
            "planted_labels": ["plain", "fork"],
        },
    ],
    "text": [
        {"id": "a", "problem": "12 + 34", "response": "46", "reward": 1.0},
        {"messages": [USER], "completion": ["46", "47"], "reward": [1, 0]},
    ],
    "chat": [
        {"messages": [USER, ASSISTANT], "answer": "46", "id": "c"},
        {"messages": [USER, CALL, TOOL, ASSISTANT], "tools": [{"name": "add"}]},
        {"prompt": [USER], "completion": [ASSISTANT], "tools": "[]"},
        {"prompt": "12 + 34", "completion": " = 46"},
    ],
    "verl": [
        {"input": "user\n12 + 34\nassistant\n", "output": "46", "gts": "46", "score": 1, "step": 1},
        {"input": "12", "output": "46", "gts": None, "score": "np.float64(1.0)", "step": "2"},
    ],
    "trl": [
        {"step": 1, "prompt": "12 + 34", "completion": "46", "reward": 1.0, "advantage": 0.0},
        {"step": 1, "prompt": [USER], "completion": [ASSISTANT], "reward": 1.0, "advantage": 0.0},
    ],
    "lighteval": [
        {
            "doc": {
                "query": "12 + 34",
                "task_name": "t",
                "id": "1",
                "choices": ["46"],
                "gold_index": 0,
            },
            "metric": {"exact_match": 1.0},
            "model_response": {
                "text": ["46"],
                "input": "12 + 34",
                "input_tokens": [4, 5],
                "output_tokens": [[6, 2]],
            },
        }
    ],
    "lm-eval": [
        {
            "doc_id": 0,
            "filter": "strict",
            "target": "46",
            "arguments": {"gen_args_0": {"arg_0": "12 + 34", "arg_1": {"temperature": 0.7}}},
            "resps": [["46"]],
            "exact_match": 1.0,
            "metrics": ["exact_match"],
        },
        {"doc_id": 1, "arguments": [["12", {"do_sample": False}]], "resps": ["46"], "acc": 1},
    ],
    "deepplanning": [{"id": 3, "messages": [USER, CALL, TOOL, ASSISTANT]}],
    "openai": [
        {"messages": [USER], **RESPONSE},
        {"custom_id": "b", "body": {"messages": [USER], "temperature": 1.0, "seed": 1}},
        {
            "custom_id": "b",
            "response": {
                "status_code": 200,
                "body": {"choices": [{"message": ASSISTANT, "finish_reason": "stop"}]},
            },
        },
        {"request": {"prompt": "12 + 34"}, "choices": [{"text": "46"}]},
    ],
}
ROWS["vllm"] = ROWS["openai"]

TOKENIZERS = (
    make_tokenizer(),
    make_tokenizer(GENERATION_TEMPLATE),
    make_tokenizer(ALTERNATING_TEMPLATE),
    make_tokenizer(None),
)
NAMES = ("p.jsonl", "1²2.jsonl", "samples_t_2025-01-01T0.jsonl", "é\u202e[b].jsonl", "10.jsonl")

Case = tuple[str, Callable[[], None]]
"""A name, and what must end well or with an `InputError`."""


def prompt_cases(seed: int, number: int, folder: Path) -> Iterator[Case]:
    """Spoiled files of prompts, read and rendered."""
    for index in range(number):
        rng = random.Random(f"prompts {seed} {index}")
        file = _file(PROMPTS, rng, folder, f"prompts-{index}")
        tokenizer = rng.choice(TOKENIZERS)

        def check(file: Path = file, tokenizer: Any = tokenizer) -> None:
            for prompt in read_prompts(file):
                messages = student_messages(prompt)
                rendered = render(tokenizer, messages)
                json.dumps(messages, ensure_ascii=False).encode()
                assert rendered.token_ids
                (prompt.id + (prompt.answer or "") + (prompt.solution or "")).encode()

        yield f"prompts {index} {file.name}", check


def import_cases(seed: int, number: int, folder: Path) -> Iterator[Case]:
    """Spoiled files of each format, imported into a run."""
    for index in range(number):
        rng = random.Random(f"imports {seed} {index}")
        format = list(FORMATS)[index % len(FORMATS)]
        inside = "/trajectories" if format == "deepplanning" else ""
        file = _file(ROWS[format], rng, folder, f"imports-{index}{inside}")
        tokenizer = rng.choice(TOKENIZERS)

        def check(
            file: Path = file, format: str = format, tokenizer: Any = tokenizer, index: int = index
        ) -> None:
            source = file.parent if index % 3 == 0 and FORMATS[format].pattern == "*" else file
            rollouts, report = import_rollouts(
                format, [source], tokenizer=tokenizer, tokenizer_fingerprint="f"
            )
            run = create_run(folder / f"run-{index}")
            store_imported(run, rollouts, report, student="s", options={})
            assert run.rollouts().collect().height == rollouts.height

        yield f"{format} {index} {file.name}", check


def _file(rows: list[dict[str, Any]], rng: random.Random, folder: Path, name: str) -> Path:
    """One bad file, in a folder of its own."""
    rows = [rng.choice(rows) for _ in range(rng.choice([1, 2, 5]))]
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        at = rng.randrange(len(rows))
        changed = mutate(rows[at], rng)
        rows[at] = changed
    place = folder / name
    place.mkdir(parents=True)
    if rng.random() < 0.25 and (content := _parquet(rows)) is not None:
        file = place / "rows.parquet"
        file.write_bytes(spoil(content, rng) if rng.random() < 0.5 else content)
        return file
    file = place / rng.choice(NAMES)
    try:
        content = json_lines(rows, rng)
    except UnicodeEncodeError:
        content = json.dumps(rows[0]).encode()
    file.write_bytes(spoil(content, rng) if rng.random() < 0.4 else content)
    return file


def _parquet(rows: list[Any]) -> bytes | None:
    """Rows as a Parquet file, where Arrow can hold them."""
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(pa.Table.from_pylist(rows), sink)
    except (
        pa.ArrowException,
        ValueError,
        TypeError,
        OverflowError,
        AttributeError,
        RecursionError,
    ):
        return None
    return sink.getvalue().to_pybytes()
