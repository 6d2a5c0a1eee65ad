"""Hypothesis strategies: the inputs on which numbers go wrong. One headed section per layer."""

import numpy as np
import polars as pl
import torch
from hypothesis import strategies as st

# Table layer: token tables of ragged rollouts, with ties, zeros, +inf and rows that the student
# did not write
# --------------------------------------------------------------------------------------------------

TIED_VALUES = (0.0, 0.125, 0.5, 0.75, 1.0)
STATISTIC_COLUMNS = (
    "student_entropy",
    "student_entropy_norm",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "jsd",
    "hellinger",
    "student_top1_prob",
    "teacher_mass_on_student_topk",
)


def token_rows(num_rows: int, *, infinite: bool) -> st.SearchStrategy[list[float]]:
    """[num_rows] values that float32 holds exactly; many are tied."""
    finite = st.one_of(
        st.sampled_from(TIED_VALUES), st.floats(0.0, 1.0, width=32, allow_subnormal=False)
    )
    return st.lists(
        st.one_of(finite, st.just(float("inf"))) if infinite else finite,
        min_size=num_rows,
        max_size=num_rows,
    )


@st.composite
def token_frames(
    draw: st.DrawFn, *, infinite: bool = True, masked: bool = True, max_rollouts: int = 5
) -> pl.DataFrame:
    """A token table with the columns that scores, cuts and rules read; rows in order of rollout and
    position."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=max_rollouts))
    num_rows = sum(lengths)
    ids = [
        f"p{index // 2}/{index % 2}" for index, length in enumerate(lengths) for _ in range(length)
    ]
    written = draw(
        st.lists(st.booleans() if masked else st.just(True), min_size=num_rows, max_size=num_rows)
    )
    written[0] = True
    columns: dict[str, list] = {}
    for name in STATISTIC_COLUMNS:
        values = draw(token_rows(num_rows, infinite=infinite and name.endswith("_kl")))
        columns[name] = [
            value if keep else None for value, keep in zip(values, written, strict=True)
        ]
    frame = pl.DataFrame(columns, schema=dict.fromkeys(STATISTIC_COLUMNS, pl.Float32))
    return frame.with_columns(
        pl.Series("rollout_id", ids),
        pl.Series("prompt_id", [name.split("/")[0] for name in ids]),
        pl.Series(
            "position", [place for length in lengths for place in range(length)], dtype=pl.Int32
        ),
        pl.Series(
            "batch_id", [int(name[1 : name.index("/")]) // 2 for name in ids], dtype=pl.Int32
        ),
        pl.Series("loss_mask", written),
    )


# ------------------ Logit layer: pairs of rows on which plain float32 forms of divergences go wrong
# --------------------------------------------------------------------------------------------------

LOGIT_KINDS = (
    "random",
    "peaked",
    "peaked_together",
    "peaked_apart",
    "flat",
    "flat_against_peaked",
    "near_equal",
    "near_equal_peaked",
    "shifted",
    "tied",
    "huge",
    "masked_together",
    "masked_apart",
)


def _peaked_row(
    generator: np.random.Generator, vocab_size: int, top: int | None = None
) -> np.ndarray:
    row = generator.normal(-30.0, 1.0, vocab_size).clip(-32, -28)
    row[generator.integers(vocab_size) if top is None else top] = 30.0
    return row


def _masked(generator: np.random.Generator, row: np.ndarray) -> np.ndarray:
    mask = generator.random(len(row)) < 0.4
    mask[generator.integers(len(row))] = False
    return np.where(mask, -np.inf, row)


def logit_pair(kind: str, vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Student's and teacher's logits, [V] float64 each; noise of nearly equal rows is 1e-1 to 1e-6,
    by seed."""
    generator = np.random.default_rng([seed, vocab_size, LOGIT_KINDS.index(kind)])
    student, teacher = generator.normal(0.0, 3.0, (2, vocab_size))
    noise = generator.normal(0.0, 10.0 ** -(1 + seed % 6), vocab_size)
    top = int(generator.integers(vocab_size))
    if kind == "peaked":
        return _peaked_row(generator, vocab_size), teacher
    if kind == "peaked_together":
        return _peaked_row(generator, vocab_size, top), _peaked_row(generator, vocab_size, top)
    if kind == "peaked_apart":
        return _peaked_row(generator, vocab_size, top), _peaked_row(
            generator, vocab_size, (top + 1) % vocab_size
        )
    if kind == "flat":
        return np.zeros(vocab_size), noise
    if kind == "flat_against_peaked":
        return np.zeros(vocab_size), _peaked_row(
            generator, vocab_size, 0
        )  # the student's first token by id
    if kind == "near_equal":
        return student, student + noise
    if kind == "near_equal_peaked":
        student = _peaked_row(generator, vocab_size, top)
        return student, student + noise
    if kind == "shifted":
        return student, student + 7.25 + noise
    if kind == "tied":
        return np.round(student), np.round(teacher)
    if kind == "huge":
        return tuple(generator.uniform(-1e4, 1e4, (2, vocab_size)))
    if kind == "masked_together":
        student = _masked(generator, student)
        return student, np.where(np.isneginf(student), -np.inf, teacher)
    if kind == "masked_apart":
        return _masked(generator, student), _masked(generator, teacher)
    return student, teacher


def as_rows(
    pairs: list[tuple[np.ndarray, np.ndarray]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits of some pairs, [N, V] each."""
    return tuple(torch.tensor(np.stack(rows)).to(dtype) for rows in zip(*pairs, strict=True))


def logit_pairs(
    max_vocab_size: int = 200, kinds: tuple[str, ...] = LOGIT_KINDS
) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Pairs of every kind, [V] float64 each, V ≥ 2."""
    return st.builds(
        logit_pair,
        st.sampled_from(kinds),
        st.integers(2, max_vocab_size),
        st.integers(0, 2**32 - 1),
    )


def frame(entropy: list, divergence: list, **columns: list) -> pl.DataFrame:
    """Tokens of one rollout with these values; where the entropy is None, the student did not write
    the token."""
    size = len(entropy)
    defaults = {
        "rollout_id": ["a/0"] * size,
        "prompt_id": ["a"] * size,
        "position": list(range(size)),
        "batch_id": [0] * size,
        "loss_mask": [value is not None for value in entropy],
    }
    return pl.DataFrame(
        {**defaults, "student_entropy": entropy, "reverse_kl": divergence, **columns},
        schema_overrides={"batch_id": pl.Int32},
    )
