"""Oracles: every published number again, typed from its equation, slow and obvious.

Imports nothing of the package. One headed section per layer.
"""

import hashlib
import math
from decimal import Decimal

import mpmath
import numpy as np
import torch

# -- Table layer: scores, quadrants, selection, statistics. Plain loops over Python floats and numpy
# float64.
# --------------------------------------------------------------------------------------------------


def quantile_linear(values: list[float], quantile: float) -> float:
    ordered = sorted(values)
    place = quantile * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def min_max(values: list[float | None], clip: float | None) -> list[float | None]:
    """Clip at a quantile, then min-max; None stays, +inf takes no part and becomes 1, a constant
    becomes 0."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    scaled: list[float | None] = []
    for value in values:
        if value is None:
            scaled.append(None)
        elif math.isinf(value):
            scaled.append(1.0)
        else:
            low, high = min(finite), max(finite) if clip is None else quantile_linear(finite, clip)
            scaled.append((min(value, high) - low) / (high - low) if high > low else 0.0)
    return scaled


def token_scores(
    h: list, delta: list, forward: list, divergence_clip: float | None
) -> dict[str, list[float | None]]:
    """Eq. 7 and Section 7.3 over the rows of one normalisation scope; None where the student did
    not write."""
    entropy_hat, divergence_hat = min_max(h, 0.98), min_max(delta, divergence_clip)
    forward_hat = min_max(forward, divergence_clip)
    soft_or, q3 = [], []
    for e, d, f in zip(entropy_hat, divergence_hat, forward, strict=True):
        if e is None or d is None:
            soft_or.append(None)
            q3.append(None)
        else:
            soft_or.append(e + d - e * d)
            q3.append(0.0 if e == 1.0 else f * (1.0 - e))
    return {
        "entropy_hat": entropy_hat,
        "divergence_hat": divergence_hat,
        "forward_hat": forward_hat,
        "soft_or": soft_or,
        "q3_score": q3,
    }


def quadrant(
    entropy: float | None, divergence: float | None, entropy_cut: float, divergence_cut: float
) -> str | None:
    """Table 1; high is strictly above."""
    if entropy is None or divergence is None:
        return None
    if entropy > entropy_cut:
        return "Q1" if divergence > divergence_cut else "Q2"
    return "Q3" if divergence > divergence_cut else "Q4"


def otsu(values: list[float]) -> float:
    """Largest between-class variance over all splits, by trying each."""
    distinct = sorted(set(values))
    best, cut = -1.0, distinct[-1]
    for candidate in distinct[:-1]:
        low = [value for value in values if value <= candidate]
        high = [value for value in values if value > candidate]
        variance = (
            len(low) * len(high) * (math.fsum(low) / len(low) - math.fsum(high) / len(high)) ** 2
        )
        if variance > best * (1 + 1e-12):
            best, cut = variance, candidate
    return cut


def num_kept(ratio: str, num_tokens: int) -> int:
    """k = max(1, ⌊ρ·m⌋), ρ written in decimals."""
    return max(1, int(Decimal(ratio) * num_tokens))


def top_k(rows: list[tuple[float, int, str]], k: int) -> set[tuple[str, int]]:
    """(score, position, rollout_id): larger scores first, then the earlier position, then the
    smaller rollout_id."""
    ordered = sorted(rows, key=lambda row: (-row[0], row[1], row[2]))
    return {(rollout_id, position) for _, position, rollout_id in ordered[:k]}


def random_exponential(seed: int, rollout_id: str, position: int) -> float:
    """−ln u, u from SplitMix64 at (BLAKE2b of the rollout, position), in Python integers."""
    wrap = 2**64 - 1
    digest = hashlib.blake2b(
        f"{seed}/{rollout_id}".encode(), digest_size=8, person=b"tip-select"
    ).digest()
    state = (int.from_bytes(digest, "little") + (position + 1) * 0x9E3779B97F4A7C15) & wrap
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & wrap
    state ^= state >> 31
    return -math.log(((state >> 11) + 0.5) / 2.0**53)


def window(m: int, k: int, u: float) -> range:
    """The places of a window of k among m that begins at ⌊u·(m − k + 1)⌋."""
    start = math.floor(u * (m - k + 1))
    return range(start, start + k)


def between_percentiles(values: list[float]) -> list[float]:
    """From the 5th percentile (0) to the 95th (1), clipped; +inf takes no part and is 1."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return [1.0 for _ in values]
    low, high = quantile_linear(finite, 0.05), quantile_linear(finite, 0.95)
    if high <= low:
        return [1.0 if math.isinf(value) else 0.0 for value in values]
    return [
        1.0 if math.isinf(value) else min(1.0, max(0.0, (value - low) / (high - low)))
        for value in values
    ]


