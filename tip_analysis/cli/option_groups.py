"""Options that several commands share: dataclasses whose field docstrings are their `--help`.

Their fields carry no prefix on the command line. Nothing is imported but tyro's markers, so that
help is quick.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from tip_analysis.cli.option_values import parse_switches
from tip_analysis.cli.ranges import (
    Count,
    Cut,
    Few,
    Processes,
    SomeCount,
    SomeSeconds,
    SomeShare,
    Wait,
)
from tip_analysis.core.names import OnRewrite, SamplingEngine, Scope

if TYPE_CHECKING:
    from tip_analysis.analysis.taxonomy import Taxonomy as Asked
    from tip_analysis.rollouts.engines.settings import EngineSettings

Flag = FlagCreatePairsOff[bool]
RunFolder = Annotated[Positional[Path], arg(metavar="RUN")]
Names = Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")]
Texts = Annotated[tuple[str, ...], arg(metavar="FILE [FILE ...]")]
Pairs = Annotated[tuple[str, ...], arg(metavar="KEY=VALUE [KEY=VALUE ...]")]


@dataclass(frozen=True)
class ModelOptions:
    """Wherever a model is loaded."""

    dtype: str = "auto"
    """Dtype of the weights: auto (bfloat16 where the device computes in it natively, else float32)
    or its name."""
    device: str = "auto"
    """Where models run: auto (a GPU if there is one; over several, a model is spread), cpu, cuda,
    cuda:1, mps."""
    token_budget: SomeCount = None
    """Tokens a batch, padding included; halves itself when memory runs out. By default 16,384, and
    65,536 in `ablate`."""

    def loading(self, token_budget: int = 16384) -> dict[str, Any]:
        """How models are loaded and batched, as the door's functions take it."""
        return {
            "token_budget": self.tokens_a_batch(token_budget),
            "dtype": self.dtype,
            "device": self.device,
        }

    def tokens_a_batch(self, default: int = 16384) -> int:
        """The budget that was named, or the default."""
        return default if self.token_budget is None else self.token_budget


@dataclass(frozen=True)
class EngineOptions:
    """Wherever a model writes."""

    engine: SamplingEngine = SamplingEngine.HF
    """What the model writes with: this package's own sampler, vLLM, or a server that is there
    already (vllm serve)."""
    server_url: str | None = None
    """Address of the server, http://HOST:PORT, with #MODEL where it has several; a key goes into
    TIP_SERVER_API_KEY."""
    server_concurrency: Few = 16
    """Requests that the server is given at once."""
    server_timeout: Wait = 600.0
    """Seconds that one answer of the server may take."""
    tensor_parallel: Processes = 1
    """GPUs that vLLM spreads the model over."""
    engine_options: Pairs = ()
    """Further arguments of vLLM's LLM, such as gpu_memory_utilization=0.8."""

    def settings(self) -> "EngineSettings":
        """The engine that these options ask for.

        Raises:
            OptionError: they contradict each other.
        """
        from tip_analysis.rollouts.engines.settings import EngineSettings

        return EngineSettings(
            self.engine,
            self.server_url,
            tensor_parallel=self.tensor_parallel,
            options=parse_switches(self.engine_options, "--engine-options"),
            concurrency=self.server_concurrency,
            timeout_s=self.server_timeout,
        )


@dataclass(frozen=True)
class EnvironmentOptions:
    """Wherever a model may act over several turns."""

    environment: str | None = None
    """What answers the model turn by turn, and grades it: a built-in name (arithmetic-agent),
    FILE.py:CLASS, or deepplanning:DIR."""
    max_turns: Count = 16
    """Turns of the model in an environment."""
    step_timeout: Wait = 60.0
    """Seconds that an environment may take to answer one turn."""
    on_rewrite: OnRewrite = OnRewrite.REFUSE
    """A chat template that shows earlier turns otherwise than they were written: refuse such
    rollouts by name, or record them."""

    def chosen(self) -> dict[str, Any]:
        """The environment, as the door's functions take it."""
        return {
            "environment": self.environment,
            "max_turns": self.max_turns,
            "step_timeout_s": self.step_timeout,
            "on_rewrite": self.on_rewrite,
        }


@dataclass(frozen=True)
class TrainingEngineOptions:
    """What a student that is trained writes with."""

    engine: Literal[SamplingEngine.HF, SamplingEngine.VLLM] = SamplingEngine.HF
    """What the student writes with: this package's own sampler, or vLLM, which is given its weights
    before each step."""
    tensor_parallel: Processes = 1
    """GPUs that vLLM spreads the model over."""
    engine_options: Pairs = ()
    """Further arguments of vLLM's LLM, such as gpu_memory_utilization=0.4."""

    def settings(self) -> "EngineSettings":
        """The engine that these options ask for.

        Raises:
            OptionError: they contradict each other.
        """
        return EngineOptions(
            self.engine, tensor_parallel=self.tensor_parallel, engine_options=self.engine_options
        ).settings()


@dataclass(frozen=True)
class TaxonomyOptions:
    """Wherever scores and quadrants are computed."""

    entropy_cut: Cut = "median"
    """Cut on the student's entropy: median, mean, otsu, paper, a quantile such as q0.8, or a number
    in nats."""
    divergence_cut: Cut = "mean"
    """Cut on the reverse KL: likewise."""
    cut_scope: Scope = Scope.RUN
    """Whose tokens a cut is measured on: all of the run's, or those of one optimizer step."""
    normalization_scope: Scope = Scope.RUN
    """Whose tokens share one min-max normalization."""
    divergence_clip: SomeShare = None
    """Quantile at which the divergence is clipped before its min-max, such as 0.98; not clipped by
    default, as in the paper."""

    def parsed(self) -> "Asked":
        """The taxonomy that these options ask for."""
        from tip_analysis.analysis.taxonomy import Taxonomy

        return Taxonomy(**asdict(self))


@dataclass(frozen=True)
class CommonOptions:
    """Every command has these."""

    debug: Flag = False
    """Show the traceback of an error."""
    verify: Flag = False
    """Check every file of the run folder against the hashes on record, and every row of its tables,
    before anything is made of them; small tables are always checked."""
    lock_timeout: SomeSeconds = None
    """Seconds to wait for another process that is at work on the same thing; 60 by default."""


Engines = OmitArgPrefixes[EngineOptions]
Environments = OmitArgPrefixes[EnvironmentOptions]
TrainingEngines = OmitArgPrefixes[TrainingEngineOptions]
Models = OmitArgPrefixes[ModelOptions]
Taxonomy = OmitArgPrefixes[TaxonomyOptions]
Common = OmitArgPrefixes[CommonOptions]
