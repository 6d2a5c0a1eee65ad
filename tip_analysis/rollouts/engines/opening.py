"""The engine that is asked for, opened on a student and closed when the work is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from tip_analysis.core.names import SamplingEngine
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import LanguageModel, default_dtype
from tip_analysis.models.named import ModelLike, as_model
from tip_analysis.models.token_model import TokenModel
from tip_analysis.models.unloaded import UnloadedModel, is_servable, read_model
from tip_analysis.rollouts.engines.engine import Engine
from tip_analysis.rollouts.engines.hf import HFEngine
from tip_analysis.rollouts.engines.settings import EngineSettings

EngineLike: TypeAlias = EngineSettings | SamplingEngine | str | Engine
"""An engine that is open, how to open one, or its name."""


@dataclass(frozen=True)
class Loading:
    """How models are loaded, and batches made of them."""

    dtype: str = "auto"
    device: str = "auto"
    token_budget: int = 16384


def settings_of(engine: EngineLike, server_url: str | None = None) -> EngineSettings | None:
    """How to open what was asked for; None for an engine that is open already.

    Raises:
        UnknownNameError, OptionError: there is no such engine, or options contradict each other.
    """
    if isinstance(engine, str):
        engine = EngineSettings(SamplingEngine(engine), server_url)
    if isinstance(engine, EngineSettings):
        engine.require()
        return engine
    return None


@contextmanager
def opened(
    engine: EngineLike,
    student: ModelLike,
    loading: Loading | None = None,
    server_url: str | None = None,
) -> Iterator[Engine]:
    """An engine that writes with the student's weights; one that was open stays open.

    Args:
        engine: what writes.
        student: whose weights; only `hf` loads them in this process.
        loading: dtype, device and batches.
        server_url: of a server, where `engine` is a name.

    Raises:
        MissingExtraError: the engine is not installed.
        EngineError: a server does not answer.
    """
    settings = settings_of(engine, server_url)
    if settings is None:
        yield engine  # pyright: ignore[reportReturnType]
        return
    made = open_engine(settings, student, loading or Loading())
    try:
        yield made
    finally:
        made.close()


def open_engine(settings: EngineSettings, student: ModelLike, loading: Loading) -> Engine:
    """An engine on a student; the caller closes it."""
    if settings.engine is SamplingEngine.VLLM:
        return _vllm(settings, student, loading)
    if settings.engine is SamplingEngine.SERVER:
        return _server(settings, student)
    model = as_model(student, dtype=loading.dtype, device=loading.device)
    return HFEngine(model, TokenBudget(loading.token_budget))


def _server(settings: EngineSettings, student: ModelLike) -> Engine:
    from tip_analysis.rollouts.engines.completions import CompletionsClient
    from tip_analysis.rollouts.engines.server import ServerEngine

    assert settings.server_url is not None
    client = CompletionsClient.at(settings.server_url, settings, "--server-url")
    return ServerEngine(_author(student), client)


def _vllm(settings: EngineSettings, student: ModelLike, loading: Loading) -> Engine:
    from tip_analysis.rollouts.engines.vllm_engine import VLLMEngine, weights_of

    if not isinstance(student, LanguageModel) and is_servable(str(student)):
        name = str(student)
        return VLLMEngine(
            read_model(name), weights_of(name), default_dtype(name, loading.dtype), settings
        )
    model = as_model(student, dtype=loading.dtype, device="cpu")
    engine = VLLMEngine(
        UnloadedModel.of(model), None, str(model.dtype).removeprefix("torch."), settings
    )
    engine.update(model)
    return engine


def _author(student: ModelLike) -> TokenModel:
    """The student without its weights, where its files tell enough."""
    if isinstance(student, LanguageModel) or is_servable(str(student)):
        return student if isinstance(student, LanguageModel) else read_model(str(student))
    return UnloadedModel.of(as_model(student, device="cpu"))
