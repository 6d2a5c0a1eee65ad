"""A few steps of our own trainer, in as many processes as it is launched with:
OUTPUT_FILE OPTIONS_AS_JSON."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "training"))
from safetensors.torch import save_file
from test_trainer import BASE, fixed, make_trainer, multi_turn_rollouts

from tip_analysis.training.processes import launched_processes
from tip_analysis.training.trainer import Trainer, trained

out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
offline = options.pop("offline", False)
processes = launched_processes()
made = make_trainer(replace(BASE, **options))
source = replace(made.source, processes=processes)
if offline:
    rollouts = multi_turn_rollouts()
    source = fixed(rollouts, {rollout.rollout_id: rollout.written for rollout in rollouts})
trainer = Trainer(
    student=made.student,
    teacher=made.teacher,
    source=source,
    options=made.options,
    processes=processes,
)
history = [asdict(record) for record in trained(trainer)]
weights = {name: value.detach().contiguous() for name, value in trainer.parameters.items()}
save_file(weights, out.with_suffix(f".{processes.rank}.safetensors"))
if processes.is_first:
    out.write_text(json.dumps({"size": processes.size, "history": history}))
