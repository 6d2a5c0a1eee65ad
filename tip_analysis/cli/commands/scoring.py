"""Both models over every token: `score`."""

from dataclasses import dataclass, field

from tip_analysis.cli.option_groups import (
    Common,
    CommonOptions,
    Flag,
    ModelOptions,
    Models,
    RunFolder,
)
from tip_analysis.cli.option_values import parse_part
from tip_analysis.cli.ranges import Count, Few, SomeProcesses, TopK, Wait
from tip_analysis.core.names import (
    ScoringEngine,
    ScoringPhase,
    StopTokens,
    TeacherContext,
    TeacherStoreForm,
)


@dataclass(frozen=True)
class Score:
    """Score every response token with student and teacher: entropies, divergences, top-k, logit
    gradients."""

    run: RunFolder
    """Run folder with rollouts."""
    teacher: str
    """The teacher: named as the student is; or http://HOST:PORT#MODEL, a model behind a server,
    whose top tokens make divergences lower bounds."""
    student: str | None = None
    """The student; by default the one that wrote the rollouts."""
    teacher_context: TeacherContext = TeacherContext.NONE
    """What the teacher sees besides the prompt: nothing, or the reference solution in the user's
    turn."""
    top_k: TopK = 5
    """How many of each model's most likely tokens are kept."""
    stop_tokens: StopTokens = StopTokens.DECLARED
    """Tokens with which student or teacher stop: as they are declared, or merged into one, so that
    which of them a model prefers is no disagreement."""
    shard_size: Count = 64
    """Rollouts a shard: what is done again after an interruption."""
    shard: str = "0/1"
    """i/n: make only every n-th shard, from the i-th on, as one of n array jobs."""
    phase: ScoringPhase = ScoringPhase.BOTH
    """Both models at once; or, where they do not fit together, first the teacher, whose states are
    stored, then the student."""
    teacher_store: TeacherStoreForm = TeacherStoreForm.HIDDEN
    """What --phase teacher stores: hidden states (exact), or the top tokens (smaller; divergences
    become lower bounds)."""
    store_k: Count = 64
    """Tokens that --teacher-store topk keeps, or that a teacher's server is asked for."""
    server_concurrency: Few = 16
    """Requests that a teacher's server is given at once."""
    server_timeout: Wait = 600.0
    """Seconds that one answer of it may take."""
    discard_teacher_states: Flag = False
    """With --phase student: delete the teacher's states once every token is scored."""
    engine: ScoringEngine = ScoringEngine.LOCAL
    """One process, or Ray actors that share the work."""
    ray_workers: SomeProcesses = None
    """Ray actors; by default one for each GPU, or one for each machine without GPUs."""
    overwrite: Flag = False
    """Start afresh: removes the run's token table and what was built on it."""
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Score rollouts with both models, at once or one after the other."""
        from tip_analysis.cli.console import show_summary
        from tip_analysis.scoring.door import score

        summary = score(
            self.run,
            teacher=self.teacher,
            student=self.student,
            teacher_context=self.teacher_context,
            top_k=self.top_k,
            stop_tokens=self.stop_tokens,
            shard_size=self.shard_size,
            part=parse_part(self.shard),
            phase=self.phase,
            teacher_store=self.teacher_store,
            store_k=self.store_k,
            server_concurrency=self.server_concurrency,
            server_timeout=self.server_timeout,
            discard_teacher_states=self.discard_teacher_states,
            engine=self.engine,
            ray_workers=self.ray_workers,
            overwrite=self.overwrite,
            **self.models.loading(),
        )
        show_summary(f"{self.run}: {summary.title}", summary)
