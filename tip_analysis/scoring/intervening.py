"""`intervene`: force another token, let the student finish, grade.

Reads rollouts and token table; writes `interventions/*.parquet`
(`instrument_tables.InterventionTable`), some tested tokens a shard. A continuation's random numbers
belong to (seed, rollout, position, continuation): it depends on no other test, and the student's
and the teacher's token are continued under the same ones.

Rewards are those of the run's grader, over the whole response: what was written before the tested
token, what was put in its place, and the continuation. Not covered: rollouts of several turns,
whose environment would have to be played again; they are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from tip_analysis.analysis.interventions import draw_tests
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.instrument_tables import InterventionTable
from tip_analysis.core.names import FinishReason, ForcedToken, SamplingEngine
from tip_analysis.core.progress import track as progress
from tip_analysis.core.record import Record, config_hash
from tip_analysis.core.run_folder import Run, RunLike, open_run
from tip_analysis.core.table_files import read
from tip_analysis.models.named import ModelLike, name_of
from tip_analysis.rollouts.engines.engine import Engine, Request
from tip_analysis.rollouts.engines.opening import EngineLike, Loading, opened, settings_of
from tip_analysis.rollouts.grading import default_grader, grade, resolve_grader
from tip_analysis.rollouts.sampling import Generation, Sampling
from tip_analysis.rollouts.stage import toy_pair_of
from tip_analysis.scoring.door import recorded_student

TESTS_PER_SHARD = 16
ROOM_STEP = 16
"""Room for continuations is asked for in such steps: batches are of one length limit."""


def intervene(
    run: RunLike,
    *,
    num_tokens: int = 200,
    num_continuations: int = 8,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    max_new_tokens: int | None = None,
    grader: str | None = None,
    seed: int = 0,
    student: ModelLike | None = None,
    engine: EngineLike = SamplingEngine.HF,
    server_url: str | None = None,
    token_budget: int = 16384,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> pl.DataFrame:
    """Test tokens by what becomes of the response when they are replaced.

    Args:
        run: a run folder with graded rollouts and scored tokens.
        num_tokens: tokens to test, as many from each quadrant.
        num_continuations: n, of each of the three choices.
        taxonomy: whose cuts make the quadrants.
        max_new_tokens: longest response; by default that of the run's rollouts.
        grader: a grader's name; by default the run's own.
        seed: of the draw and of the continuations.
        student: the model that wrote the rollouts, where it is loaded already.
        engine: what writes continuations: `hf`, `vllm`, `server`, `EngineSettings`, or an engine
            that is open.
        server_url: of the engine `server`.
        token_budget: tokens a batch; halves itself when memory runs out.
        dtype: of a student that is loaded.
        device: likewise.
        overwrite: test again what was tested already.

    Returns:
        Rows of `InterventionTable`; `intervention_effects` and `intervention_aucs` read them.

    Raises:
        RunError: rollouts are not graded, or are of several turns.
        OptionError: a number is below 1, or the run does not say how long responses may be.

    Example:
        tip.intervention_effects(tip.intervene("runs/mine", num_tokens=100))
    """
    if num_tokens < 1 or num_continuations < 1:
        raise OptionError("num_tokens and num_continuations must be at least 1")
    folder = open_run(run)
    rollouts = _testable(folder)
    sampled = folder.stages().get("rollout", {}).get("config", {})
    limit = max_new_tokens or _recorded_limit(sampled, rollouts)
    named = name_of(student) if student is not None else recorded_student(folder)
    config = {
        "num_tokens": num_tokens,
        "num_continuations": num_continuations,
        "taxonomy": taxonomy.arguments(),
        "max_new_tokens": limit,
        "grader": grader or sampled.get("grader"),
        "sampling": {name: sampled.get(name) for name in ("temperature", "top_p", "top_k")},
        "seed": seed,
        "student": named,
        **_engine_identity(engine, server_url),
    }
    inputs = {name: folder.table_hash(name) for name in ("rollouts", "tokens")}
    stage = folder.begin(
        "intervene",
        config=config,
        inputs=inputs,
        settings={"token_budget": token_budget},
        overwrite=overwrite,
        additive=True,
    )
    tests = _tests(folder, rollouts, taxonomy, num_tokens, seed)
    shards = [
        tests[start : start + TESTS_PER_SHARD] for start in range(0, tests.height, TESTS_PER_SHARD)
    ]
    missing = stage.missing(len(shards))
    if missing:
        loading = Loading(dtype, device, token_budget)
        test_key = config_hash({"config": config, "inputs": inputs})[:8]
        done = tests.height - sum(shards[index].height for index in missing)
        with (
            opened(engine, student or named, loading, server_url) as writer,
            progress("testing", tests.height, done=done, unit="tokens") as advance,
        ):
            grading = config["grader"] or default_grader(
                has_answer=True, is_toy=toy_pair_of(writer.author) is not None
            )
            resolve_grader(str(grading))
            drawing = _sampling(sampled, limit, seed)
            writer.expect(limit + max(map(len, rollouts["prompt_token_ids"])))
            work = _Work(writer, drawing, str(grading), num_continuations, test_key)
            for index in missing:
                stage.write(index, work.table(shards[index]))
                advance(shards[index].height)
    found = pl.concat([read(stage.path(index)) for index in range(len(shards))])
    stage.finish(num_tokens=tests.height, mean_reward=found["reward"].mean())
    return found


def _engine_identity(engine: EngineLike, server_url: str | None) -> dict[str, Any]:
    """Which engine writes, where it is not this package's own sampler."""
    settings = settings_of(engine, server_url)
    kind = engine.kind if settings is None else settings.engine  # pyright: ignore
    return {} if kind is SamplingEngine.HF else {"engine": str(kind)}