# -------- Logit layer: statistics of two rows of logits. Typed twice: in 80 decimal digits from the
# equations as they stand, and,
# for rows too long for that, in numpy's extended precision, with the sums arranged so that nothing
# cancels.
# --------------------------------------------------------------------------------------------------


def stable_order(row: np.ndarray) -> np.ndarray:
    """Ids by falling logit, the lower id first where tied."""
    return np.argsort(-row.astype(np.longdouble), kind="stable")


def exact_statistics(
    student: np.ndarray, teacher: np.ndarray, token_id: int, top_k: int = 5, support_k: int = 16
) -> dict:
    """Section 2's statistics of one pair of rows, in 80 digits. Divergences may be inf; keys are
    those of the token table."""
    with mpmath.workdps(80):
        z = [[mpmath.mpf(float(v)) for v in row] for row in (student, teacher)]
        weights = [[mpmath.exp(v - max(row)) for v in row] for row in z]
        (p, log_p), (q, log_q) = [
            (
                [w / mpmath.fsum(row) for w in row],
                [mpmath.log(w / mpmath.fsum(row)) if w else -mpmath.inf for w in row],
            )
            for row in weights
        ]
        numbers = _exact_divergences(p, q, log_p, log_q)
        numbers |= _exact_gradients(p, q, log_p, log_q)
        order_s, order_t = stable_order(student).tolist(), stable_order(teacher).tolist()
        numbers |= _exact_estimators(p, log_p, log_q, numbers["reverse_kl"])
        numbers |= _exact_candidates(p, q, log_p, log_q, order_s[:support_k], numbers["reverse_kl"])
        numbers |= {
            "student_entropy_norm": (
                numbers["student_entropy"] / mpmath.log(len(p)) if len(p) > 1 else 0
            ),
            "student_logprob": log_p[token_id],
            "teacher_logprob": log_q[token_id],
            "student_top1_prob": max(p),
            "teacher_top1_prob": max(q),
            "teacher_mass_on_student_topk": mpmath.fsum(q[i] for i in order_s[:support_k]),
        }
        result: dict = {name: float(value) for name, value in numbers.items()}
        result["top1_agree"] = order_s[0] == order_t[0]
        result["student_topk_ids"], result["teacher_topk_ids"] = order_s[:top_k], order_t[:top_k]
        result["student_topk_logprobs"] = [float(log_p[i]) for i in order_s[:top_k]]
        result["teacher_topk_logprobs"] = [float(log_q[i]) for i in order_t[:top_k]]
    return result


def _exact_divergences(p: list, q: list, log_p: list, log_q: list) -> dict:
    def kl(a: list, log_a: list, log_b: list):
        return mpmath.fsum(x * (u - v) for x, u, v in zip(a, log_a, log_b, strict=True) if x)

    log_m = [mpmath.log((x + y) / 2) if x + y else -mpmath.inf for x, y in zip(p, q, strict=True)]
    return {
        "student_entropy": -mpmath.fsum(x * u for x, u in zip(p, log_p, strict=True) if x),
        "teacher_entropy": -mpmath.fsum(y * v for y, v in zip(q, log_q, strict=True) if y),
        "reverse_kl": kl(p, log_p, log_q),
        "forward_kl": kl(q, log_q, log_p),
        "jsd": (kl(p, log_p, log_m) + kl(q, log_q, log_m)) / 2,
        "hellinger": mpmath.sqrt(
            mpmath.fsum((mpmath.sqrt(x) - mpmath.sqrt(y)) ** 2 for x, y in zip(p, q, strict=True))
            / 2
        ),
    }


