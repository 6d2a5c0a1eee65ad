"""Random numbers that are a pure function of (seed, rollout_id, position): integer and correctly
rounded float arithmetic only, so that no version of a library and no CPU changes a mask."""

from hashlib import blake2b

import numpy as np
import polars as pl


def random_exponentials(rollout_ids: pl.Series, positions: pl.Series, seed: int) -> np.ndarray:
    """One Exp(1) variate per token, a pure function of (seed, rollout_id, position).

    A rollout's key is the first 8 bytes of BLAKE2b of "seed/rollout_id"; a token's 64 bits are
    SplitMix64 at (key, position); the upper 53 make u in (0, 1), and the variate is −ln u.

    Args:
        rollout_ids: [N] text.
        positions: [N] integers.
        seed: Any integer.

    Returns:
        [N] float64 > 0.
    """
    return _negative_log(random_uniforms(rollout_ids, positions, seed))


def random_uniforms(rollout_ids: pl.Series, positions: pl.Series, seed: int) -> np.ndarray:
    """The u in (0, 1) of each token that `random_exponentials` is made of, [N] float64."""
    key = _rollout_keys(rollout_ids, seed)
    bits = _splitmix64(
        key + (positions.cast(pl.UInt64).to_numpy() + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    )
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _rollout_keys(rollout_ids: pl.Series, seed: int) -> np.ndarray:
    """[N] uint64."""
    unique = rollout_ids.unique(maintain_order=True)
    digests = [
        blake2b(f"{seed}/{name}".encode(), digest_size=8, person=b"tip-select").digest()
        for name in unique
    ]
    keys = pl.Series([int.from_bytes(digest, "little") for digest in digests], dtype=pl.UInt64)
    return rollout_ids.replace_strict(unique, keys, return_dtype=pl.UInt64).to_numpy()


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014), modulo 2⁶⁴."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _negative_log(u: np.ndarray) -> np.ndarray:
    """−ln u for u in (0, 1), to 3e-16 relative, by correctly rounded operations alone.

    A library's log may differ in its last bit between versions and CPUs, and would then
    change a near tie. With u = m·2^e, m in [√½, √2) and z = (m − 1)/(m + 1): ln u = e·ln 2 + 2·Σ
    z^(2j+1)/(2j+1).
    """
    mantissa, exponent = np.frexp(u)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    z = (mantissa - 1.0) / (mantissa + 1.0)
    square = z * z
    series = np.full_like(z, 1.0 / 23.0)
    for odd in range(21, 0, -2):
        series = series * square + 1.0 / odd
    return -((exponent - low) * 0.6931471805599453 + 2.0 * z * series)
