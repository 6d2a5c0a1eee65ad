"""A process that runs DeepPlanning's own tools, prompts and evaluation out of a user's checkout.

It imports nothing of this package. Requests are lines of JSON on stdin, answers on what was stdout;
what the benchmark prints is thrown away. Both of its domains have a package `tools`, so that one
process serves one domain; a tool that hangs is ended with its process.
"""

import json
import os
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any


def refuse_model(*args: Any, **kwargs: Any) -> None:
    """In place of the benchmark's client: turns are written elsewhere."""
    raise RuntimeError("the benchmark's own model is not called here")


class Domain:
    """One of the two domains, for one task."""

    def __init__(self, folder: str, kind: str) -> None:
        self.folder, self.kind = Path(folder), kind
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        client = types.ModuleType("agent.call_llm")
        client.call_llm = refuse_model  # type: ignore[attr-defined]
        sys.modules["agent.call_llm"] = client
        self.agent: Any = None

    def prompt(self, variant: str) -> str:
        """The benchmark's system prompt: of a language, or of a level."""
        prompts = import_module("agent.prompts")

        if self.kind == "travel":
            return prompts.get_system_prompt(variant)
        return getattr(prompts.prompt_lib, f"SYSTEM_PROMPT_level{variant}")

    def set_up(self, sample: str, variant: str, database: str) -> list[str]:
        """Make the benchmark's agent for one sample; returns the names of its tools."""
        if self.kind == "travel":
            ToolsFnAgent = import_module("agent.tools_fn_agent").ToolsFnAgent

            self.agent = ToolsFnAgent(
                model="none", sample_id=sample, database_base_path=database, language=variant
            )
        else:
            ShoppingFnAgent = import_module("agent.shopping_agent").ShoppingFnAgent

            schema = str(self.folder / "tools" / "shopping_tool_schema.json")
            self.agent = ShoppingFnAgent(
                model="none", tool_schema_path=schema, sample_id=sample, database_base_path=database
            )
        return sorted(self.agent.tool_instances)

    def call(self, name: str, arguments: str) -> str:
        """What a tool answers, as the benchmark's runner would have it."""
        return self.agent._exec_tool(name, arguments)

    def second_question(self) -> str:
        """What the shopping runner says once the model has stopped for the first time."""
        return self.agent._add_to_cart([])[-1]["content"]

    def score_cart(self, case: str) -> dict[str, Any]:
        """The benchmark's verdict on a cart."""
        evaluate_single_case = import_module("evaluation.evaluation_pipeline").evaluate_single_case

        return evaluate_single_case(Path(case))

    def score_plan(
        self, content: str, sample: str, variant: str, database: str, results: str
    ) -> dict[str, Any]:
        """The benchmark's verdict on a plan: written as its report, converted by it, judged."""
        plan = self.agent._extract_plan_content(content)
        if not plan:
            return {"delivered": False}
        folder = Path(results)
        (folder / "reports").mkdir(parents=True, exist_ok=True)
        (folder / "reports" / f"id_{sample}.txt").write_text(plan, encoding="utf-8")
        convert_reports = import_module("evaluation.convert_report").convert_reports
        evaluate_plans = import_module("evaluation.eval_converted").evaluate_plans

        convert_reports(result_dir=folder, language=variant, workers=1)
        evaluate_plans(
            result_dir=folder,
            test_data_path=self.folder / "data" / f"travelplanning_query_{variant}.json",
            database_dir=Path(database),
            workers=1,
        )
        scored = folder / "evaluation" / f"id_{sample}_score.json"
        if not scored.is_file():
            return {"delivered": False}
        return {"delivered": True, **json.loads(scored.read_text("utf-8"))["scores"]}


def serve() -> None:
    """Answer requests until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    sys.stdout = os.fdopen(silence, "w", encoding="utf-8")
    domain: Domain | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "open":
                domain, found = Domain(**request["with"]), True
            else:
                found = getattr(domain, request["do"])(**request["with"])
            answer = {"found": found}
        except BaseException as problem:
            answer = {"error": f"{type(problem).__name__}: {problem}"}
        out.write(json.dumps(answer, ensure_ascii=False) + "\n")
        out.flush()


if __name__ == "__main__":
    serve()
