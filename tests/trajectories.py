"""A batch of trajectories that can be killed: `python trajectories.py RUN DIES_AT`."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scripted_engine import CHATML_TOOLS, ScriptedEngine, chat_tokenizer, token_model

from tip_analysis.core.run_folder import create_run
from tip_analysis.rollouts.environments.registry import EnvironmentSource
from tip_analysis.rollouts.environments.stage import sample_trajectories
from tip_analysis.rollouts.environments.tool_box import ToolBox, tool_schema
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling

CALL = '<tool_call>\n{"name": "double", "arguments": {"x": 3}}\n</tool_call>'
TOOLS = [tool_schema("double", "Doubles.", {"x": {"type": "integer"}})]


class Doubler:
    def reset(self, task):
        self.start, self.tools = task.seed % 7, ToolBox({"double": lambda x: 2 * x + self.start})
        return [{"role": "user", "content": task.row["problem"]}], TOOLS

    def step(self, message):
        answers = self.tools.answer(message)
        return answers, not answers

    def reward(self, trajectory):
        return {"p0": 0.0}.get(trajectory.task.id, 0.5), {"calls": float(len(trajectory.messages))}


class Dying(ScriptedEngine):
    dies_at = -1

    def generate(self, requests, sampling, advance=None):
        if len(self.asked) == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(requests, sampling, advance)


def engine(dies_at=-1):
    texts = {
        f"p{i}/{j}": [*[CALL] * ((i + j) % 3), f"It is {i}{j}."] for i in range(6) for j in (0, 1)
    }
    made = Dying(token_model(chat_tokenizer(CHATML_TOOLS)), texts)
    made.dies_at = dies_at
    return made


def sample(path, dies_at=-1, **how):
    writer = engine(dies_at)
    prompts = [Prompt(f"p{i}", problem=f"Task {i}", answer="6") for i in range(6)]
    return sample_trajectories(
        create_run(path),
        student=writer.author,
        source=EnvironmentSource("doubler", Doubler),
        prompts=prompts,
        sampling=Sampling(600),
        engine=writer,
        num_rollouts=2,
        prompts_per_batch=4,
        **how,
    )


if __name__ == "__main__":
    sample(Path(sys.argv[1]), int(sys.argv[2]))
