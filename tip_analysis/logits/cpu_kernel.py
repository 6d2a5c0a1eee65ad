"""The pass over two rows of logits compiled for the CPU (Numba), in float32 with sums
in float64.

The equations are those of `rows`, a token at a time: arithmetic on single numbers only, with exp
and atanh as polynomials, so that each loop becomes vector instructions that keep a row's sums in
registers. A row is read three times while it stays in the core's cache: for its top tokens, for its
normaliser, and for its divergences. Threads share the rows out.

Logits come as the signed integers that their bits are: bfloat16 as int16, float32 as int32.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from tip_analysis.logits.kernel_cache import KeptOnDisk
from tip_analysis.logits.probabilities import (
    CENTRE_ON_TOP_ABOVE,
    JSD_SERIES,
    SCALE,
    SERIES_BELOW,
    masked_level,
)
from tip_analysis.logits.totals import RowTotals

_CHUNK = 4096
"""Tokens that are summed in float32; sums of chunks are added in float64."""
_COLUMNS = 1024
"""For its top tokens, a row is folded into that many columns; only those with the largest maxima
are looked through."""

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}

# Float32 constants: a Python float would turn the arithmetic into float64.
_ZERO, _HALF, _ONE, _TWO, _THREE = (np.float32(number) for number in (0.0, 0.5, 1.0, 2.0, 3.0))
_NEAR = np.float32(SERIES_BELOW)
_LEVEL = np.float32(masked_level(torch.float32))
_INFINITE = np.float32(-masked_level(torch.float32) / 2)
_TINY = np.finfo(np.float32).tiny
_SCALE, _ROOT_SCALE = np.float32(SCALE), np.float32(math.sqrt(SCALE))
_EXP_LOWEST = np.float32(-88.0)
_LOG2_E = np.float32(math.log2(math.e))
_LN2_HIGH = np.float32(0.693145751953125)  # 16 bits of ln 2: exact times any exponent
_LN2_LOW = np.float32(math.log(2) - 0.693145751953125)
_TO_INTEGER = np.float32(1.5 * 2**23 + 127)
"""Added to a float32 of moderate size: rounds it to an integer, and leaves that plus the exponent's
bias in the lowest bits."""


def _inlined(**flags: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return numba.njit(forceinline=True, error_model="numpy", **flags)


def _polynomial(coefficients: Sequence[float]) -> Callable[[np.float32], np.float32]:
    """x ↦ Σ cₙ xⁿ by Horner's rule, c₀ first, each step inlined into the next."""
    first = np.float32(coefficients[0])
    if len(coefficients) == 1:
        return _inlined()(lambda x: first)
    rest = _polynomial(coefficients[1:])
    return _inlined(fastmath={"contract"})(lambda x: first + x * rest(x))


_exp_series = _polynomial([1 / math.factorial(n) for n in range(8)])
_expm1_over_x = _polynomial([1 / math.factorial(n + 1) for n in range(9)])
_even_excess_over_square = _polynomial([1 / math.factorial(n) for n in (2, 4, 6, 8)])
_odd_excess_over_cube = _polynomial([1 / math.factorial(n) for n in (3, 5, 7, 9)])
_atanh_over_x = _polynomial([1 / (2 * n + 1) for n in range(8)])
_jsd_over_square = _polynomial(JSD_SERIES[1:6])
_cosh_half_over_square = _polynomial([0.25**n / math.factorial(2 * n) for n in range(1, 5)])


# Sums may be taken in any order, and maxima are of numbers: said where it holds, and nowhere else,
# since two-sums and the
# rounding in exp depend on the order that is written.
@_inlined(fastmath={"reassoc", "nsz"})
def _plus(total: np.float32, value: np.float32) -> np.float32:
    return total + value


@_inlined(fastmath={"nnan", "nsz"})
def _larger(one: np.float32, other: np.float32) -> np.float32:
    return one if one > other else other


@_inlined(fastmath={"nnan", "nsz"})
def _smaller(one: np.float32, other: np.float32) -> np.float32:
    return one if one < other else other


@_inlined()
def _where(condition: bool, one: np.float32, other: np.float32) -> np.float32:
    """`one if condition else other` without a branch, which would keep a loop from becoming vector
    instructions."""
    return one if condition else other