def _exact_gradients(p: list, q: list, log_p: list, log_q: list) -> dict:
    """Norms of ∂/∂z of both divergences; Eq. 13; Eq. 6 at η = 1 (nan where undefined)."""
    delta = mpmath.fsum(x * (u - v) for x, u, v in zip(p, log_p, log_q, strict=True) if x)
    reverse = mpmath.inf
    if mpmath.isfinite(delta):
        reverse = mpmath.sqrt(
            mpmath.fsum(
                (x * (u - v - delta)) ** 2 for x, u, v in zip(p, log_p, log_q, strict=True) if x
            )
        )
    g = [x - y for x, y in zip(p, q, strict=True)]
    square_norm = mpmath.fsum(v * v for v in g)
    mean = mpmath.fsum(x * v for x, v in zip(p, g, strict=True))
    curvature = mpmath.fsum(x * (v - mean) ** 2 for x, v in zip(p, g, strict=True))
    return {
        "reverse_kl_logit_grad_norm": reverse,
        "forward_kl_logit_grad_norm": mpmath.sqrt(square_norm),
        "logit_curvature": curvature,
        "w_local": square_norm / curvature if curvature else mpmath.nan,
    }


def _exact_estimators(p: list, log_p: list, log_q: list, delta) -> dict:
    """Variance of g_y = (ρ_y − b)(e_y − P_S), y ~ P_S: E‖g_y‖² − ‖μ‖² over all y."""
    if not mpmath.isfinite(delta):
        return {"k1_variance": mpmath.inf, "k1_variance_centred": mpmath.inf, "k1_snr": mpmath.nan}
    alive = [i for i, x in enumerate(p) if x]
    rho = {i: log_p[i] - log_q[i] for i in alive}
    square = mpmath.fsum(x * x for x in p)
    distance = {i: 1 - 2 * p[i] + square for i in alive}
    square_mean = mpmath.fsum((p[i] * (rho[i] - delta)) ** 2 for i in alive)

    def variance(b):
        return mpmath.fsum(p[i] * (rho[i] - b) ** 2 * distance[i] for i in alive) - square_mean

    weight = mpmath.fsum(p[i] * distance[i] for i in alive)
    best = mpmath.fsum(p[i] * rho[i] * distance[i] for i in alive) / weight if weight else 0
    noise = variance(best)
    return {
        "k1_variance": variance(0),
        "k1_variance_centred": variance(delta),
        "k1_snr": square_mean / noise
        if noise > mpmath.mpf(10) ** -60 * square_mean
        else mpmath.nan,
    }


def _exact_candidates(p: list, q: list, log_p: list, log_q: list, ids: list, delta) -> dict:
    """IER (arXiv 2609.24432) over renormalised candidates, and what a top-k reverse KL misses."""
    alive = [i for i in ids if p[i]]
    masked = any(not q[i] for i in alive)
    ratio = mpmath.nan
    if len(alive) > 2 and not masked:
        mass = mpmath.fsum(p[i] for i in alive)
        own, rho = [p[i] / mass for i in alive], [log_p[i] - log_q[i] for i in alive]
        odds = [(1 - x) / x for x in own]
        weights = [x * o for x, o in zip(own, odds, strict=True)]
        centre = mpmath.fsum(w * r for w, r in zip(weights, rho, strict=True)) / mpmath.fsum(
            weights
        )
        mean = mpmath.fsum(x * r for x, r in zip(own, rho, strict=True))
        spread = mpmath.fsum(w * (r - centre) ** 2 for w, r in zip(weights, rho, strict=True))
        variance = mpmath.fsum(x * (r - mean) ** 2 for x, r in zip(own, rho, strict=True))
        if spread - variance > mpmath.mpf(10) ** -60 * spread:
            ratio = variance / (spread - variance)
    if len(ids) == len(p):
        return {"ier": ratio, "topk_bias": 0, "topk_bias_no_tail": 0}
    if masked:
        return {"ier": ratio, "topk_bias": mpmath.nan, "topk_bias_no_tail": mpmath.nan}
    inside = mpmath.fsum(p[i] * (log_p[i] - log_q[i]) for i in alive)
    tail = [mpmath.fsum(row[i] for i in range(len(p)) if i not in ids) for row in (p, q)]
    coarse = inside + (tail[0] * mpmath.log(tail[0] / tail[1]) if tail[0] and tail[1] else 0)
    return {"ier": ratio, "topk_bias": delta - coarse, "topk_bias_no_tail": delta - inside}