def _testable(run: Run) -> pl.DataFrame:
    """Rollouts that can be continued and graded.

    Raises:
        RunError: there are none; says what they lack.
    """
    columns = ["rollout_id", "prompt_token_ids", "response_token_ids", "prompt_text"]
    table = run.rollouts().select(*columns, "reward", "ground_truth", "loss_mask").collect()
    graded = table.drop_nulls("reward")
    if graded.is_empty():
        raise RunError(
            f"{run.path}: no rollout is graded, so there is no success to test; sample rollouts of"
            " prompts with answers"
        )
    single = graded.filter(pl.col("loss_mask").list.all())
    if single.is_empty():
        raise RunError(
            f"{run.path}: every graded rollout has turns that the student did not write; tests of"
            " such rollouts would have to play their environment again, which is not supported"
        )
    return single.drop("loss_mask")


def _recorded_limit(sampled: Record, rollouts: pl.DataFrame) -> int:
    limit = sampled.get("max_new_tokens")
    if isinstance(limit, int) and limit >= 1:
        return limit
    if not sampled:
        raise OptionError("the run does not say how long responses may be: give --max-new-tokens")
    return int(rollouts["response_token_ids"].list.len().max() or 1)  # pyright: ignore


def _sampling(sampled: Record, limit: int, seed: int) -> Sampling:
    return Sampling(
        max_new_tokens=limit,
        temperature=float(sampled.get("temperature", 1.0)),
        top_p=float(sampled.get("top_p", 1.0)),
        top_k=int(sampled.get("top_k", 0)),
        seed=seed,
    )


def _tests(
    run: Run, rollouts: pl.DataFrame, taxonomy: Taxonomy, num_tokens: int, seed: int
) -> pl.DataFrame:
    """The tokens to test, with all that a test needs."""
    tokens = run.tokens()
    placed = assign_quadrants(tokens, cuts=taxonomy.measure(tokens)).filter("loss_mask")
    narrow = placed.select(
        "rollout_id",
        "position",
        "prompt_id",
        "quadrant",
        "token_id",
        teacher_id=pl.col("teacher_topk_ids").list.first(),
    ).drop_nulls()
    able = narrow.collect().join(rollouts.select("rollout_id"), on="rollout_id", how="semi")
    drawn = draw_tests(able, num_tokens, seed=seed)
    keys = ["rollout_id", "position"]
    facts = able.select(*keys, "token_id", "teacher_id")
    return drawn.join(facts, on=keys, how="left", maintain_order="left").join(
        rollouts, on="rollout_id", how="left", maintain_order="left"
    )


