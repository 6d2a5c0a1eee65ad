"""Columns of the token table by how they are compared: to the bit, or to rounding."""

import polars as pl

from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.schema import TokenTable

FLOATS = [name for name, dtype in polars_schema(TokenTable).items() if dtype == pl.Float32]
EXACT = [
    "rollout_id",
    "prompt_id",
    "position",
    "batch_id",
    "token_id",
    "token",
    "loss_mask",
    "turn",
    "segment",
    "call_part",
    "planted_label",
]