def extended_statistics(
    student: np.ndarray, teacher: np.ndarray, token_id: int, top_k: int = 5, support_k: int = 16
) -> dict:
    """The same for long rows, in extended precision (64 bits of mantissa)."""
    order_s, order_t = stable_order(student), stable_order(teacher)
    p, log_p, entropy_s = _extended_row(student, order_s[0])
    q, log_q, entropy_t = _extended_row(teacher, order_t[0])
    with np.errstate(invalid="ignore"):
        d = np.where(np.isneginf(log_p) & np.isneginf(log_q), np.longdouble(0), log_p - log_q)
    finite = np.isfinite(d)
    small = np.abs(np.where(finite, d, 1)) < 1
    g = np.where(small, q * np.expm1(np.where(small, d, 0)), p - q)
    clear = np.where(finite, d, 0)
    reverse = (
        np.sum(np.where(finite, p * clear - g, q))
        if not np.any(np.isposinf(d))
        else np.longdouble(np.inf)
    )
    forward = (
        np.sum(np.where(finite, g - q * clear, p))
        if not np.any(np.isneginf(d))
        else np.longdouble(np.inf)
    )
    m = np.maximum((p + q) / 2, np.finfo(np.longdouble).tiny)
    u = g / (2 * m)
    mild = np.abs(u) < 0.5
    log_up = np.where(mild, np.log1p(np.where(mild, u, 0)), np.log(np.where(p > 0, p, m) / m))
    log_down = np.where(mild, np.log1p(np.where(mild, -u, 0)), np.log(np.where(q > 0, q, m) / m))
    jsd_terms = np.where(
        np.abs(u) < 1e-4, m * (u**2 + u**4 / 6) / 2, (p * log_up + q * log_down) / 2
    )
    roots = np.sqrt(p) + np.sqrt(q)
    hellinger = np.sqrt(np.sum(np.divide(g, roots, out=np.zeros_like(g), where=roots > 0) ** 2) / 2)
    c = g - g[order_s[0]]
    curvature = np.sum(p * (c - np.sum(p * c)) ** 2)
    centred = np.where(p > 0, d - d[order_s[0]], 0) if np.isfinite(reverse) else np.zeros_like(d)
    reverse_norm = (
        np.sqrt(np.sum((p * (centred - np.sum(p * centred))) ** 2))
        if np.isfinite(reverse)
        else np.inf
    )
    square_norm = np.sum(g * g)
    numbers = {
        "student_entropy": entropy_s,
        "student_entropy_norm": entropy_s / np.log(np.longdouble(len(p))),
        "teacher_entropy": entropy_t,
        "reverse_kl": reverse,
        "forward_kl": forward,
        "jsd": np.sum(jsd_terms),
        "hellinger": hellinger,
        "student_logprob": log_p[token_id],
        "teacher_logprob": log_q[token_id],
        "student_top1_prob": p.max(),
        "teacher_top1_prob": q.max(),
        "teacher_mass_on_student_topk": q[order_s[:support_k]].sum(),
        "reverse_kl_logit_grad_norm": reverse_norm,
        "forward_kl_logit_grad_norm": np.sqrt(square_norm),
        "logit_curvature": curvature,
        "w_local": square_norm / curvature if curvature > 0 else np.nan,
    }
    numbers |= _extended_estimators(p, centred, reverse, order_s)
    logits = student.astype(np.longdouble), teacher.astype(np.longdouble)
    numbers |= _extended_candidates(p, q, d, order_s[:support_k], reverse, *logits)
    result: dict = {name: float(value) for name, value in numbers.items()}
    result["top1_agree"] = bool(order_s[0] == order_t[0])
    result["student_topk_ids"], result["teacher_topk_ids"] = (
        order_s[:top_k].tolist(),
        order_t[:top_k].tolist(),
    )
    result["student_topk_logprobs"] = log_p[order_s[:top_k]].astype(float).tolist()
    result["teacher_topk_logprobs"] = log_q[order_t[:top_k]].astype(float).tolist()
    return result


