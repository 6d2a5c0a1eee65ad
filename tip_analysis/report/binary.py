"""Columns of numbers as the page carries them: little-endian bytes in base64, a fifth of the size
of the same numbers as JSON."""

import base64
from typing import Any

import numpy as np

_NAMES = {"uint8": "u8", "uint16": "u16", "uint32": "u32", "float32": "f32", "float64": "f64"}


def packed(values: Any) -> dict[str, str]:
    """A column as `{"type": …, "data": …}`, which `assets/binary.js` reads.

    Args:
        values: [N] of uint8, uint16, uint32, float32 or float64.
    """
    array = np.ascontiguousarray(values)
    name = _NAMES[array.dtype.name]
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return {"type": name, "data": base64.b64encode(data).decode("ascii")}


def packed_index(values: Any, size: int) -> dict[str, str]:
    """Indices into a list of `size` entries, in the narrowest type that can also hold `size`
    itself, which stands for none."""
    array = np.asarray(values)
    for kind in (np.uint8, np.uint16, np.uint32):
        if size <= np.iinfo(kind).max:
            return packed(array.astype(kind))
    raise ValueError(f"expected fewer than 2^32 entries, found {size}")
