"""Names that options, tables and signatures share: one enumeration each.

Every member is also the text that users type and tables hold, so `scope == "run"` and
`Scope("run")` both work. A text that names no member raises `UnknownNameError` with the valid ones.
"""

import re
from enum import StrEnum
from typing import Self

from tip_analysis.core.errors import UnknownNameError

UNNAMED_BENCHMARK = "problems"
"""The benchmark of problems that come from no file or data set."""


class Name(StrEnum):
    """A closed set of names."""

    def __repr__(self) -> str:
        return repr(self.value)  # in messages they stand beside what a user typed

    @classmethod
    def _missing_(cls, value: object) -> Self:
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()
        raise UnknownNameError(kind, str(value), [member.value for member in cls])


def set_names(options: object, **kinds: type[Name]) -> None:
    """Put the members in place of the texts that some fields of a frozen dataclass were given;
    None stays.

    Raises:
        UnknownNameError: a text names no member.
    """
    for field, kind in kinds.items():
        given = getattr(options, field)
        object.__setattr__(options, field, None if given is None else kind(given))


class OnBadRow(Name):
    """What a row of a file that cannot be used does to the rest."""

    FAIL = "fail"
    """Nothing is read; the error names file and line."""
    SKIP = "skip"
    """It is left out, and counted."""


class Quadrant(Name):
    """Table 1 of the paper: student entropy h against divergence δ; high means strictly above the
    cut."""

    Q1 = "Q1"
    """High entropy, high divergence: dense signal."""
    Q2 = "Q2"
    """High entropy, low divergence: stabilises."""
    Q3 = "Q3"
    """Low entropy, high divergence: overconfident and wrong."""
    Q4 = "Q4"
    """Low entropy, low divergence: solved."""

    @property
    def code(self) -> int:
        """Its number in arrays: 2·(low entropy) + (low divergence)."""
        return _QUADRANT_CODES[self]


_QUADRANT_CODES = {quadrant: code for code, quadrant in enumerate(Quadrant)}


class Axis(Name):
    """The two axes of the taxonomy."""

    ENTROPY = "entropy"
    """Of the student."""
    DIVERGENCE = "divergence"
    """The reverse KL."""


class CutKind(Name):
    """How a cut is measured."""

    MEDIAN = "median"
    MEAN = "mean"
    QUANTILE = "quantile"
    NATS = "nats"
    """A number that was given."""
    OTSU = "otsu"
    """The split with the largest between-class variance."""
    PAPER = "paper"
    """Both axes at once: shares in the ranges that the paper reports."""


class Scope(Name):
    """Whose tokens share one cut or one min-max."""

    RUN = "run"
    """All of the run's."""
    BATCH = "batch"
    """Those of one optimizer step (`batch_id`)."""


class SelectionScope(Name):
    """Within what tokens compete to be selected."""

    ROLLOUT = "rollout"
    BATCH = "batch"
    RUN = "run"


class StopTokens(Name):
    """What scoring takes the tokens for with which student or teacher stop."""

    DECLARED = "declared"
    """Different tokens, as the vocabulary has them."""
    MERGED = "merged"
    """One token: which of them a model prefers is no disagreement."""


class Artefact(Name):
    """Why a token only looks important; where several fit, the first is meant."""

    AFTER_END = "after_end"
    """The student wrote it after a stop token of the same turn."""
    PADDED_MASS = "padded_mass"
    """A model puts probability on rows of its head that are no shared token."""
    STOP_TOKEN = "stop_token"
    """The models differ in which of several stop tokens they prefer, more than in anything else."""
    SPECIAL_TOKEN = "special_token"
    """A template's or another special token inside what the student wrote."""
    RETOKENIZED = "retokenized_boundary"
    """The edge of a text that was encoded again: the author's own ids may have been others."""
    AFTER_TRUNCATION = "after_truncation"
    """The first token of a turn after one that was cut off."""
    OUTLIER = "outlier"
    """A single divergence that sets the scale: without it the min-max changes by more than 10%."""


class Approximation(Name):
    """Why a token's divergences are not exact."""

    TOP_K = "top-k"
    """Only the teacher's most likely tokens are known; all others count as one token."""


class ScreenedPart(Name):
    """What a screen takes the share of artefacts in."""

    QUADRANT = "quadrant"
    SUM = "sum"
    MASK = "mask"


