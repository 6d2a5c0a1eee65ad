"""One training in several processes, as `accelerate launch` or `torchrun` starts them: one GPU
each, or gloo on CPUs.

Every process holds the whole student and does its part of the rollouts; what a step decides on (its
rollouts, their statistics) is put together, so that all processes make the same choice, and
gradients are summed. No number depends on how many processes there are, beyond rounding. The first
one alone writes.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from tip_analysis.core.errors import OptionError

S = TypeVar("S")
T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=6)
"""How long a process waits for the others: one of them may write long rollouts, or grade."""


@dataclass(frozen=True)
class Processes:
    """The processes of one training, as seen from one of them; by default it is alone."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    """The device that belongs to this process; None where it is alone and may take any."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of each process, by rank: anything that can be pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def of_first(self, value: T) -> T:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        shared: list[Any] = [value]
        torch.distributed.broadcast_object_list(shared, src=0, device=self.device)
        return shared[0]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.gather(None)

    def spread(self, items: Sequence[S], work: Callable[[list[S]], Sequence[T]]) -> list[T]:
        """The results for some items in their order, in all processes; each does its part.

        Args:
            items: the same in all processes.
            work: makes one result for each of the items that it is given.
        """
        if self.size == 1:
            return list(work(list(items)))
        parts = self.gather(list(work(self.part(items))))
        made: list[Any] = [None] * len(items)
        for rank, part in enumerate(parts):
            made[rank :: self.size] = part
        return made

    def part(self, items: Sequence[T], rank: int | None = None) -> list[T]:
        """Those of the items that are this process's, or another's."""
        return list(items[self.rank if rank is None else rank :: self.size])

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes; one that has none adds 0."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def sum(self, value: float) -> float:
        """The sum of a number over all processes, in the order of ranks."""
        return float(sum(self.gather(value)))


ALONE = Processes()


def launched_processes() -> Processes:
    """The processes that a launcher has started, of which this is one; otherwise it is alone.

    Joins them: returns when all have come.

    Raises:
        OptionError: the launcher started several, which cannot be joined.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    if state.num_processes != launched:  # each would train the whole, and all would write
        raise OptionError(
            f"the launcher started {launched} processes, but accelerate joins"
            f" {state.num_processes}: see `accelerate env`"
        )
    device: Any = state.device
    device = torch.device("cpu") if device.type == "cpu" else device
    return Processes(state.process_index, state.num_processes, device)
