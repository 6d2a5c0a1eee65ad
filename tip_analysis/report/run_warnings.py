"""What a reader must know before trusting a run's numbers: counts of what is unusual, in
sentences."""

import polars as pl

from tip_analysis.analysis.quadrants import warn_about_cuts
from tip_analysis.analysis.run_view import RunView
from tip_analysis.analysis.screening import warnings_of as artefact_warnings
from tip_analysis.core.text import visible
from tip_analysis.core.words import count, listed, percent, plural, sentence


def warnings_of(view: RunView) -> list[str]:
    """What is unusual about a run, in sentences."""
    texts = [*_table_warnings(view), *_rollout_warnings(view)]
    if (cut := warn_about_cuts(view.raw, view.cuts)) is not None:
        texts.append(sentence(cut.message))
    texts += [sentence(text) for text in artefact_warnings(view.screened)]
    if view.cuts.paper_ranges_met is not None:
        verdict = "they do here" if view.cuts.paper_ranges_met else "the data do not allow it here"
        texts.append(
            "The cuts are the preset `paper`, which looks for shares inside the paper’s ranges "
            f"({verdict}): shares under it are no evidence that this pair is like the paper’s."
        )
    return texts


def _table_warnings(view: RunView) -> list[str]:
    texts = []
    if altered := view.run.altered_shards():
        texts.append(
            f"{plural(len(altered), 'shard')} changed since written"
            f" ({visible(listed(altered[:5]), 300)}): numbers may not belong to the recorded"
            " configuration. Run the stage again to make them again."
        )
    counted = view.population
    if counted.num_infinite_reverse or counted.num_infinite_forward:
        texts.append(
            f"{count(counted.num_infinite_reverse)} reverse and"
            f" {count(counted.num_infinite_forward)} forward divergences are +∞ (a model rules a"
            " token out entirely): they count as high, and take no part in means, cuts and"
            " normalisation."
        )
    if bounds := view.stages.get("score", {}).get("config", {}).get("lower_bounds"):
        texts.append(
            f"The teacher was stored as its top tokens and the mass of the rest: {listed(bounds)}"
            " are lower bounds, and columns without such a bound are empty."
        )
    if (clip := view.options.taxonomy.divergence_clip) is not None:
        texts.append(
            f"Divergence is clipped at its {clip:g} quantile before min-max"
            " (off in the paper): Soft-OR then ranks the tokens below the clip more apart, and"
            " those above it equal."
        )
    unfinished = [key for key, stage in view.stages.items() if not stage.get("finished")]
    if unfinished:
        texts.append(
            f"Not finished when this was made: {listed(unfinished)}. The numbers are those of the"
            " shards written so far."
        )
    return texts


def _rollout_warnings(view: RunView) -> list[str]:
    rollouts, texts = view.rollouts, []
    total = rollouts.height
    retokenized = rollouts.filter(pl.col("ids_origin") == "retokenized").height
    if retokenized:
        texts.append(
            f"{count(retokenized)} of {plural(total, 'rollout')} were imported as text and"
            " tokenised again: their token ids may differ from those that the author sampled."
        )
    if reapplied := rollouts.filter(pl.col("template_origin") == "reapplied").height:
        texts.append(
            f"{plural(reapplied, 'rollout')} had the chat template applied again: markers may"
            " differ from the author’s."
        )
    tempered = rollouts.filter(
        (pl.col("temperature") != 1.0) | (pl.col("top_p") < 1.0) | (pl.col("top_k") > 0)
    ).height
    if tempered:
        texts.append(
            f"{count(tempered)} of {plural(total, 'rollout')} were sampled at another temperature"
            " than 1 or from a truncated distribution: statistics are those of temperature 1, and"
            " the tokens are not a sample from it."
        )
    unknown = rollouts.filter(pl.col("temperature").is_null()).height
    if unknown:
        texts.append(f"The sampling temperature of {plural(unknown, 'rollout')} is not known.")
    cut_off = rollouts.filter(pl.col("finish_reason").cast(pl.String) == "length").height
    if cut_off:
        texts.append(
            f"{count(cut_off)} of {plural(total, 'rollout')} reached the token limit before they"
            f" ended ({percent(cut_off / total)})."
        )
    if empty := rollouts.filter(pl.col("num_tokens") == 0).height:
        texts.append(
            f"{plural(empty, 'rollout')} {'has' if empty == 1 else 'have'} no response token, and"
            " no row below."
        )
    return texts