class RankFigure(Name):
    """What selection rules are ranked by, without training."""

    PHI = "phi"
    """Share of Σφ that the selection keeps."""
    PHI_POSITIVE = "phi_positive"
    """Share of the sum over tokens with φ > 0."""
    REWARD = "reward"
    """Σ of the reward alignment kept, over the sum of its positive part in all tokens."""
    REWARD_POSITIVE = "reward_positive"
    """Share of that positive part."""
    GRAD_NORM_SQ = "grad_norm_sq"
    """Share of ΣM."""
    COSINE_LOSS = "cosine_loss"
    """Cosine between the gradient of the selection's loss and that of the full loss."""
    COSINE_REWARD = "cosine_reward"
    """Cosine between a step down the selection's loss and ∇J."""
    SNR = "snr"
    """Signal over noise of one prompt's gradient of the selection's loss."""


class TokenUse(Name):
    """How a rule's score decides what a token counts for."""

    SELECTION = "selection"
    """The k best count, the others do not."""
    WEIGHTING = "weighting"
    """Every token counts, by its weight."""


class Preconditioner(Name):
    """What a gradient is multiplied by before it becomes a step."""

    NONE = "none"
    """Nothing: plain gradient descent."""
    ADAM = "adam"
    """1 / (√v̂ + ε), v̂ the mean squared gradient of a step's batch."""


class ForcedToken(Name):
    """What a continuation begins with at the token that is tested."""

    STUDENT = "student"
    """The token that the student wrote."""
    TEACHER = "teacher"
    """The teacher's most likely token."""
    FRESH = "fresh"
    """A new sample of the student's."""


class Correction(Name):
    """How several hypotheses that are tested together share one error rate."""

    HOLM = "holm"
    """Step down: the k-th strongest of m at level 0.05 / (m − k + 1)."""
    BONFERRONI = "bonferroni"
    """Every one at level 0.05 / m."""


class FinishReason(Name):
    """Why a rollout ends where it ends."""

    STOP = "stop"
    """The student wrote an end-of-sequence token, which is part of the response."""
    LENGTH = "length"
    """The token limit was reached."""
    GIVEN = "given"
    """The text was given; nothing is known about its end."""


class IdsOrigin(Name):
    """Whether token ids are the author's own."""

    EXACT = "exact"
    RETOKENIZED = "retokenized"


class TemplateOrigin(Name):
    """Whether the chat template is the author's own."""

    EXACT = "exact"
    REAPPLIED = "reapplied"
    NONE = "none"


class Segment(Name):
    """What part of a turn a token that the student wrote belongs to."""

    THINK = "think"
    """A thought, its tags included."""
    ANSWER = "answer"
    """What the reader is shown."""
    TOOL_CALL = "tool_call"
    """A call of a tool, its tags included."""
    OTHER = "other"
    """Special tokens, such as the end of a turn, and space between the others."""


class CallPart(Name):
    """What part of a tool call a token belongs to."""

    NAME = "name"
    """The tool's name."""
    ARGUMENT = "argument"
    """What is passed to it."""
    SYNTAX = "syntax"
    """Tags, keys and brackets around both."""


class ConversationMatch(Name):
    """How the token ids of a conversation that grew turn by turn compare with those of the chat
    template's rendering of the whole."""

    IDS = "ids"
    """Equal."""
    TEXT = "text"
    """The texts are equal; the student spelt some of its own with other tokens than the tokenizer
    would."""
    REWRITTEN = "rewritten"
    """The template shows an earlier turn otherwise than the student wrote it."""


class OnRewrite(Name):
    """What is done with a conversation whose template shows earlier turns otherwise."""

    REFUSE = "refuse"
    """It is left out, and named."""
    RECORD = "record"
    """It goes on with the ids as they were sampled, and is marked (`conversation_match`)."""


class PlantedLabel(Name):
    """What a token of the arithmetic pair truly is."""

    PLANTED_ERROR = "planted_error"
    """The student is sure here, and wrong by construction."""
    FORK = "fork"
    """Several continuations are right."""
    PLAIN = "plain"


class Loss(Name):
    """Per-token losses whose gradients can be measured."""

    REVERSE_KL = "reverse_kl"
    FORWARD_KL = "forward_kl"
    JSD = "jsd"
    NEGATIVE_LOGPROB = "negative_logprob"
    """-ln P_S(y_t) of the sampled token."""


