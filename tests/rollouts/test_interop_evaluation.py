"""Files that lm-evaluation-harness and lighteval themselves write, each in an environment of its
own (`make interop-evaluation`)."""

import json
import os
import subprocess
from pathlib import Path

import polars as pl
import pytest
from importing import CHAT, imported

ROOT = Path(__file__).parents[2]
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}


def written_by(tool: str, script: str, folder: Path) -> None:
    place = os.environ.get(f"TIP_{tool.upper()}_PYTHON", ROOT / f".venv-{tool}" / "bin" / "python")
    if not Path(place).exists():
        pytest.skip(f"{tool} has no environment here: make interop-evaluation")
    command = [str(place), str(ROOT / "tests" / script), str(ROOT / "tests"), str(folder)]
    own = {"HF_HOME": str(folder / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        command, check=False, env=os.environ | QUIET | own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    written_by("lmeval", "write_with_lm_eval.py", folder)
    return folder / "results"


@pytest.mark.interop
@pytest.mark.timeout(900)
def test_samples_of_lm_eval(lm_eval):
    (path,) = lm_eval.rglob("samples_tiny_sums_*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["filter"] for line in lines} == {"whole", "number"}
    rows, report = imported("lm-eval", path)
    assert len(rows) == 5
    assert report.merged_rows == 5  # two filters of each document
    by_id = {line["doc_id"]: line for line in lines if line["filter"] == "whole"}
    for row, line in zip(rows, by_id.values(), strict=True):
        assert row["prompt_text"] == line["arguments"]["gen_args_0"]["arg_0"]
        assert row["response_text"] == line["resps"][0][0]
        assert row["ground_truth"] == line["target"]
        assert row["reward"] == line["exact_match"]
        assert row["temperature"] == pytest.approx(0.8)
        assert row["top_p"] == pytest.approx(0.95)
        assert CHAT.decode(row["response_token_ids"]) == row["response_text"]
    assert report.ids_retokenized == 5
    numbers, _ = imported("lm-eval", path, filter_name="number")
    strict = {line["doc_id"]: line["exact_match"] for line in lines if line["filter"] == "number"}
    assert [row["reward"] for row in numbers] == list(strict.values())


@pytest.mark.interop
@pytest.mark.timeout(900)
def test_samples_of_lm_eval_with_a_chat_template(lm_eval):
    (path,) = lm_eval.rglob("samples_tiny_chat_*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows, _ = imported("lm-eval", path)
    assert len(rows) == 5
    for row, line in zip(rows, lines[:5], strict=False):
        assert row["prompt_text"].endswith("<|im_start|>assistant\n")
        assert row["prompt_text"] == line["arguments"]["gen_args_0"]["arg_0"]


@pytest.mark.interop
@pytest.mark.timeout(900)
def test_details_of_lighteval(tmp_path):
    written_by("lighteval", "write_with_lighteval.py", tmp_path)
    (path,) = (tmp_path / "results").rglob("details_*.parquet")
    details = pl.read_parquet(path)
    rows, report = imported("lighteval", path)
    assert len(rows) == details.height == 5
    for row, response, doc in zip(rows, details["model_response"], details["doc"], strict=True):
        assert row["prompt_token_ids"] == response["input_tokens"]
        assert row["response_token_ids"] == response["output_tokens"][0]
        # what the model was shown, which lighteval has cut from the left here
        assert row["prompt_text"] == CHAT.decode(response["input_tokens"])
        assert doc["query"][-6:] in row["prompt_text"]
        assert row["ground_truth"] in [f"{2 * i}" for i in range(5)]
    assert report.ids_exact == 5
    rewards = [metric["em"] for metric in details["metric"]]
    assert [row["reward"] for row in rows] == rewards
