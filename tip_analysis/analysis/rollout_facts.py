"""What is known of each rollout besides its tokens, and how many rollouts are unusual in a way that
a reader of numbers must know."""

from dataclasses import dataclass

import polars as pl

from tip_analysis.core.names import FinishReason, IdsOrigin, TemplateOrigin
from tip_analysis.core.run_folder import Run

_FACTS = {
    "rollout_id": pl.String,
    "prompt_id": pl.String,
    "prompt_text": pl.String,
    "finish_reason": pl.String,
    "temperature": pl.Float32,
    "top_p": pl.Float32,
    "top_k": pl.Int32,
    "reward": pl.Float32,
    "ground_truth": pl.String,
    "ids_origin": pl.String,
    "template_origin": pl.String,
    "source": pl.String,
}


@dataclass(frozen=True)
class RolloutCounts:
    """Rollouts, and how many of them are out of the ordinary."""

    num_rollouts: int
    num_retokenized: int
    """Imported as text and tokenised again."""
    num_reapplied: int
    """With the chat template applied again."""
    num_tempered: int
    """Sampled at another temperature than 1, or from a truncated distribution."""
    num_of_unknown_temperature: int
    num_cut_off: int
    """Ended by the token limit."""
    num_empty: int
    """Without a response token."""


def rollout_facts(run: Run) -> pl.DataFrame:
    """The columns of a run's rollouts without the token lists, and num_tokens; no row where the run
    has no rollouts."""
    if not run.has("rollouts"):
        return pl.DataFrame(schema={**_FACTS, "num_tokens": pl.UInt32})
    lengths = pl.col("response_token_ids").list.len().alias("num_tokens")
    return run.rollouts().select(*_FACTS, lengths).collect()


def count_rollouts(rollouts: pl.DataFrame) -> RolloutCounts:
    """Count what is unusual among `rollout_facts`."""
    tempered = (pl.col("temperature") != 1.0) | (pl.col("top_p") < 1.0) | (pl.col("top_k") > 0)
    conditions = {
        "num_retokenized": _is("ids_origin", IdsOrigin.RETOKENIZED),
        "num_reapplied": _is("template_origin", TemplateOrigin.REAPPLIED),
        "num_tempered": tempered,
        "num_of_unknown_temperature": pl.col("temperature").is_null(),
        "num_cut_off": _is("finish_reason", FinishReason.LENGTH),
        "num_empty": pl.col("num_tokens") == 0,
    }
    counts = {name: rollouts.filter(found).height for name, found in conditions.items()}
    return RolloutCounts(rollouts.height, **counts)


def _is(column: str, value: str) -> pl.Expr:
    return pl.col(column).cast(pl.String) == str(value)