class TrainingLoss(Name):
    """Per-token losses that a student can be trained on."""

    REVERSE_KL = "reverse_kl"
    FORWARD_KL = "forward_kl"
    JSD = "jsd"
    """Of any mixture β; ½ by default."""
    SKEW_KL = "skew_kl"
    """The teacher against a mixture of itself and the student."""
    SKEW_REVERSE_KL = "skew_reverse_kl"
    """The student against a mixture of itself and the teacher."""
    TOPK_REVERSE_KL = "topk_reverse_kl"
    """Over the most likely tokens only."""
    ENTROPY_GATED = "entropy_gated"
    """The reverse KL, and the forward KL where the teacher is uncertain."""
    K1 = "k1"
    """Policy gradient of the sampled token, without a baseline."""
    K1_CENTRED = "k1_centred"
    """The same with the exact expectation as its baseline."""
    K2 = "k2"
    """Half the squared log-ratio of the sampled token."""
    K3 = "k3"
    """The sampled token's r − 1 − ln r, r = P_T/P_S."""

    @property
    def is_sampled(self) -> bool:
        """Whether it looks at the sampled token alone: an estimator."""
        return self in (self.K1, self.K1_CENTRED, self.K2, self.K3)


class TopKSource(Name):
    """Whose most likely tokens a loss is taken over."""

    STUDENT = "student"
    TEACHER = "teacher"


class TopKTail(Name):
    """What becomes of the tokens that are not among the most likely."""

    BUCKET = "bucket"
    """One token that holds their probability."""
    RENORMALISED = "renormalised"
    """They are left out, and the others renormalised."""


class LossNormalizer(Name):
    """Tokens that a loss is divided by."""

    SELECTED = "selected"
    ALL = "all"


class WeightScale(Name):
    """What the weights of a step's tokens are divided by."""

    NONE = "none"
    """Nothing: they are used as their source has them."""
    MEAN_ONE = "mean_one"
    """Their mean over the written tokens of the step."""
    ALL_TOKENS = "all_tokens"
    """Nothing; and the loss is divided by the number of all tokens, selected or not."""
    ITS_SUM = "its_sum"
    """Nothing; and the loss is divided by the sum of the weights."""


class LossAggregation(Name):
    """How the losses of tokens become one number."""

    ROLLOUT = "rollout"
    """The mean of rollout means."""
    TOKEN = "token"
    """The mean over tokens."""


class Relation(Name):
    """What a claim says of two arms."""

    BETTER = ">"
    CLOSE = "≈"
    AT_LEAST = "≳"


class SurveyMethod(Name):
    """How a survey of tokens goes."""

    EXACT = "exact"
    """All columns in memory."""
    GRID = "grid"
    """Passes over the table, counted on grids."""


class Method(Name):
    """How gradients are measured."""

    PROBE = "probe"
    """Random probes: a cost that does not grow with the number of tokens."""
    EXACT = "exact"
    """One backward pass a token."""


class Mode(Name):
    """What an ablation trains on."""

    ON_POLICY = "on_policy"
    """Fresh rollouts at every step."""
    OFFLINE = "offline"
    """The run's own rollouts and masks."""


class TeacherContext(Name):
    """What the teacher sees besides the prompt."""

    NONE = "none"
    SOLUTION = "solution"
    """The reference solution, in the user's turn."""


class SamplingEngine(Name):
    """Who writes rollouts."""

    HF = "hf"
    """This package's own sampler, on a transformers model."""
    VLLM = "vllm"
    """vLLM in this process."""
    SERVER = "server"
    """A server that speaks OpenAI's completions, such as `vllm serve`."""


class ScoringEngine(Name):
    """Who does the scoring."""

    LOCAL = "local"
    """One process."""
    RAY = "ray"
    """Ray actors that share the work."""


class ScoringPhase(Name):
    """Which of the two models are at work."""

    BOTH = "both"
    TEACHER = "teacher"
    STUDENT = "student"


class TeacherStoreForm(Name):
    """What is stored of the teacher."""

    HIDDEN = "hidden"
    """Hidden states: exact."""
    TOPK = "topk"
    """Top tokens: smaller; divergences become lower bounds."""


class OptimizerName(Name):
    """What turns a gradient into a step."""

    ADAMW = "adamw"
    SGD = "sgd"


class Schedule(Name):
    """Learning rate after the warm-up."""

    COSINE = "cosine"
    CONSTANT = "constant"


class Precision(Name):
    """Of the forward and backward pass."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT64 = "float64"
    """For checks of the arithmetic only: the command line does not offer it."""


class TrackerName(Name):
    """What is told of a training step by step."""

    NONE = "none"
    TRACKIO = "trackio"
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"


class ExportLayout(Name):
    """For whom a run is exported."""

    PLAIN = "plain"
    """Tables and labels."""
    VERL = "verl"
    """The same, and masks as verl's `response_mask`, by the sample's uid."""
