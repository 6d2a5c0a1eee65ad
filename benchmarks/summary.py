"""The table of measured ratios in docs/reference/benchmarks.md, from the files in `results/`.

python benchmarks/summary.py

Prints the table in Markdown; `make docs` puts it into the page.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
LARGE_VOCABULARY = 151_936


def table(results: Path = RESULTS) -> str:
    """Every row of the table, in Markdown."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in results.glob("*.json")}
    rows = [
        *_scorer(found["scorer"]),
        *_logit_statistics(found["logit_statistics"]),
        *_memory(found["memory"]),
        *_prompt_sharing(found["prompt_sharing"]),
        *_gradients(found["gradients"], found["gradients_bfloat16"]),
        *_gradient_memory(found["gradients_memory"]),
        *_analysis(found["analysis"]),
        *_training_memory(found["training_memory"]),
        *_startup(found["startup"]),
    ]
    lines = ["| what | measured | script |", "| --- | --- | --- |"]
    lines += [f"| {what} | {value} | `{script}` |" for what, value, script in rows]
    return "\n".join(lines)


def engines_table(results: Path = RESULTS) -> str:
    """Tokens a second of each engine, in Markdown."""
    found = json.loads((results / "engines.json").read_text("utf-8"))
    names = {
        "own": "`hf`: this package's sampler",
        "vllm": "`vllm`",
        "generate": "transformers' `generate`",
        "continuous": "transformers' continuous batching",
    }
    lines = []
    if found["engines"]:
        lines += ["| engine | tokens | seconds | tokens/s | start | load of the machine |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        lines += [_engine_row(names[name], one) for name, one in found["engines"].items()]
        lines += [""]
    chain = found["chain"]
    times = ", ".join(f"`{name}` {taken:.0f} s" for name, taken in chain["seconds"].items())
    lines += [f"The chain, loading included, {chain['tokens']:,} tokens: {times};"]
    lines += [f"gap of log-probabilities {chain['logprob_gap_median']:.1g} nats in the median,"]
    lines += [f"{chain['logprob_gap_max']:.1g} at most."]
    return "\n".join(lines)


def _engine_row(name: str, found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"| {name} | does not run here: {found['failed']} | | | | |"
    return (
        f"| {name} | {found['tokens']:,} | {found['seconds']:.1f} | {found['tokens_per_s']:.1f} |"
        f" {found['startup_s']:.1f} s | {found['load_average']:.0f} |"
    )


def approximate_table(results: Path = RESULTS) -> str:
    """What a teacher's top k costs in accuracy, in Markdown."""
    found = json.loads((results / "approximate_teacher.json").read_text("utf-8"))
    head = "| column | mean, exact |" + "".join(f" k = {k} |" for k in found["k"])
    lines = [head, "| --- | --- |" + " --- |" * len(found["k"])]
    for name, first in next(iter(found["k"].values())).items():
        cells = [
            f" {one[name]['median']:.2g}, {one[name]['p99']:.2g} |" for one in found["k"].values()
        ]
        lines.append(f"| `{name}` | {first['exact_mean']:.3g} |" + "".join(cells))
    return "\n".join(lines)


Row = tuple[str, str, str]


def _scorer(found: dict[str, Any]) -> list[Row]:
    settings, extra = found["settings"], found["ratios"]
    tokens = settings["response_tokens"] * settings["rollouts"]
    blocks = [extra[f"per_metric_{size}: extra over the bodies"] for size in settings["blocks"]]
    what = (
        "heads and all statistics on top of the two bare bodies"
        f" ({settings['dtype']}, {tokens:,} response tokens)"
    )
    value = (
        f"+ {_percent(extra['ours: extra over the bodies'])} (one function per metric:"
        f" + {_percent(min(blocks))} at its best block size,"
        f" + {_percent(blocks[-1])} in blocks of {settings['blocks'][-1]})"
    )
    return [(what, value, "scorer.py")]


def _logit_statistics(found: dict[str, Any]) -> list[Row]:
    ratios = found["ratios"]
    [faster] = [
        value
        for name, value in ratios.items()
        if name.startswith("one function per metric, best") and name.endswith("over statistics")
    ]
    tensors = ratios["best one function per metric over statistics on tensors"]
    adding = (
        "the same against adding both logits up in float32: with one call each, and 32 rows at a"
        " time, in the cache"
    )
    whole = ratios["statistics over adding each array up in float32"]
    blocks = ratios["statistics over reading the arrays as float32 in blocks"]
    return [
        (
            "all statistics of a token against one function per metric at its best block size",
            f"{faster:.1f} × faster (without Numba: {tensors:.1f} ×)",
            "logit_statistics.py",
        ),
        (adding, f"{whole:.1f} ×, {blocks:.1f} × the time", "logit_statistics.py"),
    ]


def _memory(found: dict[str, Any]) -> list[Row]:
    extra = [(row["vocab_size"], row["extra_mb"]["compiled"]) for row in found["rows"]]
    large = [mb for size, mb in extra if size == LARGE_VOCABULARY]
    most = max(mb for _, mb in extra)
    return [
        (
            rf"extra memory over the bare passes, \|V\| = {LARGE_VOCABULARY:,}, whatever T and B",
            f"{min(large):.0f}–{max(large):.0f} MB ({most:.0f} MB in the process that compiles)",
            "memory.py",
        )
    ]


def _prompt_sharing(found: dict[str, Any]) -> list[Row]:
    settings, ratios = found["settings"], found["ratios"]
    ending = f": times faster with shared prompts of {settings['response_tokens']} tokens"
    what = (
        f"prompt sharing, {settings['rollouts']} rollouts a prompt, prompt as long as response:"
        " bodies, end to end"
    )
    return [
        (
            what,
            f"{ratios['bodies' + ending]:.2f} ×, {ratios['scoring' + ending]:.2f} × faster",
            "prompt_sharing.py",
        )
    ]


def _gradients(float32: dict[str, Any], bfloat16: dict[str, Any]) -> list[Row]:
    at = {row["length"]: row["speed_up"] for row in float32["rows"]}
    half = {row["length"]: row["speed_up"] for row in bfloat16["rows"]}
    probes = float32["settings"]["num_probes"]
    return [
        (
            f"{probes} probes against one backward pass a token, float32: T = 512, T = 2,048",
            f"{at[512]:.0f} ×, {at[2048]:.0f} × faster (bfloat16, T = 512: {half[512]:.0f} ×)",
            "gradients.py",
        )
    ]


def _gradient_memory(found: dict[str, Any]) -> list[Row]:
    row = next(row for row in found["rows"] if row["length"] == 512)
    value = (
        f"{row['peak_of_loss_gradients_over_parameters']:.1f} ×,"
        f" {row['peak_of_probes_over_parameters']:.1f} × (one forward pass's activations alone:"
        f" {row['activations_over_parameters']:.1f} ×)"
    )
    return [
        (
            "peak memory of gradients over the parameters, T = 512: ∇L, probes",
            value,
            "gradients.py --memory",
        )
    ]


def _analysis(found: dict[str, Any]) -> list[Row]:
    compared = [size for size in found["sizes"] if "times_faster" in size][-1]
    largest = found["sizes"][-1]
    seconds = median(one["seconds"] for one in largest["rounds"])
    peak = max(one["peak_mb"] for one in largest["rounds"])
    faster, memory = compared["times_faster"], compared["memory_ratio"]
    size = f"{compared['rows'] // 10**6} million rows"
    return [
        (
            f"quadrants, shares and correlations of {size} against pandas",
            f"{faster:.1f} × faster, {memory:.2f} of its memory",
            "analysis.py",
        ),
        (
            f"the same of {largest['rows'] // 10**6} million rows",
            f"{seconds:.1f} s, {peak:.0f} MB",
            "analysis.py",
        ),
    ]


def _training_memory(found: dict[str, Any]) -> list[Row]:
    longest = max(row["num_tokens"] for row in found["rows"])
    shares = {
        row["arm"]: row["share_of_full"] for row in found["rows"] if row["num_tokens"] == longest
    }
    most = max(share for arm, share in shares.items() if arm != "full_logits")
    what = (
        "peak memory of a training step at ρ = 0.1, above weights, gradients and optimizer, against"
        rf" full logits (\|V\| = {LARGE_VOCABULARY:,}, T = {longest:,})"
    )
    return [
        (
            what,
            f"{100 * shares['0.1']:.1f} % (at any ρ: at most {100 * most:.1f} %)",
            "training_memory.py",
        )
    ]


def _startup(found: dict[str, Any]) -> list[Row]:
    taken = {name: median(seconds) for name, seconds in found["seconds"].items()}
    return [
        (
            "start-up: `--help`, `import tip_analysis`",
            f"{taken['help']:.2f} s, {taken['import']:.2f} s",
            "startup.py",
        )
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


if __name__ == "__main__":
    print(table())
