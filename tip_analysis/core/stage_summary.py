"""What a stage found, as the functions of the door return it: a mapping that shows itself."""

from collections.abc import Mapping
from typing import Any

from tip_analysis.core.run_folder import Run
from tip_analysis.core.text import shown


class StageSummary(dict[str, Any]):
    """What a stage found, by name (counts, means …), as `run.json` has it.

    Attributes:
        run: the run folder that it wrote into.
        title: what was made.
    """

    def __init__(self, run: Run, title: str, found: Mapping[str, Any]) -> None:
        super().__init__(found)
        self.run = run
        self.title = title

    def __repr__(self) -> str:
        width = max((len(name) for name in self), default=0)
        lines = [f"  {name.replace('_', ' '):{width}}  {shown(self[name])}" for name in self]
        return "\n".join([f"{self.run.path}: {self.title}", *lines])
