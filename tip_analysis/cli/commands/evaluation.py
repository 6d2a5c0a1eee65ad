"""What a model solves: `evaluate`."""

from dataclasses import dataclass, field

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
    Texts,
)
from tip_analysis.cli.option_values import parse_switches
from tip_analysis.cli.ranges import Count, Few, Seed, Share, SomeCount, Temperature
from tip_analysis.core.names import OnBadRow


@dataclass(frozen=True)
class Evaluate:
    """Sample answers to problems, grade them, and report mean@k and Best@k with standard errors."""

    run: RunFolder
    """Run folder that the rows go to; made if it does not exist."""
    model: str
    """The model: named as a student is."""
    prompts: Texts = ()
    """Problems with answers, as for `rollout`; each file or hub dataset is a benchmark of its
    own. An environment may have tasks of its own."""
    num_samples: Few = 16
    """k, samples of each problem."""
    max_new_tokens: Count = 512
    """Longest response, in tokens."""
    temperature: Temperature = 1.0
    """Sampling temperature."""
    top_p: Share = 1.0
    """Nucleus."""
    seed: Seed = 0
    """Seed of the sampling."""
    limit: SomeCount = None
    """Use the first N problems of each benchmark only."""
    on_bad_row: OnBadRow = OnBadRow.FAIL
    """A row that cannot be used, one without an answer included: fail, or skip it and count it."""
    template: str = "plain"
    """The text around a problem."""
    chat_template_kwargs: Pairs = ()
    """Switches for the chat template."""
    grader: str | None = None
    """math, exact, module:function or file.py:function; by default math, or exact for the
    arithmetic pair."""
    overwrite: Flag = False
    """Make the rows of this configuration again."""
    environments: Environments = field(default_factory=EnvironmentOptions)
    engines: Engines = field(default_factory=EngineOptions)
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Grade samples of a model."""
        from tip_analysis.cli.console import show_summary
        from tip_analysis.training.door import evaluate

        summary = evaluate(
            self.run,
            model=self.model,
            prompts=self.prompts or None,
            **self.environments.chosen(),
            num_samples=self.num_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            limit=self.limit,
            on_bad_row=self.on_bad_row,
            template=self.template,
            chat_template_kwargs=parse_switches(self.chat_template_kwargs),
            grader=self.grader,
            engine=self.engines.settings(),
            overwrite=self.overwrite,
            **self.models.loading(),
        )
        tasks = ", ".join(self.prompts) or self.environments.environment
        show_summary(f"{self.model} on {tasks}", summary)