@_inlined(fastmath={"contract"})
def _exp(x: np.float32) -> np.float32:
    """exp(x) for x ≤ 0, within 2 units in the last place; 0 below 1.2e-38, the smallest normal
    number.

    2ⁿ exp(x − n ln 2) with n = round(x / ln 2), by Taylor's series for |x − n ln 2| ≤ ln 2 / 2.
    """
    x = _larger(x, _EXP_LOWEST)
    biased = np.float32(x * _LOG2_E + _TO_INTEGER)
    n = biased - _TO_INTEGER
    power_of_two = np.int32(biased.view(np.int32) << np.int32(23)).view(np.float32)
    return _exp_series((x - n * _LN2_HIGH) - n * _LN2_LOW) * power_of_two


def _number(bits: Any) -> Any:
    """A logit as float32; compiled by the width of its bits."""


@overload(_number, inline="always")
def _number_of(bits):
    if bits.bitwidth == 16:
        return lambda bits: np.int32(np.int32(bits) << np.int32(16)).view(np.float32)
    return lambda bits: np.int32(bits).view(np.float32)


def _rounding_error(bits: Any, top: np.float32, x: np.float32) -> Any:
    """z − top − x, as in `rows.relative_to_top`; compiled by the width of the bits of z."""


@overload(_rounding_error, inline="always")
def _rounding_error_of(bits, top, x):
    if bits.bitwidth == 16:
        return lambda bits, top, x: _ZERO
    return lambda bits, top, x: _two_sum_error(_number(bits), top, x)


@_inlined()
def _two_sum_error(z: np.float32, top: np.float32, x: np.float32) -> np.float32:
    back = x - z
    error = (z - (x - back)) - (top + back)
    return _where(x > -_INFINITE, error, _ZERO)


@_inlined()
def _relative(bits: Any, top: np.float32) -> np.float32:
    return _larger(_number(bits) - top, _LEVEL)


# --------------------------------------------------------------------------------------- top tokens


@numba.njit(nogil=True)
def _fold(row: np.ndarray, maxima: np.ndarray) -> np.float32:
    """Fill in each column's largest logit, as integers in the order of the numbers; returns the
    largest, NaN if any is."""
    width = np.int32(8 * row.itemsize)
    all_but_sign = np.int32((1 << (width - 1)) - 1)
    largest_size = np.int32(0)
    maxima[:] = np.int32(-all_but_sign - 1)
    for start in range(0, len(row), len(maxima)):
        part = row[start : start + len(maxima)]
        for j in range(len(part)):
            bits = np.int32(part[j])
            size = np.int32(bits & all_but_sign)
            order = np.int32(bits ^ ((bits >> np.int32(31)) & all_but_sign))
            maxima[j] = order if order > maxima[j] else maxima[j]
            largest_size = size if size > largest_size else largest_size
    to_float32 = np.int32(32 - width)
    if largest_size > np.int32(0x7F800000) >> to_float32:
        return np.float32(np.nan)
    largest = maxima.max()
    return np.int32(
        np.int32(largest ^ ((largest >> np.int32(31)) & all_but_sign)) << to_float32
    ).view(np.float32)


@numba.njit(nogil=True)
def _kth_largest(numbers: np.ndarray, k: int, largest: np.ndarray) -> np.int32:
    """The k-th largest of at least k numbers; `largest` is scratch, [k]."""
    count = 0
    for i in range(len(numbers)):
        number = numbers[i]
        if count == k and number <= largest[k - 1]:
            continue
        count = min(count + 1, k)
        place = count - 1
        while place > 0 and largest[place - 1] < number:
            largest[place] = largest[place - 1]
            place -= 1
        largest[place] = number
    return largest[k - 1]


@numba.njit(nogil=True)
def _top_tokens(
    row: np.ndarray, maxima: np.ndarray, values: np.ndarray, ids: np.ndarray
) -> np.float32:
    """Fill in the len(ids) most likely tokens, by falling logit, then rising id; returns the
    largest logit, NaN if any is.

    All logits that are at least the k-th largest of the columns' maxima lie in columns that have
    such a maximum.
    """
    k = len(ids)
    top = _fold(row, maxima)
    if not np.isfinite(top):
        return top
    enough = _kth_largest(maxima, k, np.empty(k, np.int32))
    enough = (
        np.int32(-1) if enough == 0 else enough
    )  # −0 comes before 0 here, and is one value with it
    count = 0
    for column in range(len(maxima)):
        if maxima[column] < enough:
            continue
        for i in range(column, len(row), len(maxima)):
            value = _number(row[i])
            if count == k and (
                value < values[k - 1] or (value == values[k - 1] and i > ids[k - 1])
            ):
                continue
            count = min(count + 1, k)
            place = count - 1
            while place > 0 and (
                values[place - 1] < value or (values[place - 1] == value and ids[place - 1] > i)
            ):
                values[place], ids[place] = values[place - 1], ids[place - 1]
                place -= 1
            values[place], ids[place] = value, i
    return top


