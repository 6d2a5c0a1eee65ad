"""What decides which engine writes, and how it is reached. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import SamplingEngine
from tip_analysis.core.optional import require

KEY_VARIABLE = "TIP_SERVER_API_KEY"
"""Environment variable with the key that a server asks for; it is written nowhere."""


@dataclass(frozen=True)
class EngineSettings:
    """Which engine, and how it is set up."""

    engine: SamplingEngine = SamplingEngine.HF
    server_url: str | None = None
    """`http://HOST:PORT`, with `#MODEL` where the server has several."""
    tensor_parallel: int = 1
    """GPUs that vLLM spreads the model over."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `LLM`, such as `gpu_memory_utilization`."""
    concurrency: int = 16
    """Requests that a server is given at once."""
    timeout_s: float = 600.0
    """How long one answer of a server may take."""
    attempts: int = 5
    """How often a server is asked before it is given up."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", SamplingEngine(self.engine))
        is_server = self.engine is SamplingEngine.SERVER
        if is_server and self.server_url is None:
            raise OptionError("--engine server needs --server-url, such as http://localhost:8000")
        if self.server_url is not None:
            if not is_server:
                raise OptionError(
                    f"--server-url goes with --engine server; found --engine {self.engine}"
                )
            split_url(self.server_url, "--server-url")
        if self.options and self.engine is not SamplingEngine.VLLM:
            raise OptionError("--engine-options goes with --engine vllm")
        if self.tensor_parallel < 1 or self.concurrency < 1 or self.attempts < 1:
            raise OptionError("tensor_parallel, concurrency and attempts must be at least 1")

    def require(self) -> None:
        """Make sure that what the engine needs is installed, without importing it.

        Raises:
            MissingExtraError: names the extra.
        """
        if self.engine is SamplingEngine.VLLM:
            require("vllm", "--engine vllm")


def is_address(name: str) -> bool:
    """Whether the name of a model is the address of a server."""
    return name.lower().startswith(("http://", "https://"))


def split_url(url: str, option: str) -> tuple[str, str | None]:
    """The address of a server without a slash at its end, and the model after `#`.

    Raises:
        OptionError: it is no address with http or https, or holds credentials.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise OptionError(
            f"{option}: expected http://HOST:PORT, found an address that is none"
        ) from error
    if parts.username is not None or parts.password is not None or parts.query:
        raise OptionError(
            f"{option}: an address without user, password and query is expected; a key goes into"
            f" the environment variable {KEY_VARIABLE}"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise OptionError(f"{option}: expected http://HOST:PORT or https://…, found {url!r:.80}")
    address = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
    return address, parts.fragment or None
