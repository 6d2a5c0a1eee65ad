"""What an ablation will take: tokens, memory and device hours, estimated before anything is loaded.

Estimates, to within a factor of two or so: they say whether a study fits a machine and a week, not
when it ends. Let P be parameters, L layers, D hidden width, K key-value width (heads × head size),
I the feed-forward width, V the shared vocabulary, c the rows of logits in a chunk, n the tokens of
one micro-batch (longest prompt and response × rollouts).

Memory of a training process, bytes:
    weights       4 P_S (float32; with LoRA 2 P_S), and 2 P_S for the bfloat16 copies that autocast
    keeps gradients     4 a trainable parameter
    optimizer     8 a trainable parameter (two float32 moments)
    teacher       2 P_T
    activations   checkpointed: 2 n D L (a layer's input each) + one layer; otherwise L layers;
                  a layer: 2 n (8 D + 4 K + 3 I)
    logits        10 c V · 4: both models' logits, their exponentials, what the divergence and its
    gradient need head gradient 8 V D, of one chunk and of all so far, where the head is trained
    sampler       4 L K · b, b tokens in flight (`token_budget` of the sampler): keys and values,
    bfloat16
The peak is what stays (weights, gradients, optimizer, teacher) and the larger of sampler and
(activations, logits, head).

Work on one step of t response tokens and p prompt tokens, floating-point operations:
    training      6 P_S (t + p), 8 P_S with checkpointing; scoring 2 P_T (t + p), and 2 P_S more
    with several micro-batches sampling      2 P_S t, or, where memory is slower, the time to read
    the weights (2 P_S bytes) and the keys and values once
                  for each of the longest response's positions
Time is work over the device's peak at the utilisation given, plus evaluation, which is sampling
alone.
"""

from dataclasses import dataclass

import polars as pl

from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import Mode, Precision
from tip_analysis.training.ablation.accelerators import Device, Machine
from tip_analysis.training.ablation.presets import Preset, deviations_from_paper


@dataclass(frozen=True)
class ModelShape:
    """What sets a decoder's size: the fields of its config."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    attention_bias: bool = False
    """Biases of query, key and value (Qwen2.5)."""
    query_key_norm: bool = False
    """Norms of query and key heads (Qwen3)."""

    @property
    def num_parameters(self) -> int:
        """P: embeddings, blocks (attention, gated feed-forward, two norms), final norm, and a head
        of its own if untied."""
        D, I = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = D * (query + 2 * key) + query * D
        attention += (
            query + 2 * key
        ) * self.attention_bias + 2 * self.head_dim * self.query_key_norm
        block = attention + 3 * D * I + 2 * D
        embeddings = self.vocab_size * D * (1 if self.tied else 2)
        return embeddings + self.num_layers * block + D

    @property
    def kv_width(self) -> int:
        """Numbers that one token leaves in a layer's cache: keys or values."""
        return self.num_kv_heads * self.head_dim


_QWEN3 = {"head_dim": 128, "vocab_size": 151_936, "query_key_norm": True}
_QWEN2 = {"head_dim": 128, "attention_bias": True}
_LLAMA = {"head_dim": 128, "vocab_size": 128_256, "tied": False}

SHAPES: dict[str, ModelShape] = {
    "arithmetic-agent-student": ModelShape(
        3, 64, 128, 4, 4, 16, 47, tied=False, query_key_norm=True
    ),
    "arithmetic-agent-teacher": ModelShape(
        3, 80, 160, 4, 4, 20, 47, tied=False, query_key_norm=True
    ),
    "arithmetic-student": ModelShape(2, 64, 128, 4, 4, 16, 53, tied=False, query_key_norm=True),
    "arithmetic-teacher": ModelShape(4, 128, 256, 4, 4, 32, 53, tied=False, query_key_norm=True),
    "Qwen/Qwen3-1.7B": ModelShape(28, 2048, 6144, 16, 8, tied=True, **_QWEN3),
    "Qwen/Qwen3-4B": ModelShape(36, 2560, 9728, 32, 8, tied=True, **_QWEN3),
    "Qwen/Qwen3-8B": ModelShape(36, 4096, 12_288, 32, 8, tied=False, **_QWEN3),
    "Qwen/Qwen3-14B": ModelShape(40, 5120, 17_408, 40, 8, tied=False, **_QWEN3),
    "Qwen/Qwen3-32B": ModelShape(64, 5120, 25_600, 64, 8, tied=False, **_QWEN3),
    "Qwen/Qwen2.5-1.5B-Instruct": ModelShape(
        28, 1536, 8960, 12, 2, vocab_size=151_936, tied=True, **_QWEN2
    ),
    "Qwen/Qwen2.5-14B-Instruct": ModelShape(
        48, 5120, 13_824, 40, 8, vocab_size=152_064, tied=False, **_QWEN2
    ),
    "meta-llama/Llama-3.1-8B-Instruct": ModelShape(32, 4096, 14_336, 32, 8, **_LLAMA),
    "meta-llama/Llama-3.3-70B-Instruct": ModelShape(80, 8192, 28_672, 64, 8, **_LLAMA),
}
"""Shapes of the presets' models, from their public configs."""