@dataclass(frozen=True)
class _Continuation:
    """One response to finish."""

    test: dict[str, Any]
    choice: ForcedToken
    index: int
    begun: list[int]
    """The response up to and with what was put in."""
    forced: int | None

    def request(self, limit: int) -> Request:
        """What an engine is asked for; room is rounded up, so that tests share batches."""
        kind = "fresh" if self.choice is ForcedToken.FRESH else "forced"
        room = -(-self.room(limit) // ROOM_STEP) * ROOM_STEP
        return Request(
            f"{self.test['rollout_id']}@{self.test['position']}/{kind}/{self.index}",
            [*self.test["prompt_token_ids"], *self.begun],
            min(room, limit),
        )

    def room(self, limit: int) -> int:
        """Tokens that may follow."""
        return limit - len(self.begun)


@dataclass(frozen=True)
class _Work:
    """Who writes continuations, and how they are graded."""

    engine: Engine
    sampling: Sampling
    grader: str
    num_continuations: int
    test_key: str

    def table(self, tests: pl.DataFrame) -> pl.DataFrame:
        """Rows of `InterventionTable` of some tests, in their order."""
        jobs = {
            choice: [
                job for test in tests.iter_rows(named=True) for job in self._jobs(test, choice)
            ]
            for choice in ForcedToken
        }
        made: dict[ForcedToken, list[Generation]] = {}
        for choice, listed in jobs.items():
            known = self._of_the_same_token(listed, jobs, made)
            made[choice] = self._finished(listed, known)
        rows = [
            self._row(job, generation)
            for choice, listed in jobs.items()
            for job, generation in zip(listed, made[choice], strict=True)
        ]
        return pl.DataFrame(rows, schema=polars_schema(InterventionTable))

    def _jobs(self, test: dict[str, Any], choice: ForcedToken) -> Iterator[_Continuation]:
        before = test["response_token_ids"][: test["position"]]
        forced = {ForcedToken.STUDENT: test["token_id"], ForcedToken.TEACHER: test["teacher_id"]}
        token = forced.get(choice)
        begun = [*before, *([] if token is None else [token])]
        for index in range(self.num_continuations):
            yield _Continuation(test, choice, index, begun, token)

    def _of_the_same_token(
        self,
        jobs: Sequence[_Continuation],
        every: Mapping[ForcedToken, Sequence[_Continuation]],
        made: Mapping[ForcedToken, Sequence[Generation]],
    ) -> dict[int, Generation]:
        """Where the teacher's token is the student's own, the continuations are the same ones."""
        if not jobs or jobs[0].choice is not ForcedToken.TEACHER:
            return {}
        own, written = every[ForcedToken.STUDENT], made[ForcedToken.STUDENT]
        return {
            number: written[number]
            for number, job in enumerate(jobs)
            if job.forced == own[number].forced
        }

    def _finished(
        self, jobs: Sequence[_Continuation], known: Mapping[int, Generation]
    ) -> list[Generation]:
        """Each response finished; what needs no continuation has an empty one."""
        limit, made, wanted = self.sampling.max_new_tokens, dict(known), []
        for number, job in enumerate(jobs):
            if number in made:
                continue
            stopped = job.forced in self.engine.author.stop_token_ids
            if stopped or job.room(limit) < 1:
                reason = FinishReason.STOP if stopped else FinishReason.LENGTH
                made[number] = Generation([], [], reason)
            else:
                wanted.append(number)
        requests = [jobs[number].request(limit) for number in wanted]
        for number, one in zip(wanted, self.engine.generate(requests, self.sampling), strict=True):
            made[number] = _cut(one, jobs[number].room(limit))
        return [made[number] for number in range(len(jobs))]

    def _row(self, job: _Continuation, generation: Generation) -> dict[str, Any]:
        response = [*job.begun, *generation.token_ids]
        text = str(self.engine.author.tokenizer.decode(response, skip_special_tokens=True))
        test = job.test
        reward = grade(self.grader, text, test["ground_truth"], prompt_text=test["prompt_text"])
        if reward is None:
            raise RunError(
                f"the grader {self.grader!r} has no verdict on a response to"
                f" {test['prompt_id']!r}; choose another with --grader"
            )
        return {
            "test_key": self.test_key,
            "rollout_id": test["rollout_id"],
            "position": test["position"],
            "choice": str(job.choice),
            "continuation": job.index,
            "prompt_id": test["prompt_id"],
            "stratum": test["stratum"],
            "forced_token_id": job.forced,
            "reward": reward,
            "num_tokens": len(response),
            "finish_reason": str(generation.finish_reason),
        }


def _cut(generation: Generation, room: int) -> Generation:
    """A continuation that may have so many tokens."""
    if len(generation.token_ids) <= room:
        return generation
    return Generation(generation.token_ids[:room], generation.logprobs[:room], FinishReason.LENGTH)
