"""TRL's own IW-OPD and GKD on the same batch. Marked `interop`: `make interop` makes the
environment; `TIP_TRL_PYTHON` may name another one's Python."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from tip_analysis.analysis.weightings import weigh_tokens
from tip_analysis.core.loss_settings import LossSettings
from tip_analysis.logits.row_statistics import token_statistics
from tip_analysis.logits.training_losses import training_loss

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("TIP_TRL_PYTHON", ROOT / ".venv-interop/bin/python"))

pytestmark = pytest.mark.interop


def test_prefix_weights_and_mixtures_are_those_of_trl() -> None:
    if not PYTHON.is_file():
        pytest.skip(f"{PYTHON} does not exist: make interop makes it")
    rng = np.random.default_rng(0)
    shape = (3, 11)
    student, teacher = rng.normal(size=(2, *shape, 17)) * 2
    ids, written = rng.integers(0, 17, shape), rng.random(shape) < 0.8
    batch = {
        "student": student.tolist(),
        "teacher": teacher.tolist(),
        "token_ids": ids.tolist(),
        "written": written.tolist(),
    }
    script = ROOT / "tests/weigh_with_trl.py"
    done = subprocess.run(
        [PYTHON, script], input=json.dumps(batch), capture_output=True, text=True, check=True
    )
    theirs = json.loads(done.stdout)
    flat = {"student": torch.tensor(student), "teacher": torch.tensor(teacher)}
    flat = {name: rows.reshape(-1, 17) for name, rows in flat.items()}
    columns = token_statistics(**flat, token_ids=torch.tensor(ids.reshape(-1)))
    tokens = pl.DataFrame(
        {
            "rollout_id": [f"r{i}" for i in range(shape[0]) for _ in range(shape[1])],
            "position": list(range(shape[1])) * shape[0],
            "loss_mask": written.reshape(-1),
            "student_logprob": columns["student_logprob"].numpy(),
            "teacher_logprob": columns["teacher_logprob"].numpy(),
        }
    )
    found = weigh_tokens(tokens, weighting="iw_opd").collect()["weight"].to_numpy()
    mask = written.reshape(-1)
    np.testing.assert_allclose(found[mask], np.reshape(theirs["weights"], -1)[mask], rtol=1e-9)
    for beta, value in theirs["jsd"].items():
        chosen = LossSettings(jsd_beta=float(beta))
        ours = training_loss("jsd", **flat, settings=chosen)[torch.tensor(mask)]
        # TRL sums over tokens and vocabulary and divides by the number of written tokens
        assert float(ours.mean()) == pytest.approx(value, rel=1e-9)