LOGIT_COPIES = 10
"""Arrays of [chunk, V] float32 that exist at once."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training process, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    logits: int
    head_gradient: int
    sampler: int

    @property
    def peak(self) -> int:
        """What stays, and the larger of sampling and the backward pass."""
        stays = self.weights + self.gradients + self.optimizer + self.teacher
        return stays + max(self.sampler, self.activations + self.logits + self.head_gradient)


@dataclass(frozen=True)
class Plan:
    """An ablation, counted out."""

    preset: Preset
    num_trainings: int
    """Arms × seeds."""
    tokens_per_step: int
    """Response tokens of one step, at the mean response length that is assumed."""
    generated_tokens: int
    """Of all trainings, evaluation left out."""
    evaluation_tokens: int
    """Of all evaluations, the untrained student's included."""
    memory: MemoryEstimate
    full_logits_bytes: int
    """What the logits of a whole micro-batch would take in place of `memory.logits`."""
    device: Device
    num_devices: int
    """Devices that the peak needs at nine tenths of each."""
    device_hours: float
    here: Machine | None = None
    """The machine at hand."""
    hours_here: float = 0.0
    """Device hours there."""
    disk_bytes: int = 0
    """Of an arm's checkpoints: trainable weights and two moments, twice while one replaces the
    other."""

    def _epoch(self) -> str:
        if self.preset.num_prompts is None:
            return "as many as the prompts fill"
        steps = self.preset.steps_per_epoch(self.preset.num_prompts)
        return f"{steps:,} ({self.preset.num_prompts:,} prompts)"

    def wall_time(self, num_devices: int) -> str:
        """Hours of the whole study on so many devices: as many trainings at once as fit, each on
        the devices that its memory needs, which do not make it faster."""
        at_once = min(num_devices // self.num_devices, self.num_trainings)
        if not at_once:
            return f"does not fit: a training needs {self.num_devices}"
        rounds = -(-self.num_trainings // at_once)
        return f"{rounds * self.device_hours / self.num_trainings:,.1f} hours"

    def _here(self) -> list[tuple[str, str]]:
        """What the machine at hand has of what is needed, and how long it would take."""
        assert self.here is not None
        machine, need = self.here, self.memory.peak
        devices = max(1, -int(-need // (0.9 * machine.device.memory_bytes)))
        fits = devices <= machine.num_devices
        at_once = min(machine.num_devices // devices, self.num_trainings) if fits else 0
        hours = "does not fit"
        if fits:
            rounds = -(-self.num_trainings // at_once)
            hours = f"{rounds * self.hours_here / self.num_trainings:,.1f} hours"
        memory = f"{need / 1e9:,.1f} of {machine.device.memory_bytes / 1e9:,.1f} GB a device"
        disk = f"{self.disk_bytes / 1e9:,.1f} of {machine.disk_bytes / 1e9:,.1f} GB that are free"
        name = f"{machine.num_devices} × {machine.device.name} ({machine.how})"
        return [
            ("this machine", name),
            ("memory here", memory),
            ("hours here", hours),
            ("disk here", disk),
        ]

    def table(self) -> pl.DataFrame:
        """The plan as rows of (item, value), for printing."""
        preset, memory, training = self.preset, self.memory, self.preset.training
        giga = {name: f"{value / 1e9:,.1f} GB" for name, value in vars(memory).items()}
        rows = [
            ("preset", preset.name),
            ("student", str(preset.student)),
            ("teacher", str(preset.teacher)),
            ("prompts", preset.prompts or "the run's own rollouts"),
            ("benchmarks", ", ".join(preset.evaluation_sets)),
            ("thinking", preset.thinking()),
            ("steps per epoch", self._epoch()),
            ("mode", preset.mode),
            ("arms", ", ".join(str(arm) for arm in preset.parsed_arms())),
            ("seeds", ", ".join(map(str, preset.seeds))),
            ("trainings", f"{self.num_trainings} of {training.num_steps} steps"),
            (
                "a step",
                f"{training.prompts_per_step} prompts × {training.rollouts_per_prompt} rollouts",
            ),
            ("learning rate", f"{training.learning_rate:g}, {training.schedule}"),
            ("precision", training.precision),
            (
                "longest prompt, response",
                f"{preset.max_prompt_tokens:,}, {preset.max_new_tokens:,} tokens",
            ),
            ("response tokens per step", f"{self.tokens_per_step:,}"),
            ("tokens written in training", f"{self.generated_tokens:,}"),
            ("tokens written in evaluation", f"{self.evaluation_tokens:,}"),
            *((f"memory: {name.replace('_', ' ')}", value) for name, value in giga.items()),
            ("memory: peak", f"{memory.peak / 1e9:,.1f} GB"),
            ("full logits instead", f"{self.full_logits_bytes / 1e9:,.1f} GB"),
            ("devices", f"{self.num_devices} × {self.device.name}"),
            ("device hours", f"{self.device_hours:,.1f}"),
            *((f"on {n} × {self.device.name}", self.wall_time(n)) for n in (1, 8, 64)),
            ("assumed", f"{self.device.utilization:.0%} of the device's peak rates are attained"),
            ("disk", f"{self.disk_bytes / 1e9:,.1f} GB for the checkpoint of each arm in training"),
            *(self._here() if self.here else []),
            ("note", preset.note),
            *(("deviation", line) for line in deviations_from_paper(preset)),
        ]
        return pl.DataFrame(rows, schema={"item": pl.String, "value": pl.String}, orient="row")


def plan_ablation(
    preset: Preset,
    *,
    student: ModelShape | None = None,
    teacher: ModelShape | None = None,
    num_evaluation_problems: int = 560,
    mean_response_tokens: int | None = None,
    sampler_tokens: int = 65_536,
    device: Device | None = None,
    here: Machine | None = None,
) -> Plan:
    """Count out a preset.

    Args:
        preset: what is to be run.
        student: its shape, where the name is not in `SHAPES`.
        teacher: likewise.
        num_evaluation_problems: problems of all evaluation sets (MATH-500 and both AIME years:
            560).
        mean_response_tokens: assumed length of a response; by default half of the longest.
        sampler_tokens: tokens in flight while sampling.
        device: what to count device hours of.
        here: the machine at hand, to be told of too.

    Raises:
        OptionError: the shape of a model is not known.
    """
    device = device or Device()
    training = preset.training
    student, teacher = (
        student or _shape(preset.student, "student"),
        teacher or _shape(preset.teacher, "teacher"),
    )
    response = mean_response_tokens or preset.max_new_tokens // 2
    rollouts = training.prompts_per_step * training.rollouts_per_prompt
    num_trainings = len(preset.parsed_arms()) * len(preset.seeds)
    memory, full_logits = estimate_memory(preset, student, teacher, sampler_tokens)
    on_policy = preset.mode == Mode.ON_POLICY
    step_tokens = rollouts * response
    evaluated = (
        num_evaluation_problems
        * preset.num_samples
        * response
        * (num_trainings + len(preset.seeds))
    )
    sampled = step_tokens * training.num_steps * num_trainings if on_policy else 0

    def hours_on(where: Device) -> float:
        step_s = training_seconds(preset, student, teacher, response, where)
        longest = preset.max_new_tokens
        if on_policy:
            step_s += sampling_seconds(student, rollouts, response, longest, sampler_tokens, where)
        samples = num_evaluation_problems * preset.num_samples
        evaluation_s = sampling_seconds(student, samples, response, longest, sampler_tokens, where)
        evaluations = num_trainings + len(preset.seeds)
        return (num_trainings * training.num_steps * step_s + evaluations * evaluation_s) / 3600

    return Plan(
        preset=preset,
        num_trainings=num_trainings,
        tokens_per_step=step_tokens,
        generated_tokens=sampled,
        evaluation_tokens=evaluated,
        memory=memory,
        full_logits_bytes=full_logits,
        device=device,
        num_devices=max(1, -int(-memory.peak // (0.9 * device.memory_bytes))),
        device_hours=hours_on(device),
        here=here,
        hours_here=hours_on(here.device) if here else 0.0,
        disk_bytes=2 * (memory.gradients + memory.optimizer),
    )


def estimate_memory(
    preset: Preset, student: ModelShape, teacher: ModelShape, sampler_tokens: int
) -> tuple[MemoryEstimate, int]:
    """Memory of one training process by the formulas above, and bytes of a whole micro-batch's
    logits instead of a chunk's."""
    training = preset.training
    D, K, I, L = (
        student.hidden_size,
        student.kv_width,
        student.intermediate_size,
        student.num_layers,
    )
    P, V = student.num_parameters, min(student.vocab_size, teacher.vocab_size)
    lora, bfloat16 = training.lora_rank > 0, training.precision == Precision.BFLOAT16
    trainable = lora_parameters(student, training.lora_rank) if lora else P
    width = 2 if bfloat16 else 4
    frozen = width * P + 4 * trainable if lora else (4 * P + (2 * P if bfloat16 else 0))
    micro = training.micro_batch_size or training.prompts_per_step * training.rollouts_per_prompt
    tokens = micro * (preset.max_prompt_tokens + preset.max_new_tokens)
    layer = width * tokens * (8 * D + 4 * K + 3 * I)
    activations = width * tokens * D * L + layer if training.gradient_checkpointing else L * layer
    estimate = MemoryEstimate(
        weights=frozen,
        gradients=4 * trainable,
        optimizer=8 * trainable,
        teacher=width * teacher.num_parameters,
        activations=activations,
        logits=LOGIT_COPIES * training.chunk_size * V * 4,
        head_gradient=0 if lora else 8 * V * D,
        sampler=2 * width * L * K * sampler_tokens if preset.mode == Mode.ON_POLICY else 0,
    )
    return estimate, LOGIT_COPIES * micro * preset.max_new_tokens * V * 4


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Parameters of adapters of a rank on all linear layers of the blocks: rank × (inputs +
    outputs) each."""
    D, I, query, key = (
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_heads * shape.head_dim,
        shape.kv_width,
    )
    return shape.num_layers * rank * ((D + query) + 2 * (D + key) + (query + D) + 3 * (D + I))


def training_seconds(
    preset: Preset, student: ModelShape, teacher: ModelShape, response: int, device: Device
) -> float:
    """Seconds of one optimizer step on one device, sampling left out."""
    training = preset.training
    rollouts = training.prompts_per_step * training.rollouts_per_prompt
    tokens = rollouts * (response + preset.max_prompt_tokens // 4)
    several = (
        preset.mode == Mode.ON_POLICY
        and training.micro_batch_size is not None
        and training.micro_batch_size < rollouts
    )
    per_token = (
        8 if training.gradient_checkpointing else 6
    ) * student.num_parameters + 2 * teacher.num_parameters
    per_token += 2 * student.num_parameters if several else 0
    return per_token * tokens / (device.peak_flops * device.utilization)


def sampling_seconds(
    student: ModelShape,
    rollouts: int,
    response: int,
    longest: int,
    sampler_tokens: int,
    device: Device,
) -> float:
    """Seconds to sample rollouts on one device: the slower of arithmetic and of reading memory.

    Rollouts go in batches of `sampler_tokens` / `longest`; each batch takes as many decoding steps
    as its longest response, and a step reads all weights and, on average, half of the keys and
    values.
    """
    arithmetic = 2 * student.num_parameters * rollouts * response / device.peak_flops
    per_batch = max(1, sampler_tokens // longest)
    num_batches = -(-rollouts // per_batch)
    cache = 4 * student.num_layers * student.kv_width * min(rollouts, per_batch) * response / 2
    reading = num_batches * longest * (2 * student.num_parameters + cache) / device.bandwidth
    return max(arithmetic, reading) / device.utilization


def _shape(name: str | None, role: str) -> ModelShape:
    if name in SHAPES:
        return SHAPES[name]
    raise OptionError(
        f"the shape of the {role} {name!r} is not known here; known: {', '.join(SHAPES)}"
    )
