"""Every command by the name that is typed, and what one command line can be.

A command is a frozen dataclass in `cli.commands`; here it gets its name.
"""

from functools import reduce
from operator import or_
from typing import Annotated, Any

from tyro.conf import subcommand

from tip_analysis.cli.commands.ablation import Ablate
from tip_analysis.cli.commands.demo import Demo
from tip_analysis.cli.commands.evaluation import Evaluate
from tip_analysis.cli.commands.gradients import Gradients
from tip_analysis.cli.commands.instruments import Claims, Influence, Intervene, RankRules, Track
from tip_analysis.cli.commands.reading import Compare, Export, Report, Status
from tip_analysis.cli.commands.rollouts import Import, Rollout
from tip_analysis.cli.commands.scoring import Score
from tip_analysis.cli.commands.selection import Screen, Select

COMMANDS: dict[str, type] = {
    "demo": Demo,
    "rollout": Rollout,
    "import": Import,
    "score": Score,
    "gradients": Gradients,
    "select": Select,
    "screen": Screen,
    "rank-rules": RankRules,
    "influence": Influence,
    "intervene": Intervene,
    "ablate": Ablate,
    "track": Track,
    "claims": Claims,
    "evaluate": Evaluate,
    "compare": Compare,
    "status": Status,
    "export": Export,
    "report": Report,
}
"""In the order of `--help`."""

Command: Any = reduce(or_, (Annotated[kind, subcommand(name)] for name, kind in COMMANDS.items()))
"""What one command line can be: any of them."""