def _extended_estimators(p: np.ndarray, centred: np.ndarray, delta, order: np.ndarray) -> dict:
    """`centred`: d less that of the top token."""
    if not np.isfinite(delta):
        return {"k1_variance": np.inf, "k1_variance_centred": np.inf, "k1_snr": np.nan}
    rest = p.copy()
    rest[order[0]] = 0
    squares, others = np.sum(rest * rest), np.sum(rest)
    distance = (1 - 2 * p) + (p[order[0]] ** 2 + squares)
    distance[order[0]] = others**2 + squares
    c = centred - np.sum(p * centred)
    weights = p * distance
    square_mean = np.sum((p * c) ** 2)

    def variance(shift):
        return np.sum(weights * (c - shift) ** 2) - square_mean

    best = np.sum(weights * c) / np.sum(weights) if np.any(weights > 0) else 0
    noise = variance(best)
    resolved = noise > 1e-9 * square_mean and noise > 0
    return {
        "k1_variance": variance(-delta),
        "k1_variance_centred": variance(0),
        "k1_snr": square_mean / noise if resolved else np.nan,
    }


def _extended_candidates(
    p: np.ndarray,
    q: np.ndarray,
    d: np.ndarray,
    ids: np.ndarray,
    delta,
    student: np.ndarray,
    teacher: np.ndarray,
) -> dict:
    alive = ids[p[ids] > 0]
    masked, ratio = not np.all(np.isfinite(d[alive])), np.nan
    if len(alive) > 2 and not masked:
        own, rho = p[alive] / np.sum(p[alive]), student[alive] - teacher[alive]
        rho = rho - rho[0]
        weights = np.array([np.sum(np.delete(own, i)) for i in range(len(own))])
        centre = np.sum(weights * rho) / np.sum(weights)
        spread = np.sum(weights * (rho - centre) ** 2)
        variance = np.sum(own * (rho - np.sum(own * rho)) ** 2)
        ratio = variance / (spread - variance) if spread - variance > 1e-12 * spread else np.nan
    if masked:
        return {"ier": ratio, "topk_bias": np.nan, "topk_bias_no_tail": np.nan}
    inside = np.sum(p[alive] * d[alive])
    tail_p, tail_q = (np.sum(np.delete(row, ids)) for row in (p, q))
    coarse = inside + (tail_p * np.log(tail_p / tail_q) if tail_p > 0 and tail_q > 0 else 0)
    return {"ier": ratio, "topk_bias": delta - coarse, "topk_bias_no_tail": delta - inside}


def _extended_row(row: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, np.longdouble]:
    """P, ln P and H(P); the largest weight, which is 1, stays out of the sum."""
    x = row.astype(np.longdouble)
    x = x - x[top]
    weights = np.exp(x)
    others = weights.copy()
    others[top] = 0
    rest = others.sum()
    entropy = np.log1p(rest) - np.sum(weights * np.where(weights > 0, x, 0)) / (1 + rest)
    return weights / (1 + rest), x - np.log1p(rest), entropy


def loss_gradient(
    loss: str, student: np.ndarray, teacher: np.ndarray, token_id: int
) -> list[float]:
    """∂ℓ/∂z of one row of student logits, in 80 digits: section 2's closed forms, and those of JSD
    and −ln P."""
    with mpmath.workdps(80):
        p, q = [
            [w / mpmath.fsum(row) for w in row]
            for row in [
                [mpmath.exp(mpmath.mpf(float(v)) - mpmath.mpf(float(max(z)))) for v in z]
                for z in (student, teacher)
            ]
        ]
        if loss == "forward_kl":
            return [float(x - y) for x, y in zip(p, q, strict=True)]
        if loss == "negative_logprob":
            return [float(x - (i == token_id)) for i, x in enumerate(p)]
        if loss == "entropy":
            score = [-mpmath.log(x) if x else mpmath.mpf(0) for x in p]
        elif loss == "reverse_kl":
            score = [mpmath.log(x / y) if x else mpmath.mpf(0) for x, y in zip(p, q, strict=True)]
        else:
            score = [
                mpmath.log(2 * x / (x + y)) / 2 if x else mpmath.mpf(0)
                for x, y in zip(p, q, strict=True)
            ]
        mean = mpmath.fsum(x * v for x, v in zip(p, score, strict=True))
        return [float(x * (v - mean)) for x, v in zip(p, score, strict=True)]


