"""The paper's own experiments as presets, and the arithmetic pair as the one that runs on a laptop.

A preset is all that `ablate` needs: models, prompts, evaluation sets, hyperparameters (Table 9) and
arms (Tables 3 to 8). What the paper does not state is marked as ours in the field's description. No
torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tip_analysis.analysis.arms import PAPER_ARMS, Arm, parse_arms
from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.record import model_name
from tip_analysis.core.run_folder import RunLike, open_run
from tip_analysis.core.toy_pairs import toy_pairs
from tip_analysis.models.locating import ARITHMETIC_PAIR
from tip_analysis.rollouts.prompts import Prompt, is_file, read_prompts
from tip_analysis.training.options import TrainingOptions


@dataclass(frozen=True)
class Preset:
    """One experiment; fields that are None are arguments that the user must give."""

    name: str
    """What it is called on the command line."""
    student: str | None
    """Hub id or built-in name of the student."""
    teacher: str | None
    """Of the teacher; None where it is not public."""
    prompts: str | None
    """What is trained on: a file, a hub dataset, or problems of the arithmetic pair. None offline:
    the run's own rollouts."""
    evaluation_sets: tuple[str, ...]
    """Held-out problems; their ids get the set's name in front."""
    arms: tuple[str, ...]
    """Rules with their retention ratios, as `parse_arms` reads them."""
    training: TrainingOptions
    """Hyperparameters. The number of steps is ours: the paper does not state it."""
    max_prompt_tokens: int
    """Longest prompt; longer ones are left out."""
    max_new_tokens: int
    """Longest response."""
    num_samples: int = 16
    """k, evaluation samples a problem."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each arm (ours: over what the paper's ± is taken is not stated)."""
    mode: str = "on_policy"
    """`offline` where multi-turn rollouts are given."""
    grader: str = "math"
    """Name of the grader."""
    template: str = "boxed"
    """The text around a problem."""
    paper_pair: str | None = None
    """Name of the pair in the paper's result tables."""
    note: str = ""
    """What a user must know."""

    def missing(self) -> list[str]:
        """Arguments that the user must give."""
        needed = [name for name in ("student", "teacher") if getattr(self, name) is None]
        if self.prompts is None and self.mode == "on_policy":
            needed.append("prompts")
        return needed if self.evaluation_sets else [*needed, "evaluation_prompts"]

    def parsed_arms(self) -> list[Arm]:
        """Its arms."""
        return parse_arms(self.arms, [])


_DAPO = "open-r1/DAPO-Math-17k-Processed:all:train"
_MATH = ("HuggingFaceH4/MATH-500:test", "HuggingFaceH4/aime_2024:train", "math-ai/aime25:test")
_MATH_ARMS = (
    "all",
    "entropy_sampling:0.5:0.2:0.1",
    "q3:0.2:0.1",
    "soft_or:0.5:0.2",
    "soft_or_bottom:0.5",
)
_AGENTIC_ARMS = ("all", "entropy:0.5:0.2", "q3:0.2", "soft_or:0.5:0.2")
_TABLE_9 = TrainingOptions(
    num_steps=100,
    prompts_per_step=8,
    rollouts_per_prompt=16,
    learning_rate=1e-6,
    schedule="cosine",
    chunk_size=512,
    precision="bfloat16",
    gradient_checkpointing=True,
    micro_batch_size=1,
)
_AGENTIC_NOTE = (
    "trains offline on multi-turn rollouts that you give: import them into the run folder first"
    " (`tip-analysis import`), with tool tokens masked, and score them"
)


def _math_preset(name: str, student: str, teacher: str | None, pair: str, **changes: Any) -> Preset:
    preset = Preset(
        name, student, teacher, _DAPO, _MATH, _MATH_ARMS, _TABLE_9, 2048, 8192, paper_pair=pair
    )
    return replace(preset, **changes)


def _agentic_preset(name: str, teacher: str, pair: str) -> Preset:
    arms, training = _AGENTIC_ARMS, _TABLE_9
    return Preset(
        name,
        "Qwen/Qwen3-1.7B",
        teacher,
        None,
        (),
        arms,
        training,
        2048,
        8192,
        mode="offline",
        paper_pair=pair,
        note=_AGENTIC_NOTE,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="arithmetic",
            student="arithmetic-student",
            teacher="arithmetic-teacher",
            prompts="arithmetic:train:1024",
            evaluation_sets=("arithmetic:held_out:128",),
            arms=PAPER_ARMS,
            training=TrainingOptions(num_steps=60, learning_rate=1e-3, token_budget=4096),
            max_prompt_tokens=10,
            max_new_tokens=118,
            grader="exact",
            template="plain",
            note="runs on a laptop",
        ),
        _math_preset(
            "qwen3-8b-4b",
            "Qwen/Qwen3-4B",
            None,
            "Qwen3-8B(GRPO)->Qwen3-4B",
            arms=(*_MATH_ARMS, "divergence:0.5:0.1"),
            note=(
                "the paper's teacher is a Qwen3-8B after GRPO, which is not public: give your own"
                " with --teacher"
            ),
        ),
        _math_preset(
            "llama-70b-8b",
            "meta-llama/Llama-3.1-8B-Instruct",
            "meta-llama/Llama-3.3-70B-Instruct",
            "Llama-3.3-70B-Instruct->Llama-3.1-8B-Instruct",
            training=replace(_TABLE_9, learning_rate=3e-7),
        ),
        _math_preset(
            "qwen2.5-14b-1.5b",
            "Qwen/Qwen2.5-1.5B-Instruct",
            "Qwen/Qwen2.5-14B-Instruct",
            "Qwen2.5-14B-Instruct->Qwen2.5-1.5B-Instruct",
        ),
        _agentic_preset("qwen3-14b-1.7b-agentic", "Qwen/Qwen3-14B", "Qwen3-14B->Qwen3-1.7B"),
        _agentic_preset("qwen3-32b-1.7b-agentic", "Qwen/Qwen3-32B", "Qwen3-32B->Qwen3-1.7B"),
    )
}
"""Every preset by name."""


