"""The paper's own experiments as presets, and the arithmetic pair as the one that runs on a laptop.

A preset is all that `ablate` needs: models, prompts, evaluation sets, hyperparameters (Table 9) and
arms (Tables 3 to 8). What the paper does not state is marked as ours in the field's description. No
torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tip_analysis.analysis.arms import PAPER_ARMS, Arm, parse_arms
from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.names import Mode, Precision, Schedule, set_names
from tip_analysis.core.record import model_name
from tip_analysis.core.run_folder import RunLike, open_run
from tip_analysis.models.locating import ARITHMETIC_PAIR
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
    """Hyperparameters. The number of steps is one epoch: the paper does not state it."""
    max_prompt_tokens: int
    """Longest prompt; longer ones are left out."""
    max_new_tokens: int
    """Longest response."""
    num_samples: int = 16
    """k, evaluation samples a problem."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each arm (ours: over what the paper's ± is taken is not stated)."""
    mode: Mode | str = Mode.ON_POLICY
    """`offline` where multi-turn rollouts are given."""
    grader: str = "math"
    """Name of the grader."""
    template: str = "boxed"
    """The text around a problem."""
    paper_pair: str | None = None
    """Name of the pair in the paper's result tables."""
    note: str = ""
    """What a user must know."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Switches for the chat template, in training and evaluation."""
    num_prompts: int | None = None
    """How many of the prompts are trained on, the first ones; None for all."""
    epochs: int | None = None
    """Passes over the prompts, in place of the number of steps."""
    planned_as: Mapping[str, Any] = field(default_factory=dict)
    """What a plan takes for an argument that the user must give and has not given."""
    deviations: tuple[str, ...] = ()
    """Where it is not, or may not be, what the paper did."""
    environment: str | None = None
    """What students act in over several turns, and are graded by; None for single turns."""
    max_turns: int = 16
    """Turns in an environment."""

    def __post_init__(self) -> None:
        set_names(self, mode=Mode)

    def missing(self) -> list[str]:
        """Arguments that the user must give."""
        needed = [name for name in ("student", "teacher") if getattr(self, name) is None]
        if self.prompts is None and self.mode == Mode.ON_POLICY:
            needed.append("prompts")
        return needed if self.evaluation_sets else [*needed, "evaluation_prompts"]

    def thinking(self) -> str:
        """Whether the models think before they answer, in words."""
        switch = self.chat_template_kwargs.get("enable_thinking")
        if switch is None:
            return "off (the chat template has no switch for it, or its default is left)"
        return "on" if switch else "off"

    def steps_per_epoch(self, num_prompts: int) -> int:
        """Optimizer steps that show each prompt once; a remainder that fills no step is left
        out."""
        return max(1, num_prompts // self.training.prompts_per_step)

    def with_steps(self, num_prompts: int) -> "Preset":
        """The preset with its epochs over so many prompts as a number of steps."""
        if self.epochs is None:
            return self
        steps = self.epochs * self.steps_per_epoch(num_prompts)
        return replace(self, training=replace(self.training, num_steps=steps))

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
_PROMPTS = 13_918
"""80 % of DAPO-Math-17k, as the paper's base script takes it."""
_TABLE_9 = TrainingOptions(
    num_steps=_PROMPTS // 8,
    prompts_per_step=8,
    rollouts_per_prompt=16,
    learning_rate=1e-6,
    schedule=Schedule.COSINE,
    chunk_size=512,
    precision=Precision.BFLOAT16,
    gradient_checkpointing=True,
    micro_batch_size=1,
    dynamics_every=10,
)
_AGENTIC_NOTE = (
    "trains offline on multi-turn rollouts that you give: import them into the run folder first"
    " (`tip-analysis import`), with tool tokens masked, and score them"
)


_DEVIATIONS = (
    "a step is 8 prompts × 16 rollouts: our reading of Table 9",
    "seeds: ours; over what the paper's ± is taken is not stated",
    "cosine schedule to 0, no weight decay: not stated in the paper",
)
_MATH_DEVIATIONS = (
    *_DEVIATIONS,
    f"prompts: the first {_PROMPTS:,}; which 80 % of DAPO-Math-17k the paper takes is not stated",
    "one epoch: the paper does not state the number of steps",
)
_AGENTIC_DEVIATIONS = (
    *_DEVIATIONS,
    "rollouts are fixed and given: the paper's environment is not part of this package's preset",
    f"a plan without the run's rollouts counts {_TABLE_9.num_steps:,} steps for 15 epochs of them",
    "evaluation: the problems that you give; the paper's benchmark is DeepPlanning travel",
)


def _math_preset(name: str, student: str, teacher: str | None, pair: str, **changes: Any) -> Preset:
    preset = Preset(
        name,
        student,
        teacher,
        _DAPO,
        _MATH,
        _MATH_ARMS,
        _TABLE_9,
        2048,
        8192,
        paper_pair=pair,
        num_prompts=_PROMPTS,
        deviations=_MATH_DEVIATIONS,
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
        4096,
        24_576,
        mode=Mode.OFFLINE,
        paper_pair=pair,
        note=_AGENTIC_NOTE,
        chat_template_kwargs={"enable_thinking": True},
        epochs=15,
        planned_as={"evaluation_sets": ("DeepPlanning travel",)},
        deviations=_AGENTIC_DEVIATIONS,
    )


_FIELD_ARMS = (
    "all",
    "quadrant:Q1:1",
    "quadrant:Q3:1",
    "not:Q4:1",
    "random_window:0.5",
    "selectkd:1",
    "all,weighting=soft_or",
    "all,weighting=ta_opd",
    "all,weighting=iw_opd",
    "entropy_sampling:0.5,weighting=horvitz_thompson",
    "all,loss=k1",
    "all,loss=k1_centred",
    "all,loss=entropy_gated",
)
"""Weightings, estimators and quadrants beside training on every token."""
_ARITHMETIC = Preset(
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
)

_AGENT = Preset(
    name="arithmetic-agent",
    student="arithmetic-agent-student",
    teacher="arithmetic-agent-teacher",
    prompts="arithmetic-agent:train:512",
    evaluation_sets=("arithmetic-agent:held_out:64",),
    arms=("all", "q3:0.2:0.1", "random:0.2", "entropy:0.2", "soft_or:0.2"),
    training=TrainingOptions(
        num_steps=30,
        prompts_per_step=8,
        rollouts_per_prompt=2,
        learning_rate=1e-3,
        token_budget=8192,
    ),
    max_prompt_tokens=40,
    max_new_tokens=120,
    num_samples=8,
    grader="none",
    template="plain",
    note="runs on a laptop",
    environment="arithmetic-agent",
    max_turns=6,
)
"""Table 7's comparison on the embedded agent."""

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _ARITHMETIC,
        _AGENT,
        replace(_ARITHMETIC, name="arithmetic-field", arms=_FIELD_ARMS),
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
            chat_template_kwargs={"enable_thinking": False},
            planned_as={"teacher": "Qwen/Qwen3-8B"},
            deviations=(
                *_MATH_DEVIATIONS,
                "teacher: the one that you give; the paper's Qwen3-8B after GRPO is not public",
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
            note=(
                "the paper's teacher is a Qwen2.5-14B-Instruct-thinking, a reasoning model that is"
                " not public under that name; Qwen2.5-14B-Instruct stands in for it"
            ),
            deviations=(
                *_MATH_DEVIATIONS,
                "teacher: Qwen2.5-14B-Instruct for the Qwen2.5-14B-Instruct-thinking of the paper",
            ),
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
        _TABLE_9,
        num_steps=100,
        micro_batch_size=None,
        gradient_checkpointing=False,
        precision=Precision.FLOAT32,
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
    own = {entry.name for entry in fields(Preset)}
    ours = {entry.name for entry in fields(TrainingOptions)}
    if unknown := sorted(given.keys() - own - ours):
        raise UnknownNameError("option of a preset", unknown[0], sorted(own | ours))
    if "num_steps" in given and "epochs" not in given:
        preset = replace(preset, epochs=None)
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


def deviations_from_paper(preset: Preset) -> list[str]:
    """Where an experiment is not, or may not be, what the paper did, one line each."""
    if preset.name not in PRESETS or preset.paper_pair is None:
        return ["the pair is none of the paper's"]
    original = PRESETS[preset.name]
    changed = [
        f"{name.replace('_', ' ')}: {getattr(theirs, name)} in the preset, here"
        f" {getattr(ours, name)}"
        for theirs, ours in ((original, preset), (original.training, preset.training))
        for name in (entry.name for entry in fields(theirs) if entry.name != "training")
        if getattr(theirs, name) not in (None, (), getattr(ours, name))
    ]
    if preset.epochs is not None and original.epochs is None:
        changed.append(f"epochs: {preset.epochs} instead of the preset's number of steps")
    return [*preset.deviations, *changed]
