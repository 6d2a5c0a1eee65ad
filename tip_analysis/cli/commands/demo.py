"""Everything on the embedded pair: `demo`."""

from dataclasses import dataclass, field
from pathlib import Path

from tip_analysis.cli.option_groups import Common, CommonOptions, Flag, ModelOptions, Models
from tip_analysis.cli.ranges import Few, Seed, ToyPrompts


@dataclass(frozen=True)
class Demo:
    """Run everything on the embedded arithmetic pair, and write a report: a few minutes on a
    laptop."""

    out: Path = Path("runs/demo")
    """Run folder to write."""
    report: Path | None = None
    """Report to write; by default reports/NAME.html, NAME being the run folder's."""
    num_prompts: ToyPrompts = 192
    """Problems to solve."""
    num_rollouts: Few = 4
    """Rollouts of each problem."""
    seed: Seed = 0
    """Seed of the sampling."""
    overwrite: Flag = False
    """Start afresh, whatever the folder holds."""
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Everything, on the embedded pair."""
        from tip_analysis.cli.console import console, show_summary, show_table
        from tip_analysis.demo.demo_run import DIVERGENCE_CUT, ENTROPY_CUT, run_demo

        report_path = self.report or Path("reports") / f"{self.out.resolve().name}.html"
        result = run_demo(
            self.out,
            report_path,
            num_prompts=self.num_prompts,
            num_rollouts=self.num_rollouts,
            seed=self.seed,
            token_budget=self.models.tokens_a_batch(),
            overwrite=self.overwrite,
            say=console.print,
        )
        show_table(
            f"quadrants (cuts: entropy {ENTROPY_CUT} nats, reverse KL {DIVERGENCE_CUT} nats)",
            result.shares,
        )
        show_summary(
            "planted errors (confident: student top-1 probability ≥ 0.9)",
            result.detection.row(0, named=True),
        )
        columns = [
            "rule",
            "retention_ratio",
            "accuracy",
            "best_at_k",
            "heldout_reverse_kl",
            "tokens_trained",
        ]
        show_table(
            "ablation (one seed, few steps: the full one is `tip-analysis ablate`)",
            result.arms.select(columns),
        )
        console.print(f"run folder: {self.out}\nreport:     {result.report}", soft_wrap=True)
