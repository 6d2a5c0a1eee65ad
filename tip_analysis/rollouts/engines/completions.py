"""A client of OpenAI's `/v1/completions`, as `vllm serve` speaks it: token ids in, token ids and
log-probabilities out.

What may pass is asked again after a growing pause: no connection, no answer in time, an answer that
breaks off or is no JSON, and the statuses 408, 429 and 5xx. Any other status, and any answer that
does not hold what was asked for, is an error at once. Errors name the address, never a key.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import httpx

from tip_analysis.core.errors import EngineError
from tip_analysis.core.text import one_line
from tip_analysis.rollouts.engines.settings import KEY_VARIABLE, EngineSettings, split_url

logger = logging.getLogger(__name__)

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that may pass."""
LONGEST_PAUSE_S = 30.0
CONNECT_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 2**30

Item = TypeVar("Item")
Result = TypeVar("Result")


class _MayPassError(Exception):
    """A failure that is worth another try."""

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s
        """What the server asks for."""


@dataclass
class CompletionsClient:
    """One server, and one of its models."""

    address: str
    model: str | None = None
    """As the server names it; `connect` finds it where there is one."""
    concurrency: int = 16
    timeout_s: float = 600.0
    attempts: int = 5
    first_pause_s: float = 1.0
    max_model_len: int | None = None
    """The server's longest sequence, where it says so."""
    _http: httpx.Client = field(init=False, repr=False)
    _stopped: threading.Event = field(init=False, repr=False, default_factory=threading.Event)

    def __post_init__(self) -> None:
        key = os.environ.get(KEY_VARIABLE)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self.timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=self.concurrency),
        )

    @classmethod
    def at(cls, url: str, settings: EngineSettings, option: str) -> "CompletionsClient":
        """The client of `URL` or `URL#MODEL`, connected.

        Raises:
            OptionError: it is no address.
            EngineError: nobody answers, or there is no such model.
        """
        address, model = split_url(url, option)
        client = cls(address, model, settings.concurrency, settings.timeout_s, settings.attempts)
        client.connect()
        return client

    def connect(self) -> None:
        """Find the model on the server's list.

        Raises:
            EngineError: nobody answers, or there is no such model.
        """
        cards = self._ask("GET", "/v1/models", None, lambda answer: list(answer["data"]))
        served = {str(card["id"]): card for card in cards}
        if self.model is None and len(served) == 1:
            self.model = next(iter(served))
        if self.model not in served:
            named = f"no model {self.model!r}" if self.model else "several models"
            raise EngineError(
                f"{self.address} has {named}; it serves {', '.join(sorted(served)) or 'none'}:"
                " name one as URL#MODEL"
            )
        self.max_model_len = served[self.model].get("max_model_len")

    def complete(
        self, payload: Mapping[str, Any], read: Callable[[dict[str, Any]], Result]
    ) -> Result:
        """Ask for one completion; `read` takes what is wanted from its only choice.

        Raises:
            EngineError: no answer after all attempts, or one that `read` cannot use.
        """

        def read_answer(answer: Any) -> Result:
            choices = answer["choices"]
            if len(choices) != 1:
                raise EngineError(
                    f"{self.address} gave {len(choices)} choices where 1 was asked for"
                )
            return read(choices[0])

        return self._ask("POST", "/v1/completions", {"model": self.model, **payload}, read_answer)

    def begin(self) -> None:
        """Ask again what fails, from now on."""
        self._stopped.clear()

    def give_up(self) -> None:
        """Ask nothing again: whatever waits for another try fails at once."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections; whatever waits is given up."""
        self.give_up()
        self._http.close()

    def _ask(self, method: str, path: str, payload: Any, read: Callable[[Any], Result]) -> Result:
        answer = self._answer(method, path, payload)
        try:
            return read(answer)
        except EngineError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise EngineError(
                f"{self.address}{path}: the answer does not have the form of OpenAI's API"
                f" ({type(error).__name__}: {one_line(str(error), 80)})"
            ) from error

    def _answer(self, method: str, path: str, payload: Any) -> Any:
        """The answer to one question, asked again while that may help."""
        attempt = 1
        while True:
            try:
                return self._once(method, path, payload)
            except _MayPassError as error:
                if attempt == self.attempts or self._stopped.is_set():
                    raise EngineError(
                        f"{self.address}{path}: {error} ({attempt} attempts); what is whole is"
                        " kept: run the command again once the server answers"
                    ) from error
                pause = error.pause_s or self.first_pause_s * 2 ** (attempt - 1)
                logger.info("%s%s: %s; asked again in %.1f s", self.address, path, error, pause)
                self._stopped.wait(min(pause, LONGEST_PAUSE_S))
            attempt += 1

    def _once(self, method: str, path: str, payload: Any) -> Any:
        """One try: the answer as JSON holds it."""
        deadline = time.monotonic() + self.timeout_s
        try:
            with self._http.stream(method, self.address + path, json=payload) as response:
                body = _body(response, deadline)
        except httpx.TimeoutException as error:
            raise _MayPassError(f"no answer within {self.timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise _MayPassError(f"no connection ({type(error).__name__})") from error
        except (httpx.HTTPError, httpx.InvalidURL, RuntimeError) as error:
            raise EngineError(f"{self.address}{path}: {one_line(str(error), 120)}") from error
        if response.status_code in RETRIED:
            pause = _seconds(response.headers.get("retry-after"))
            raise _MayPassError(f"status {response.status_code}{_reason(body)}", pause)
        if response.status_code != 200:
            raise EngineError(f"{self.address}{path}: status {response.status_code}{_reason(body)}")
        try:
            return json.loads(body)
        except ValueError as error:
            raise _MayPassError("an answer that is no whole JSON") from error


def _body(response: httpx.Response, deadline: float) -> bytes:
    """The whole answer, unless it trickles for too long or never ends."""
    parts, size = [], 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("the answer took too long")
        if size > MAX_ANSWER_BYTES:
            raise httpx.HTTPError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
    return b"".join(parts)


def _reason(body: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        found = json.loads(body)
        error = found.get("error", found)
        text = error.get("message", "") if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        text = ""
    return f": {one_line(str(text), 200)}" if text else ""


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None


def in_parallel(
    items: Iterable[Item], work: Callable[[Item], Result], client: CompletionsClient
) -> Iterator[tuple[Item, Result]]:
    """Call `work` on each item, as many at once as the client may ask; yields each with its result
    as it comes.

    The first error, or Ctrl-C, ends it: what has not begun never begins, and what is under way is
    not asked again.
    """
    client.begin()
    left = iter(items)
    with ThreadPoolExecutor(client.concurrency) as pool:
        running: dict[Future[Result], Item] = {
            pool.submit(work, item): item for item in islice(left, client.concurrency)
        }
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    item = running.pop(future)
                    yield item, future.result()
                    for more in islice(left, 1):
                        running[pool.submit(work, more)] = more
        except BaseException:
            client.give_up()
            raise
        finally:
            for future in running:
                future.cancel()
