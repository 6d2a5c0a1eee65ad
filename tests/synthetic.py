"""Valid run tables without any model: small, large and hostile, from a seed.

Two distributions are drawn for every token and every column of the token table is computed from
them in float64, so that all columns belong together (divergences, top-k, entropies, the sampled
token's log-probability). Four kinds of token make the four quadrants: `plain` (both sure, both
right), `fork` (both unsure in the same way), `planted_error` (the student sure, the teacher sure of
something else) and a dense kind (both unsure, differently).
"""

from dataclasses import dataclass
from pathlib import Path

import dataframely as dy
import numpy as np
import polars as pl

from tip_analysis.core.contract_checks import validate
from tip_analysis.core.run_folder import create_run
from tip_analysis.core.schema import (
    AblationTable,
    DynamicsTable,
    GradientTable,
    MaskTable,
    RolloutTable,
    TokenTable,
)

_WORDS = (
    "the",
    "a",
    "is",
    "of",
    "so",
    "we",
    "add",
    "then",
    "and",
    "carry",
    "sum",
    "first",
    "last",
    "equals",
    "let",
    "step",
)
_MARKS = ("+", "=", ".", ",", "\n", "(", ")", "un", "break", "able", "<eos>")
_SCRIPTS = (" naïve", " γειά", "你", "好", " سلام", " שלום", "\ufffd", "👍")
VOCABULARY = (*(f" {word}" for word in _WORDS), *"0123456789", *_MARKS, *_SCRIPTS)
"""Whole words, digits, marks, line breaks, Greek, CJK, right-to-left, a lone byte and an emoji."""

HOSTILE_TOKENS = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=2</script>",
    '<img src=x onerror="window.hacked=3">',
    "<!--<script>",
    "&lt;b&gt;&amp;",
    "{{ 7*7 }}{% raw %}",
    "\"'`${window.hacked=4}",
    "\u2028\u2029",
    "\x01\x07\x1b[31m",
    "\u202egnp.exe",
    "a" + "\u0301" * 60,
    "javascript:window.hacked=5",
    "]]>",
    "\\u003cscript\\u003e",
)
"""Token texts that would run, break out of a string or mark, or garble a page that trusts them."""

ARM_ACCURACIES = {
    ("all", 1.0): 0.80,
    ("entropy_sampling", 0.5): 0.82,
    ("soft_or", 0.5): 0.84,
    ("soft_or_bottom", 0.5): 0.30,
    ("entropy_sampling", 0.1): 0.66,
    ("soft_or", 0.1): 0.72,
    ("q3", 0.1): 0.79,
    ("divergence", 0.1): 0.70,
    ("random", 0.1): 0.60,
}
"""True accuracy of each synthetic arm."""

KINDS = ("plain", "fork", "planted_error", "dense")


@dataclass(frozen=True)
class Tables:
    """The tables of one run; `vocabulary` maps token id to text by its index."""

    rollouts: pl.DataFrame
    tokens: pl.DataFrame
    gradients: pl.DataFrame
    masks: pl.DataFrame
    vocabulary: tuple[str, ...]