# ------------------------------------------------------------------------------------------- passes


@_inlined(fastmath={"contract"})
def _sums_for_normalising(student, teacher, top_s, top_t, r_top):
    """Over a stretch of a row, with e = exp x and r = x_S − x_T.

    Sums of e_S and e_T over all but the top tokens, of e_S x_S, e_T x_T, e_S − e_T, e_S², e_S e_T,
    e_S (r − r_top), and of e_S² over all but the top tokens; then the number of top tokens of each
    model, and whether any r, any −r is infinite.
    """
    rest_s = rest_t = moment_s = moment_t = difference = squares = products = ratio = _ZERO
    rest_squares = _ZERO
    tops_s = tops_t = np.int32(0)
    infinite_s = infinite_t = np.int32(0)
    for i in range(len(student)):
        x_s, x_t = _relative(student[i], top_s), _relative(teacher[i], top_t)
        e_s, e_t = _exp(x_s), _exp(x_t)
        r = (x_s - x_t) + (
            _rounding_error(student[i], top_s, x_s) - _rounding_error(teacher[i], top_t, x_t)
        )
        rest_s = _plus(rest_s, _where(x_s == _ZERO, _ZERO, e_s))
        rest_t = _plus(rest_t, _where(x_t == _ZERO, _ZERO, e_t))
        tops_s = np.int32(
            tops_s + np.int32(x_s == _ZERO)
        )  # without np.int32, numba widens to 64 bits
        tops_t = np.int32(tops_t + np.int32(x_t == _ZERO))
        moment_s = _plus(moment_s, e_s * x_s)
        moment_t = _plus(moment_t, e_t * x_t)
        small = _smaller(_larger(r, -_NEAR), _NEAR)
        near = e_t * (small * _expm1_over_x(small))
        far = e_s - e_t
        difference = _plus(difference, _where(abs(r) < _NEAR, near, far))
        squares = _plus(squares, e_s * e_s)
        rest_squares = _plus(rest_squares, _where(x_s == _ZERO, _ZERO, e_s * e_s))
        products = _plus(products, e_s * e_t)
        ratio = _plus(ratio, e_s * (r - r_top))
        infinite_s = np.int32(infinite_s | np.int32(r > _INFINITE))
        infinite_t = np.int32(infinite_t | np.int32(r < -_INFINITE))
    sums = (rest_s, rest_t, moment_s, moment_t, difference, squares, products, ratio, rest_squares)
    return sums, (tops_s, tops_t, infinite_s, infinite_t)


