"""Files that other tools themselves write, in an environment of their own (`make interop`)."""

import os
import subprocess
from pathlib import Path

import polars as pl
import pytest
from importing import imported

ROOT = Path(__file__).parents[2]
TRL = Path(os.environ.get("TIP_TRL_PYTHON", ROOT / ".venv-interop" / "bin" / "python"))


@pytest.mark.interop
@pytest.mark.timeout(900)
def test_completions_that_trl_logs(tmp_path):
    if not TRL.exists():
        pytest.skip("TRL has no environment here: make interop")
    writer = ROOT / "tests" / "write_with_trl.py"
    command = [str(TRL), str(writer), str(ROOT / "tests"), str(tmp_path)]
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, check=False, env=os.environ | quiet, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows, report = imported("trl", tmp_path)
    logged = pl.read_parquet(sorted(tmp_path.rglob("completions_*.parquet")))
    assert [row["step"] for row in rows] == logged["step"].to_list()
    assert [row["reward"] for row in rows] == logged["accuracy"].to_list()
    texts = [messages[0]["content"] for messages in logged["completion"]]
    assert [row["response_text"] for row in rows] == texts  # nothing that the student never wrote
    assert report.template_reapplied == report.ends_unknown == len(rows) == 16
    assert any("not taken for rewards (log_extra): length_seen" in note for note in report.notes)