def make_tables(
    *,
    num_prompts: int = 8,
    rollouts_per_prompt: int = 4,
    mean_length: int = 40,
    seed: int = 0,
    vocabulary: tuple[str, ...] = VOCABULARY,
    rewards: bool = True,
    planted: bool = True,
    kind_shares: tuple[float, float, float, float] = (0.42, 0.34, 0.08, 0.16),
    top_k: int = 5,
    gradients: bool = True,
) -> Tables:
    """A whole run. `kind_shares` are the shares of plain, fork, planted_error and dense tokens."""
    rng = np.random.default_rng(seed)
    num_rollouts = num_prompts * rollouts_per_prompt
    lengths = np.maximum(1, rng.poisson(mean_length, num_rollouts))
    num_tokens = int(lengths.sum())
    kinds = rng.choice(4, size=num_tokens, p=np.asarray(kind_shares))
    student, teacher = _distributions(kinds, len(vocabulary), rng)
    sampled = (student.cumsum(1) < rng.random((num_tokens, 1))).sum(1).clip(0, len(vocabulary) - 1)
    prompt_of = np.arange(num_rollouts) // rollouts_per_prompt
    sample_of = np.arange(num_rollouts) % rollouts_per_prompt
    prompt_ids = [f"p{prompt:03d}" for prompt in prompt_of]
    rollout_ids = [
        f"{prompt}/{sample}" for prompt, sample in zip(prompt_ids, sample_of, strict=True)
    ]
    row_rollout = np.repeat(np.arange(num_rollouts), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    labels = np.array(["plain", "fork", "planted_error", "plain"])[kinds]
    columns = _statistics(student, teacher, sampled, top_k)
    tokens = (
        pl.DataFrame(
            {
                **dict.fromkeys(TokenTable.column_names()),  # null, but for what follows
                "rollout_id": np.array(rollout_ids, dtype=object)[row_rollout],
                "prompt_id": np.array(prompt_ids, dtype=object)[row_rollout],
                "position": position,
                "batch_id": prompt_of[row_rollout] // 8,
                "token_id": sampled,
                "token": [vocabulary[index] for index in sampled],
                "loss_mask": np.ones(num_tokens, dtype=bool),
                "turn": np.zeros(num_tokens, dtype=np.int32),
                "segment": ["answer"] * num_tokens,
                "planted_label": labels if planted else [None] * num_tokens,
                "artefact": [None] * num_tokens,
                **columns,
            },
            strict=False,
        )
        .pipe(_with_nulls)
        .cast(_dtypes(TokenTable))
        .select(TokenTable.column_names())
    )
    rollouts = _rollout_table(
        tokens, rollout_ids, prompt_ids, sample_of, prompt_of, rng, rewards, planted
    )
    tokens = validate(tokens, TokenTable)
    gradient_table = _gradient_table(tokens, kinds, rng) if gradients else _empty(GradientTable)
    return Tables(rollouts, tokens, gradient_table, _mask_table(tokens), vocabulary)


def make_large_tokens(num_tokens: int, *, seed: int = 0) -> Tables:
    """A run of about `num_tokens` tokens: a drawn block of 500 rollouts, repeated under new prompt
    ids."""
    block = make_tables(
        num_prompts=125, rollouts_per_prompt=4, mean_length=200, seed=seed, gradients=False
    )
    repeats = max(1, round(num_tokens / block.tokens.height))
    renamed = [_renamed(block, index) for index in range(repeats)]
    return Tables(
        rollouts=pl.concat([part.rollouts for part in renamed]),
        tokens=pl.concat([part.tokens for part in renamed]),
        gradients=block.gradients,
        masks=_empty(MaskTable),
        vocabulary=block.vocabulary,
    )


def make_hostile_tables(*, long_token: int = 1_000_000) -> Tables:
    """One graded-less run whose tokens are markup, quotes, control characters and one token of
    `long_token` characters."""
    vocabulary = (*HOSTILE_TOKENS, "x" * long_token, *VOCABULARY)
    tables = make_tables(
        num_prompts=3,
        rollouts_per_prompt=2,
        mean_length=30,
        seed=5,
        vocabulary=vocabulary,
        rewards=False,
        planted=False,
    )
    forced = np.arange(tables.tokens.height) % (len(HOSTILE_TOKENS) + 1)
    tokens = tables.tokens.with_columns(
        token_id=pl.Series(forced, dtype=pl.Int32),
        token=pl.Series([vocabulary[index] for index in forced]),
    )
    text = tokens.group_by("rollout_id", maintain_order=True).agg(
        response_text=pl.col("token").str.head(200).str.join(""),
        response_token_ids=pl.col("token_id"),
    )
    rollouts = tables.rollouts.drop("response_text", "response_token_ids").join(
        text, on="rollout_id", maintain_order="left"
    )
    rollouts = rollouts.with_columns(
        prompt_text=pl.lit("</script><script>window.hacked=6</script><b onclick='x'>")
    )
    return Tables(
        validate(rollouts, RolloutTable),
        validate(tokens, TokenTable),
        tables.gradients,
        tables.masks,
        vocabulary,
    )


def write_run(path: Path, tables: Tables, *, config: dict | None = None) -> Path:
    """Write the tables as a run folder through the package's own writers; `config` is added to the
    score stage's."""
    run = create_run(path)
    sampling = {"student": "synthetic-student", "temperature": 1.0, "top_p": 1.0, "seed": 0}
    scoring = {"student": "synthetic-student", "teacher": "synthetic-teacher", **(config or {})}
    for stage, frame, settings in (
        ("rollout", tables.rollouts, sampling),
        ("vocabulary", _vocabulary_table(tables.vocabulary), {}),
        ("score", tables.tokens, scoring),
        ("gradients", tables.gradients, {"loss": ["reverse_kl", "forward_kl"], "num_probes": 32}),
        ("select", tables.masks, {"rules": ["entropy", "divergence", "q3"]}),
    ):
        if frame.height:
            work = run.begin(stage, config=settings, additive=stage in ("gradients", "select"))
            work.write(0, frame)
            work.finish(tokens_per_second=1234.5, num_rows=frame.height)
    return path


def _vocabulary_table(texts: tuple[str, ...]) -> pl.DataFrame:
    ids = pl.Series(range(len(texts)), dtype=pl.Int32)
    return pl.DataFrame({"token_id": ids, "token": list(texts)})


def make_three_measurements(tables: Tables, *, seed: int = 0) -> list[pl.DataFrame]:
    """Three measurements of the reverse KL's gradients that differ in every number: two scopes, two
    methods."""
    first = tables.gradients.filter(pl.col("loss") == "reverse_kl")
    rng = np.random.default_rng(seed)
    made = [first]
    for scope, method, probes in (("head", "probe", 32), ("all", "exact", 0)):
        norm, phi = (rng.normal(size=first.height) for _ in range(2))
        made.append(
            first.with_columns(
                param_scope=pl.lit(scope),
                method=pl.lit(method, first.schema["method"]),
                num_probes=pl.lit(probes, pl.Int32),
                grad_norm_sq=pl.Series(norm**2),
                grad_norm_sq_se=pl.Series(norm**2 * (0.25 if probes else 0.0)),
                grad_dot_loss=pl.Series(phi),
            )
        )
    return [validate(frame, GradientTable) for frame in made]


def write_measurement(path: Path, gradients: pl.DataFrame) -> None:
    """Add one measurement to a run folder, with a record of its own as the package makes it."""
    names = ["loss", "param_scope", "method", "num_probes", "seed"]
    key = gradients.select(names).unique().row(0, named=True)
    stage = create_run(path).begin("gradients", key=key, config=key)
    stage.write(0, gradients)
    stage.finish(num_rows=gradients.height)


def make_ablations(
    *,
    seeds: int = 3,
    problems: int = 40,
    samples: int = 4,
    seed: int = 0,
    benchmark: str = "problems",
) -> pl.DataFrame:
    """Arms whose true accuracies are those of `ARM_ACCURACIES`; the seeds share their problems."""
    rng = np.random.default_rng(seed)
    rows = []
    hardness = rng.normal(scale=0.15, size=problems)
    for index, ((rule, ratio), mean) in enumerate(
        {("untrained", 1.0): 0.5, **ARM_ACCURACIES}.items()
    ):
        for run_seed in range(seeds):
            chance = np.clip(mean + hardness + 0.004 * rng.normal(), 0.0, 1.0)
            graded = rng.random((problems, samples)) < chance[:, None]
            steps = 0 if rule == "untrained" else 60
            key = f"arm{index}-{run_seed}"
            row = _arm_row(key, rule, ratio, run_seed, steps, graded)
            rows.append(row | {"benchmark": benchmark})
    return validate(
        pl.DataFrame(rows, strict=False)
        .cast(_dtypes(AblationTable))
        .select(AblationTable.column_names()),
        AblationTable,
    )


def make_dynamics(ablations: pl.DataFrame, *, steps: int = 60, seed: int = 0) -> pl.DataFrame:
    """Observed steps of the trained arms of an ablation: curves with noise, Q2 empty at times."""
    rng = np.random.default_rng(seed)
    arms = ablations.filter(pl.col("step") > 0).select("arm_key", "rule", "retention_ratio", "seed")
    rows = [
        arm | _observed(step, rng)
        for arm in arms.unique(maintain_order=True).to_dicts()
        for step in range(steps)
    ]
    frame = pl.DataFrame(rows, strict=False).cast(_dtypes(DynamicsTable))
    return validate(frame.select(DynamicsTable.column_names()), DynamicsTable)


def _observed(step: int, rng: np.random.Generator) -> dict[str, object]:
    shares = rng.dirichlet([4, 3, 1, 5])
    quadrants = {f"share_q{i}": float(shares[i - 1]) for i in range(1, 5)}
    quadrants |= {f"divergence_q{i}": float(rng.random()) for i in range(1, 5)}
    quadrants |= {f"selected_share_q{i}": float(rng.random()) for i in range(1, 5)}
    return quadrants | {
        "step": step,
        "loss": float(0.5 / (1 + step) + 0.05 * rng.random()),
        "learning_rate": 1e-3 * (1 - step / 60),
        "grad_norm": float(rng.random()),
        "tokens_seen": 1000,
        "tokens_trained": 500,
        "response_tokens": 40.0 + float(rng.normal()),
        "truncated_share": None,
        "student_entropy": 0.3,
        "reverse_kl": float(0.5 / (1 + step)),
        "divergence_q2": None if step % 7 == 0 else 0.1,
        "soft_or_overlap": 0.6,
        "topk_overlap": 0.8,
    }


def write_dynamics(path: Path, dynamics: pl.DataFrame) -> None:
    """Add the observed steps of an ablation to a run folder."""
    stage = create_run(path).begin("dynamics", config={"arms": dynamics["arm_key"].n_unique()})
    stage.write(0, dynamics)
    stage.finish()


def write_ablations(path: Path, ablations: pl.DataFrame) -> None:
    """Add an ablation to a run folder."""
    stage = create_run(path).begin("ablate", config={"rules": sorted(ablations["rule"].unique())})
    stage.write(0, ablations)
    stage.finish()


def _arm_row(
    key: str, rule: str, ratio: float, seed: int, steps: int, graded: np.ndarray
) -> dict[str, object]:
    means = graded.mean(1)
    return {
        "arm_key": key,
        "rule": rule,
        "retention_ratio": ratio,
        "selection_scope": "rollout",
        "seed": seed,
        "mode": "on_policy",
        "loss": "reverse_kl",
        "weighting": "none",
        "loss_normalizer": "selected",
        "loss_aggregation": "rollout",
        "step": steps,
        "num_steps": steps,
        "accuracy": float(means.mean()),
        "accuracy_se": float(means.std() / np.sqrt(len(means))),
        "best_at_k": float(graded.max(1).mean()),
        "num_problems": len(means),
        "num_samples": graded.shape[1],
        "heldout_reverse_kl": 0.1,
        "tokens_trained": int(10_000 * ratio),
        "tokens_seen": 10_000,
        "train_loss": 0.2,
        "losses": [0.2] * steps,
        "learning_rate": 1e-3,
        "step_time_s": 0.3,
        "peak_memory_bytes": int(5e8 * (0.6 + 0.4 * ratio)),
        "drift_reverse_kl": None,
        "effective_sample_size": None,
        "problem_ids": [f"q{index}" for index in range(len(means))],
        "problem_accuracy": means.tolist(),
        "problem_best": graded.max(1).astype(float).tolist(),
        "problem_correct": graded.sum(1).tolist(),
        "majority_at_k": float((graded.mean(1) > 0.5).mean()),
        "response_tokens": 40.0,
        "truncated_share": 0.05,
    }


def _distributions(
    kinds: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of probabilities [N, V] for each kind of token."""
    num = len(kinds)
    shared, own, other = (rng.normal(size=(num, size)) for _ in range(3))
    rows = np.arange(num)
    best, wrong = rng.integers(0, size, num), rng.integers(0, size, num)
    sure = rng.uniform(6, 12, num)
    student, teacher = shared + 0.15 * own, shared + 0.15 * other
    plain, error, dense, fork = (kinds == 0), (kinds == 2), (kinds == 3), (kinds == 1)
    student[rows[plain], best[plain]] += sure[plain]
    teacher[rows[plain], best[plain]] += sure[plain] + 1
    student[rows[error], wrong[error]] += sure[error]
    teacher[rows[error], best[error]] += sure[error]
    student[fork] *= 1.4
    teacher[fork] *= 1.4
    student[dense] = 1.5 * (shared + own)[dense]
    teacher[dense] = 1.5 * (shared + other)[dense] + 1.0 * other[dense]
    return _softmax(student), _softmax(teacher)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def _statistics(p: np.ndarray, q: np.ndarray, sampled: np.ndarray, top_k: int) -> dict[str, object]:
    """The statistics of method section 2, plainly in float64: [N, V] x 2 -> columns of N."""
    log_p, log_q, rows = np.log(p), np.log(q), np.arange(len(p))
    d = log_p - log_q
    reverse, forward = (p * d).sum(1).clip(0), (-q * d).sum(1).clip(0)
    m = (p + q) / 2
    entropy = -(p * log_p).sum(1).clip(None, 0)
    g = p - q
    curvature = (p * g**2).sum(1) - (p * g).sum(1) ** 2
    order_p, order_q = np.argsort(-p, 1, kind="stable"), np.argsort(-q, 1, kind="stable")
    top_p, top_q = order_p[:, :top_k], order_q[:, :top_k]
    return {
        "student_entropy": entropy,
        "student_entropy_norm": entropy / np.log(p.shape[1]),
        "teacher_entropy": -(q * log_q).sum(1).clip(None, 0),
        "reverse_kl": reverse,
        "forward_kl": forward,
        "jsd": (0.5 * (p * np.log(p / m) + q * np.log(q / m)).sum(1)).clip(0),
        "hellinger": np.sqrt(0.5 * ((np.sqrt(p) - np.sqrt(q)) ** 2).sum(1)),
        "student_logprob": log_p[rows, sampled],
        "teacher_logprob": log_q[rows, sampled],
        "student_top1_prob": p.max(1),
        "teacher_top1_prob": q.max(1),
        "top1_agree": p.argmax(1) == q.argmax(1),
        "teacher_mass_on_student_topk": np.take_along_axis(q, order_p[:, :16], 1).sum(1),
        "reverse_kl_logit_grad_norm": np.sqrt(((p * (d - reverse[:, None])) ** 2).sum(1)),
        "forward_kl_logit_grad_norm": np.sqrt((g**2).sum(1)),
        "logit_curvature": curvature.clip(0),
        "w_local": (g**2).sum(1) / curvature.clip(1e-30),
        "student_topk_ids": top_p.tolist(),
        "student_topk_logprobs": np.take_along_axis(log_p, top_p, 1).clip(None, 0).tolist(),
        "teacher_topk_ids": top_q.tolist(),
        "teacher_topk_logprobs": np.take_along_axis(log_q, top_q, 1).clip(None, 0).tolist(),
        **_estimators(p, q, d, reverse),
    }


def _estimators(
    p: np.ndarray, q: np.ndarray, d: np.ndarray, delta: np.ndarray
) -> dict[str, np.ndarray]:
    """Method section 10's estimators with all tokens as candidates; the last two tokens stop."""
    distance = 1 - 2 * p + (p**2).sum(1, keepdims=True)
    square_mean = ((p * (d - delta[:, None])) ** 2).sum(1)
    best = (p * d * distance).sum(1) / (p * distance).sum(1)
    variance = [
        (p * (d - b[:, None]) ** 2 * distance).sum(1) - square_mean
        for b in (np.zeros_like(delta), delta, best)
    ]
    centre = (d * (1 - p)).sum(1) / (1 - p).sum(1)
    spread = ((d - centre[:, None]) ** 2 * (1 - p)).sum(1)
    of_ratio = (p * (d - delta[:, None]) ** 2).sum(1)
    mass_p, mass_q = p[:, -2:].sum(1), q[:, -2:].sum(1)
    within = (p[:, -2:] * d[:, -2:]).sum(1) - mass_p * np.log(mass_p / mass_q)
    return {
        "k1_variance": variance[0].clip(0),
        "k1_variance_centred": variance[1].clip(0),
        "k1_snr": square_mean / variance[2].clip(1e-30),
        "ier": of_ratio / (spread - of_ratio).clip(1e-30),
        "topk_bias": np.zeros_like(delta),
        "topk_bias_no_tail": np.zeros_like(delta),
        "student_stop_mass": mass_p,
        "teacher_stop_mass": mass_q,
        "stop_mismatch": within.clip(0),
    }


def _with_nulls(tokens: pl.DataFrame) -> pl.DataFrame:
    """Columns of the contract that nothing here asks for stay empty."""
    missing = [name for name in TokenTable.column_names() if name not in tokens.columns]
    return tokens.with_columns(pl.lit(None).alias(name) for name in missing)


def _rollout_table(
    tokens: pl.DataFrame,
    rollout_ids: list[str],
    prompt_ids: list[str],
    sample_of: np.ndarray,
    prompt_of: np.ndarray,
    rng: np.random.Generator,
    rewards: bool,
    planted: bool,
) -> pl.DataFrame:
    per_rollout = tokens.group_by("rollout_id", maintain_order=True).agg(
        response_text=pl.col("token").str.join(""),
        response_token_ids=pl.col("token_id"),
        loss_mask=pl.col("loss_mask"),
        sampled_logprobs=pl.col("student_logprob"),
        planted_labels=pl.col("planted_label"),
    )
    num = len(rollout_ids)
    frame = pl.DataFrame(
        {
            "rollout_id": rollout_ids,
            "prompt_id": prompt_ids,
            "sample_index": sample_of,
            "batch_id": prompt_of // 8,
            "source": ["sampled"] * num,
            "engine": ["hf"] * num,
            "environment": [None] * num,
            "turn_starts": [None] * num,
            "conversation_match": [None] * num,
            "reward_parts": [None] * num,
            "step": [None] * num,
            "messages": [None] * num,
            "prompt_text": [f"What is {int(index) + 11} + 27 + 45?" for index in prompt_of],
            "prompt_token_ids": [[1, 2, 3]] * num,
            "teacher_prompt_token_ids": [None] * num,
            "finish_reason": np.where(rng.random(num) < 0.8, "stop", "length"),
            "temperature": [1.0] * num,
            "top_p": [1.0] * num,
            "top_k": [0] * num,
            "seed": [0] * num,
            "reward": (rng.random(num) < 0.7).astype(float) if rewards else [None] * num,
            "ground_truth": [str(int(index) + 83) for index in prompt_of],
            "solution": [None] * num,
            "tools": [None] * num,
            "tokenizer_fingerprint": ["synthetic"] * num,
            "ids_origin": ["exact"] * num,
            "template_origin": ["none"] * num,
        },
        strict=False,
    )
    frame = frame.join(per_rollout, on="rollout_id", maintain_order="left")
    if not planted:
        frame = frame.with_columns(planted_labels=pl.lit(None))
    return validate(frame.cast(_dtypes(RolloutTable)), RolloutTable)


def _gradient_table(
    tokens: pl.DataFrame, kinds: np.ndarray, rng: np.random.Generator
) -> pl.DataFrame:
    """Norms that follow the logit gradient, alignments that are mostly positive where the models
    disagree."""
    parts = []
    for loss, column in (
        ("reverse_kl", "reverse_kl_logit_grad_norm"),
        ("forward_kl", "forward_kl_logit_grad_norm"),
    ):
        norm_sq = (
            (tokens[column].to_numpy().astype(float) * 20) ** 2
            * rng.chisquare(32, tokens.height)
            / 32
        )
        lean = np.array([0.05, 0.1, 0.5, 0.3])[kinds]
        dot = np.sqrt(norm_sq) * (lean + rng.normal(scale=0.3, size=tokens.height))
        parts.append(
            tokens.select(
                "rollout_id",
                "position",
                loss=pl.lit(loss),
                param_scope=pl.lit("all"),
                method=pl.lit("probe"),
                num_probes=pl.lit(32),
                seed=pl.lit(0),
                grad_norm_sq=pl.Series(norm_sq),
                grad_norm_sq_se=pl.Series(norm_sq * np.sqrt(2 / 32)),
                grad_dot_loss=pl.Series(dot),
                grad_dot_loss_plugin=pl.Series(dot + norm_sq / tokens.height),
                reward_alignment=pl.Series(rng.normal(size=tokens.height) + lean),
            )
        )
    return validate(pl.concat(parts).cast(_dtypes(GradientTable)), GradientTable)


def _mask_table(tokens: pl.DataFrame) -> pl.DataFrame:
    """Plain top-k of three scores within each rollout, at two retention ratios; ties to the earlier
    position."""
    scores = {
        "entropy": pl.col("student_entropy_norm"),
        "divergence": pl.col("reverse_kl"),
        "q3": pl.col("forward_kl") * (1 - pl.col("student_entropy_norm")),
    }
    parts = []
    for rule, score in scores.items():
        for ratio in (0.1, 0.5):
            size = (pl.len() * ratio).floor().clip(1)
            rank = score.cast(pl.Float64).rank("ordinal", descending=True)
            kept = tokens.filter((rank <= size).over("rollout_id")).select("rollout_id", "position")
            parts.append(
                kept.with_columns(
                    rule=pl.lit(rule),
                    retention_ratio=pl.lit(ratio),
                    selection_scope=pl.lit("rollout"),
                    seed=pl.lit(0),
                )
            )
    return validate(
        pl.concat(parts).cast(_dtypes(MaskTable)).select(MaskTable.column_names()), MaskTable
    )


def _renamed(block: Tables, index: int) -> Tables:
    prefix = pl.lit(f"r{index:04d}-")
    rename = [(prefix + pl.col(name)).alias(name) for name in ("rollout_id", "prompt_id")]
    return Tables(
        block.rollouts.with_columns(rename),
        block.tokens.with_columns(rename),
        block.gradients,
        block.masks,
        block.vocabulary,
    )


def _dtypes(schema: type[dy.Schema]) -> dict[str, pl.DataType]:
    return {name: column.dtype for name, column in schema.columns().items()}


def _empty(schema: type[dy.Schema]) -> pl.DataFrame:
    return pl.DataFrame(schema=_dtypes(schema))
