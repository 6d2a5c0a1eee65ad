"""What a reader must know before trusting a run's numbers: counts of what is unusual, in
sentences."""

from collections.abc import Iterator

from tip_analysis.analysis.confidence import warn_about_confidence
from tip_analysis.analysis.logprob_gap import WARN_FROM_NATS, gap_in_words
from tip_analysis.analysis.quadrants import warn_about_cuts
from tip_analysis.analysis.rollout_facts import RolloutCounts, count_rollouts
from tip_analysis.analysis.run_view import RunView
from tip_analysis.analysis.screening import warnings_of as artefact_warnings
from tip_analysis.core.text import visible
from tip_analysis.core.words import count, listed, percent, plural, sentence


def warnings_of(view: RunView) -> list[str]:
    """What is unusual about a run, in sentences."""
    texts = [*_table_warnings(view), *_rollout_warnings(count_rollouts(view.rollouts))]
    if (cut := warn_about_cuts(view.raw, view.cuts)) is not None:
        texts.append(sentence(cut.message))
    if (unsure := warn_about_confidence(view.raw, view.cuts)) is not None:
        texts.append(sentence(unsure.message))
    texts += [sentence(text) for text in artefact_warnings(view.screened)]
    if view.cuts.paper_ranges_met is not None:
        verdict = "they do here" if view.cuts.paper_ranges_met else "the data do not allow it here"
        texts.append(
            "The cuts are the preset `paper`, which looks for shares inside the paper’s ranges "
            f"({verdict}): shares under it are no evidence that this pair is like the paper’s."
        )
    return texts


def _table_warnings(view: RunView) -> list[str]:
    makers = (_altered, _infinite, _bounded, _of_another_engine, _clipped, _unfinished)
    return [text for make in makers if (text := make(view))]


def _altered(view: RunView) -> str:
    if not (altered := view.run.altered_shards()):
        return ""
    return (
        f"{plural(len(altered), 'shard')} changed since written"
        f" ({visible(listed(altered[:5]), 300)}): numbers may not belong to the recorded"
        " configuration. Run the stage again to make them again."
    )


def _infinite(view: RunView) -> str:
    counted = view.population
    if not (counted.num_infinite_reverse or counted.num_infinite_forward):
        return ""
    return (
        f"{count(counted.num_infinite_reverse)} reverse and"
        f" {count(counted.num_infinite_forward)} forward divergences are +∞ (a model rules a"
        " token out entirely): they count as high, and take no part in means, cuts and"
        " normalisation."
    )


def _bounded(view: RunView) -> str:
    if not (bounds := view.stages.get("score", {}).get("config", {}).get("lower_bounds")):
        return ""
    return (
        "Approximate: top-k. Of the teacher its top tokens are known, and the mass of the rest:"
        f" {listed(bounds)} are lower bounds, and columns without such a bound are empty."
    )


def _of_another_engine(view: RunView) -> str:
    summary = view.stages.get("score", {}).get("summary", {})
    is_wide = summary.get("logprob_gap_median", 0.0) > WARN_FROM_NATS
    return f"{sentence(gap_in_words(summary))}" if is_wide else ""


def _clipped(view: RunView) -> str:
    if (clip := view.options.taxonomy.divergence_clip) is None:
        return ""
    return (
        f"Divergence is clipped at its {clip:g} quantile before min-max"
        " (off in the paper): Soft-OR then ranks the tokens below the clip more apart, and"
        " those above it equal."
    )


def _unfinished(view: RunView) -> str:
    unfinished = [key for key, stage in view.stages.items() if not stage.get("finished")]
    if not unfinished:
        return ""
    return (
        f"Not finished when this was made: {listed(unfinished)}. The numbers are those of the"
        " shards written so far."
    )


def _rollout_warnings(counted: RolloutCounts) -> list[str]:
    total = plural(counted.num_rollouts, "rollout")
    makers = (_imported_as_text, _tempered, _short_or_cut_off)
    return [text for make in makers for text in make(counted, total)]


def _imported_as_text(counted: RolloutCounts, total: str) -> Iterator[str]:
    if number := counted.num_retokenized:
        yield (
            f"{count(number)} of {total} were imported as text and tokenised again: their token ids"
            " may differ from those that the author sampled."
        )
    if number := counted.num_reapplied:
        yield (
            f"{plural(number, 'rollout')} had the chat template applied again: markers may differ"
            " from the author’s."
        )


def _tempered(counted: RolloutCounts, total: str) -> Iterator[str]:
    if number := counted.num_tempered:
        yield (
            f"{count(number)} of {total} were sampled at another temperature than 1 or from a"
            " truncated distribution: statistics are those of temperature 1, and the tokens are not"
            " a sample from it."
        )
    if number := counted.num_of_unknown_temperature:
        yield f"The sampling temperature of {plural(number, 'rollout')} is not known."


def _short_or_cut_off(counted: RolloutCounts, total: str) -> Iterator[str]:
    if number := counted.num_cut_off:
        yield (
            f"{count(number)} of {total} reached the token limit before they ended"
            f" ({percent(number / counted.num_rollouts)})."
        )
    if number := counted.num_empty:
        yield (
            f"{plural(number, 'rollout')} {'has' if number == 1 else 'have'} no response token, and"
            " no row below."
        )
