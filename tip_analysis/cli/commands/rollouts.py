"""What a student wrote, sampled or brought in: `rollout`, `import`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tip_analysis.cli.option_groups import (
    Common,
    CommonOptions,
    EngineOptions,
    Engines,
    EnvironmentOptions,
    Environments,
    Flag,
    ModelOptions,
    Models,
    Pairs,
    RunFolder,
)
from tip_analysis.cli.option_values import parse_switches
from tip_analysis.cli.ranges import Count, CountOrNone, Few, Seed, Share, SomeCount, Temperature
from tip_analysis.core.names import OnBadRow


@dataclass(frozen=True)
class Rollout:
    """Sample rollouts of the student for every prompt."""

    run: RunFolder
    """Run folder; made if it does not exist."""
    student: str
    """The student: hub id (id@revision), local folder (a LoRA adapter's too), .gguf file, or a
    built-in name."""
    prompts: str | None = None
    """JSONL or Parquet file with problem, prompt or messages (and id, answer, solution), or a hub
    dataset (name:split); an environment may have tasks of its own."""
    num_rollouts: Few = 4
    """Rollouts of each prompt."""
    max_new_tokens: Count = 512
    """Longest response, in tokens."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Share = 1.0
    """Nucleus: sample from the most likely tokens that hold this much probability."""
    top_k: CountOrNone = 0
    """Sample from the k most likely tokens only; 0 is off."""
    seed: Seed = 0
    """Seed of the sampling: a rollout depends on it, on its prompt's id and on its index, not on
    its batch."""
    limit: SomeCount = None
    """Use the first N prompts only."""
    on_bad_row: OnBadRow = OnBadRow.FAIL
    """A row of the prompts that cannot be used: fail, or skip it and count it."""
    template: str = "plain"
    """The text around a problem: plain, boxed, or a text of your own that contains {problem}."""
    chat_template_kwargs: Pairs = ()
    """Switches for the chat template, such as enable_thinking=false."""
    grader: str | None = None
    """math, exact, none, module:function or file.py:function; by default math where prompts have
    answers."""
    prompts_per_batch: Count = 8
    """Prompts whose rollouts make one optimizer step (column batch_id)."""
    overwrite: Flag = False
    """Start afresh: removes the run's rollouts and what was built on them."""
    environments: Environments = field(default_factory=EnvironmentOptions)
    engines: Engines = field(default_factory=EngineOptions)
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Sample rollouts."""
        from tip_analysis.cli.console import show_summary
        from tip_analysis.rollouts.door import rollout

        summary = rollout(
            self.run,
            student=self.student,
            prompts=self.prompts,
            num_rollouts=self.num_rollouts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            limit=self.limit,
            on_bad_row=self.on_bad_row,
            template=self.template,
            chat_template_kwargs=parse_switches(self.chat_template_kwargs),
            grader=self.grader,
            prompts_per_batch=self.prompts_per_batch,
            engine=self.engines.settings(),
            **self.environments.chosen(),
            overwrite=self.overwrite,
            **self.models.loading(),
        )
        show_summary(f"{self.run}: {summary.title}", summary)


@dataclass(frozen=True)
class Import:
    """Bring in rollouts that another tool wrote, or text that is given."""

    run: RunFolder
    """Run folder; made if it does not exist."""
    from_: Annotated[str, arg(name="from", metavar="FORMAT")]
    """Who wrote them: native, text, chat, verl, trl, lighteval, lm-eval, openai, vllm,
    deepplanning."""
    files: Annotated[tuple[Path, ...], arg(metavar="FILE [FILE ...]")]
    """Files to read, or folders of them."""
    student: str
    """The model that wrote them, or is to be analysed on them: its tokenizer gives the token
    ids."""
    prompts: str | None = None
    """The prompts that they answer, as for `rollout`: chat markers and answers that the files lost
    come back from them."""
    template: str = "plain"
    """The text around a problem in the prompts: plain, boxed, or a text of your own that
    contains {problem}."""
    chat_template_kwargs: Pairs = ()
    """Switches for the chat template, such as enable_thinking=false."""
    reward_key: str | None = None
    """Field that holds the reward, where a format has several."""
    filter_name: str | None = None
    """Filter of lm-evaluation-harness whose rows to read."""
    all_turns: Flag = False
    """Analyse every turn of the assistant, not only the last."""
    prompts_per_batch: Count = 8
    """Prompts whose rollouts make one optimizer step (column batch_id), where the files name no
    step."""
    limit: SomeCount = None
    """Use the first N rollouts only."""
    on_bad_row: OnBadRow = OnBadRow.FAIL
    """What a row does that cannot be used: fail (nothing is imported; the message names file and
    line) or skip (it is left out, counted and reported)."""
    overwrite: Flag = False
    """Start afresh: removes the run's rollouts and what was built on them."""
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Bring in rollouts of another tool."""
        from tip_analysis.cli.console import show_note, show_summary
        from tip_analysis.rollouts.door import import_run

        summary = import_run(
            self.run,
            self.files,
            format=self.from_,
            student=self.student,
            prompts=self.prompts or (),
            overwrite=self.overwrite,
            template=self.template,
            chat_template_kwargs=parse_switches(self.chat_template_kwargs),
            reward_key=self.reward_key,
            filter_name=self.filter_name,
            all_turns=self.all_turns,
            prompts_per_batch=self.prompts_per_batch,
            limit=self.limit,
            on_bad_row=self.on_bad_row,
        )
        for warning in summary.pop("import_report")["warnings"]:
            show_note("note:", warning)
        show_summary(f"{self.run}: {summary.title}", summary)