def resolve_preset(name: str, **overrides: Any) -> Preset:
    """A preset with what the user gave in place of its own; an override that is None changes
    nothing.

    Args:
        name: name of a preset.
        overrides: fields of `Preset` or of `TrainingOptions`.

    Raises:
        UnknownNameError: no such preset or field.
        OptionError: an argument that this preset needs is missing.
    """
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return change_preset(PRESETS[name], **overrides)


def pair_preset(student: str | None, teacher: str | None, template: str = "boxed") -> Preset:
    """An experiment on a pair of the user's own, with the hyperparameters of Table 9 and the arms
    that the claims need."""
    training = replace(
        _TABLE_9, micro_batch_size=None, gradient_checkpointing=False, precision="float32"
    )
    return Preset(
        "your own pair",
        student,
        teacher,
        None,
        (),
        PAPER_ARMS,
        training,
        2048,
        512,
        template=template,
    )


def experiment(run: RunLike, preset: "str | Preset | None" = None, **changes: Any) -> Preset:
    """What an ablation in a run folder trains and judges: the preset that is named, or else the
    run's own pair, with the user's choices in place of its own.

    Args:
        run: the run folder, which need not exist.
        preset: a preset's name, or a preset.
        changes: fields of `Preset` or of `TrainingOptions`; None changes nothing.

    Raises:
        UnknownNameError: no such preset or field.
        OptionError: an argument that the preset needs is missing.
    """
    if isinstance(preset, Preset):
        return change_preset(preset, **changes)
    if preset is not None:
        return resolve_preset(preset, **changes)
    stages = open_run(run).stages() if (Path(run) / "run.json").is_file() else {}
    scored = stages.get("score", {}).get("config", {})
    names: list[Any] = [
        changes.get(role) or model_name(scored.get(role)) for role in ("student", "teacher")
    ]
    if tuple(names) == ARITHMETIC_PAIR and changes.get("prompts") is None:
        return resolve_preset("arithmetic", **changes)
    return change_preset(pair_preset(*names), **changes)


def change_preset(preset: Preset, **overrides: Any) -> Preset:
    """A preset with some of its fields, or of its training's, replaced; None changes nothing.

    Raises:
        UnknownNameError: no such field.
        OptionError: an argument that the preset needs is missing.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    own = {field.name for field in fields(Preset)}
    ours = {field.name for field in fields(TrainingOptions)}
    if unknown := sorted(given.keys() - own - ours):
        raise UnknownNameError("option of a preset", unknown[0], sorted(own | ours))
    training = replace(
        given.pop("training", preset.training),
        **{key: given.pop(key) for key in sorted(given.keys() & ours)},
    )
    preset = replace(preset, training=training, **given)
    if missing := preset.missing():
        reason = f" ({preset.note})" if preset.note else ""
        raise OptionError(
            f"{preset.name} needs"
            f" {', '.join('--' + key.replace('_', '-') for key in missing)}{reason}"
        )
    return preset


def load_prompts(source: str, *, limit: int | None = None) -> list[Prompt]:
    """The prompts of a source: `arithmetic:SPLIT:NUMBER`, a file, or a hub dataset.

    Args:
        source: where they are.
        limit: the first so many only.

    Raises:
        PromptFileError: they cannot be read.
        OptionError: a malformed arithmetic source.
    """
    if (pair := toy_pairs().get(source.split(":", maxsplit=1)[0])) is not None:
        return [
            Prompt(row["id"], problem=row["problem"], answer=row["answer"])
            for row in pair.prompts(source)
        ][:limit]
    return read_prompts(source, limit=limit)


def check_prompts(source: str) -> None:
    """Refuse a source of prompts that cannot be read: an arithmetic source or a file by its first
    prompt, a hub dataset by its name only.

    Raises:
        PromptFileError: there is no such file, or its first row is no prompt.
        OptionError: a malformed arithmetic source.
    """
    if source.split(":", maxsplit=1)[0] in toy_pairs() or is_file(source):
        load_prompts(source, limit=1)


def load_evaluation_sets(sources: Sequence[str], *, limit: int | None = None) -> list[Prompt]:
    """The problems of several sets, each with the name of its benchmark; with more than one set,
    ids have the name in front.

    Raises:
        OptionError: a set is named twice.
    """
    names = benchmark_names(sources)
    prefix = "{}/" if len(names) > 1 else ""
    return [
        replace(prompt, id=prefix.format(name) + prompt.id, benchmark=name)
        for source, name in zip(sources, names, strict=True)
        for prompt in load_prompts(source, limit=limit)
    ]


def benchmark_names(sources: Sequence[str]) -> list[str]:
    """What the benchmark of each source is called: its short name, or, where two would have the
    same, the whole source.

    Raises:
        OptionError: a source is named twice.
    """
    if twice := [source for source in sources if list(sources).count(source) > 1]:
        raise OptionError(f"the evaluation set {twice[0]!r} is named twice")
    short = [short_name(source) for source in sources]
    return [
        source if short.count(name) > 1 else name
        for source, name in zip(sources, short, strict=True)
    ]


def short_name(source: str) -> str:
    """The name of a set of prompts as it stands before ids: `MATH-500` of
    `HuggingFaceH4/MATH-500:test`."""
    stem = source.split(":", maxsplit=1)[0].rstrip("/").rsplit("/", maxsplit=1)[-1]
    return stem.removesuffix(".jsonl").removesuffix(".parquet")