@_inlined(fastmath={"contract"})
def _sums_of_divergences(
    student,
    teacher,
    top_s,
    top_t,
    r_top,
    top_prob_s,
    top_prob_t,
    shift,
    mean_ratio,
    top_gradient,
    centre,
    top_distance,
    distance,
):
    """Over a stretch of a row: the sums of `RowTotals`; for curvature Σ P_S c and Σ P_S c², c = g
    less its centre.

    ‖e_y − P_S‖² is `top_distance` of a top token, and `distance` − 2 P_S(y) of any other.
    """
    reverse_kl = forward_kl = jsd = hellinger = reverse_gradient = difference = first = second = (
        _ZERO
    )
    first_moment = second_moment = _ZERO
    for i in range(len(student)):
        x_s, x_t = _relative(student[i], top_s), _relative(teacher[i], top_t)
        p, q = _exp(x_s) * top_prob_s, _exp(x_t) * top_prob_t
        r = (x_s - x_t) + (
            _rounding_error(student[i], top_s, x_s) - _rounding_error(teacher[i], top_t, x_t)
        )
        d = r - shift
        size = abs(d)
        is_near = size < _NEAR

        small = _smaller(_larger(d, -_NEAR), _NEAR)
        square = small * small
        even, odd = (
            square * _even_excess_over_square(square),
            square * small * _odd_excess_over_cube(square),
        )
        near, far = q * (small + (even + odd)), p - q
        g = _where(is_near, near, far)
        near, far = p * (even - odd), p * d - p + q
        reverse_kl = _plus(reverse_kl, _where(is_near, near, far))
        near, far = q * (even + odd), p - q - q * d
        forward_kl = _plus(forward_kl, _where(is_near, near, far))

        larger, smaller = _larger(p, q), _smaller(p, q)
        total = larger + smaller
        w = (larger - smaller) / (_THREE * larger + smaller + _TINY)
        near = total * (square * _jsd_over_square(square))
        far = total * (w * _atanh_over_x(w * w)) - _HALF * smaller * size
        jsd = _plus(jsd, _where(is_near, near, far))

        root = _TWO * np.float32(math.sqrt((p * _SCALE) * (q * _SCALE)))
        near, far = root * (square * _cosh_half_over_square(square)), total * _SCALE - root
        hellinger = _plus(hellinger, _where(is_near, near, far))

        relative = r - r_top
        in_reverse = p * _ROOT_SCALE * (relative - mean_ratio)
        reverse_gradient = _plus(reverse_gradient, in_reverse * in_reverse)
        moment = in_reverse * _where(x_s == _ZERO, top_distance, distance - _TWO * p)
        first_moment = _plus(first_moment, moment)
        second_moment = _plus(second_moment, moment * (relative - mean_ratio))
        g = g * _SCALE
        difference = _plus(difference, g * g)
        centred = _where((x_s == _ZERO) & (relative == _ZERO), top_gradient, g) - centre
        weighted = p * centred
        first = _plus(first, weighted)
        second = _plus(second, weighted * centred)
    sums = (reverse_kl, forward_kl, jsd, hellinger, reverse_gradient, difference, first, second)
    return *sums, first_moment, second_moment


@numba.njit(nogil=True, error_model="numpy")
def _row_totals(student, teacher, row, out):
    """Everything of one row, into row `row` of `out`."""
    top_s, top_t = np.float32(out.student_max[row]), np.float32(out.teacher_max[row])
    first_token = out.student_ids[row, 0]
    x_t = _relative(teacher[first_token], top_t)
    r_top = -x_t - _rounding_error(teacher[first_token], top_t, x_t)

    sums, counts = np.zeros(9), np.zeros(4, np.int64)
    for start in range(0, len(student), _CHUNK):
        part = slice(start, start + _CHUNK)
        sums_of_part, counts_of_part = _sums_for_normalising(
            student[part], teacher[part], top_s, top_t, r_top
        )
        sums += np.array(sums_of_part)
        counts += np.array(counts_of_part)
    rest_s, rest_t = sums[0] + (counts[0] - 1), sums[1] + (counts[1] - 1)
    top_prob_s, top_prob_t = 1 / (1 + rest_s), 1 / (1 + rest_t)
    log_sum_s, log_sum_t = math.log1p(rest_s), math.log1p(rest_t)
    relative = sums[4] * top_prob_t
    shift = math.log1p(relative) if abs(relative) < SERIES_BELOW else log_sum_s - log_sum_t
    mean_ratio = sums[7] * top_prob_s
    d_top, q_top = r_top - shift, math.exp(x_t) * top_prob_t
    top_gradient = SCALE * (
        q_top * math.expm1(d_top) if abs(d_top) < SERIES_BELOW else top_prob_s - q_top
    )
    mean_gradient = (
        SCALE * (sums[5] * top_prob_s - sums[6] * top_prob_t) * top_prob_s
    )  # Σ P_S² − Σ P_S P_T
    centre = top_gradient if top_prob_s > CENTRE_ON_TOP_ABOVE else mean_gradient
    out.student_top_prob[row], out.teacher_top_prob[row] = top_prob_s, top_prob_t
    out.student_log_sum[row], out.teacher_log_sum[row] = log_sum_s, log_sum_t
    out.student_entropy[row], out.teacher_entropy[row] = (
        log_sum_s - sums[2] * top_prob_s,
        log_sum_t - sums[3] * top_prob_t,
    )
    out.reverse_is_infinite[row], out.forward_is_infinite[row] = counts[2] > 0, counts[3] > 0
    rest_squares = (sums[8] + (counts[0] - 1)) * top_prob_s * top_prob_s
    rest_prob = rest_s * top_prob_s
    out.log_sum_ratio[row], out.rest_squares[row] = shift, rest_squares

    sums = np.zeros(10)
    constants = (
        np.float32(top_prob_s),
        np.float32(top_prob_t),
        np.float32(shift),
        np.float32(mean_ratio),
        np.float32(top_gradient),
        np.float32(centre),
        np.float32(rest_prob * rest_prob + rest_squares),
        np.float32(1 + top_prob_s * top_prob_s + rest_squares),
    )
    for start in range(0, len(student), _CHUNK):
        part = slice(start, start + _CHUNK)
        sums += np.array(
            _sums_of_divergences(student[part], teacher[part], top_s, top_t, r_top, *constants)
        )
    out.reverse_kl[row], out.forward_kl[row], out.jsd[row] = sums[0], sums[1], sums[2]
    out.square_hellinger[row], out.square_reverse_gradient[row], out.square_difference[row] = (
        sums[3],
        sums[4],
        sums[5],
    )
    out.curvature[row] = sums[7] - sums[6] ** 2
    out.first_estimator_moment[row], out.second_estimator_moment[row] = sums[8], sums[9]