# -- Gradients: one token after another through the whole model in float64, with every gradient kept
# whole.
# --------------------------------------------------------------------------------------------------


def plain_token_loss(
    loss: str, student: torch.Tensor, teacher: torch.Tensor, token_id: int
) -> torch.Tensor:
    """ℓ_t of two rows of logits [V], by the equations as they stand."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if loss == "reverse_kl":
        return (p * (log_p - log_q)).sum()
    if loss == "forward_kl":
        return (q * (log_q - log_p)).sum()
    if loss == "jsd":
        log_m = ((p + q) / 2).log()
        return ((p * (log_p - log_m)).sum() + (q * (log_q - log_m)).sum()) / 2
    return -log_p[token_id]


def token_gradients(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    prompt: list[int],
    response: list[int],
    loss: str,
    parameters: dict[str, torch.Tensor],
    teacher_prompt: list[int] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """∇ℓ_t of every response token, by parameter: token t is predicted by the logits after the
    prompt and t response tokens."""
    for parameter in parameters.values():
        parameter.requires_grad_()
    gradients = []
    for t in range(len(response)):
        logits = student(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1]
        with torch.no_grad():
            before = prompt if teacher_prompt is None else teacher_prompt
            theirs = teacher(input_ids=torch.tensor([before + response[:t]])).logits[0, -1]
        value = plain_token_loss(loss, logits, theirs, response[t])
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        gradients.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(parameters.items(), found, strict=True)
            }
        )
    return gradients


def inner(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] * other[name]).sum()) for name in one)


def weighted_sum(
    gradients: list[dict[str, torch.Tensor]], weights: list[float]
) -> dict[str, torch.Tensor]:
    return {
        name: sum(w * g[name] for w, g in zip(weights, gradients, strict=True))
        for name in gradients[0]
    }


# ---------------------------------- Training: the loss of Eq. 9 with its normaliser and aggregation
# --------------------------------------------------------------------------------------------------


def masked_loss(
    losses: list[float],
    selected: list[bool],
    rollouts: list[int],
    normalizer: str,
    aggregation: str,
) -> float:
    """Mean of the selected losses; `all` divides by every token of the set instead; a mean over an
    empty set takes no part."""
    groups: dict[int, list[int]] = {}
    for token, rollout in enumerate(rollouts):
        groups.setdefault(rollout if aggregation == "rollout" else 0, []).append(token)
    means = []
    for tokens in groups.values():
        kept = [token for token in tokens if selected[token]]
        divisor = len(kept) if normalizer == "selected" else len(tokens)
        if divisor:
            means.append(math.fsum(losses[token] for token in kept) / divisor)
    return math.fsum(means) / len(means) if means else 0.0


def midranks(values: list[float]) -> list[float]:
    """Rank from 1; equal values share the mean of their ranks."""
    return [
        1
        + sum(other < value for other in values)
        + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(
        math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y)
    )


def partial_pearson(x: list[float], y: list[float], controls: list[list[float]]) -> float:
    """Correlation of what least squares on the controls leaves of x and of y."""
    design = np.column_stack([np.ones(len(x)), *controls])
    rest = [
        values - design @ np.linalg.lstsq(design, np.asarray(values), rcond=None)[0]
        for values in (x, y)
    ]
    return pearson(list(rest[0]), list(rest[1]))


def auc(scores: list[float], positive: list[bool]) -> float:
    """Over all pairs: 1 where the positive scores higher, ½ where they tie."""
    pairs = [
        (p, n)
        for p, yes in zip(scores, positive, strict=True)
        if yes
        for n, no in zip(scores, positive, strict=True)
        if not no
    ]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


def quadrant_sums(quadrants: list[str], values: list[float]) -> dict[str, float]:
    return {
        name: math.fsum(v for q, v in zip(quadrants, values, strict=True) if q == name)
        for name in ("Q1", "Q2", "Q3", "Q4")
    }