_kept_on_disk = functools.partial(KeptOnDisk, nogil=True, error_model="numpy")


@_kept_on_disk
def _totals(
    student, student_stride, teacher, teacher_stride, vocab_size, num_support, start, stop, out
):
    """Rows `start` to `stop` into `out`; `student` and `teacher` are the memory that rows lie in, a
    stride apart."""
    num_columns = min(vocab_size, max(_COLUMNS, out.student_ids.shape[1]))
    maxima = np.empty(num_columns, np.int32)
    for row in range(start, stop):
        of_student = student[row * student_stride : row * student_stride + vocab_size]
        of_teacher = teacher[row * teacher_stride : row * teacher_stride + vocab_size]
        out.student_max[row] = _top_tokens(
            of_student, maxima, out.student_values[row], out.student_ids[row]
        )
        out.teacher_max[row] = _top_tokens(
            of_teacher, maxima, out.teacher_values[row], out.teacher_ids[row]
        )
        if not (np.isfinite(out.student_max[row]) and np.isfinite(out.teacher_max[row])):
            continue
        _row_totals(of_student, of_teacher, row, out)
        mass = 0.0
        for token in out.student_ids[row, :num_support]:
            mass += math.exp(_relative(of_teacher[token], np.float32(out.teacher_max[row])))
        out.teacher_mass_on_support[row] = mass * out.teacher_top_prob[row]


# ------------------------------------------------------------------------------------------ threads


def row_totals(student: Tensor, teacher: Tensor, top_k: int, support_k: int) -> RowTotals:
    """`RowTotals` of logits [N, V] on the CPU, in float64, by as many threads as torch uses.

    float16 logits are widened first.
    """
    num_rows, vocab_size = student.shape
    totals = RowTotals.empty(
        num_rows,
        num_student=min(vocab_size, max(top_k, support_k)),
        num_teacher=min(vocab_size, top_k),
    )
    out = RowTotals(*(values.numpy() for values in totals))  # pyright: ignore[reportArgumentType]
    memory = *_memory(student), *_memory(teacher)
    num_shares = min(torch.get_num_threads(), num_rows)
    bounds = [num_rows * share // max(num_shares, 1) for share in range(num_shares + 1)]

    def work(start: int, stop: int) -> None:
        _totals(*memory, vocab_size, min(vocab_size, support_k), start, stop, out)

    others = [
        _threads().submit(work, start, stop) for start, stop in itertools.pairwise(bounds[1:])
    ]
    if num_shares:
        work(bounds[0], bounds[1])
    for other in others:
        other.result()
    return totals


def _memory(logits: Tensor) -> tuple[np.ndarray, int]:
    """(the bits of all that lies between the first and the last logit, how far apart rows are)."""
    logits = logits.detach()
    if logits.dtype not in _BITS:
        logits = logits.float()
    if (logits.shape[1] > 1 and logits.stride(1) != 1) or logits.stride(0) < 0:
        logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    size = (num_rows - 1) * logits.stride(0) + vocab_size if num_rows else 0
    return logits.as_strided((size,), (1,)).view(_BITS[logits.dtype]).numpy(), logits.stride(0)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="tip_analysis-logits")
