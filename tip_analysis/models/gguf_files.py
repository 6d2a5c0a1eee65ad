"""What a GGUF file says of itself, checked against its length: its readers loop by counts that they
take from it. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

import math
import mmap
import struct
from pathlib import Path

from tip_analysis.core.errors import ModelError
from tip_analysis.models.file_checks import MAX_COUNT, MAX_SIZE

_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""How `struct` names the types of plain values."""
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8
_MOST_PER_BYTE = 8
"""Elements of a tensor in one byte: the smallest types have some 1.6 bits for each."""


def check_gguf(path: Path) -> int:
    """The number of elements of a GGUF file's tensors, once its counts and lengths are those of a
    file of its length.

    Raises:
        ModelError: they are not; says what, and where.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ModelError(f"{path.name} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(path.name, data).elements()


class _Walk:
    """Goes through a file's metadata from its beginning."""

    def __init__(self, name: str, data: mmap.mmap) -> None:
        self._name, self._data, self._at = name, data, 4
        if data[:4] != b"GGUF":
            raise self._broken("it does not begin with GGUF")
        self._order = "<"
        if not self._number("I") & 0xFFFF:
            self._order = ">"

    def elements(self) -> int:
        """All elements of all tensors."""
        self._at = 8
        num_tensors, num_values = self._count(1), self._count(1)
        for _ in range(num_values):
            self._value()
        total = sum(self._tensor() for _ in range(num_tensors))
        if total > _MOST_PER_BYTE * len(self._data):
            raise self._broken(f"its tensors would have {total:,} elements")
        return total

    def _value(self) -> None:
        key, kind = self._text(), self._number("I")
        if kind != _ARRAY and kind != _STRING:
            value = self._number(self._form(kind))
            if key.endswith("_count") and not 0 <= value <= MAX_COUNT and "rope" not in key:
                raise self._broken(f"{key} is {value}; expected 0 to {MAX_COUNT}")
            if isinstance(value, int) and abs(value) > MAX_SIZE and key.split(".")[0] != "general":
                raise self._broken(f"{key} is {value}, which no model has")
        else:
            self._skip(kind)

    def _skip(self, kind: int, depth: int = 0) -> None:
        """Pass a string, or an array of anything."""
        if kind == _STRING:
            self._pass(self._count(1))
        elif kind != _ARRAY:
            self._pass(struct.calcsize(self._form(kind)))
        elif depth > 4:
            raise self._broken("its arrays lie too deep")
        else:
            inner = self._number("I")
            for _ in range(self._count(1)):
                self._skip(inner, depth + 1)

    def _tensor(self) -> int:
        """The elements of the tensor described next."""
        name, dimensions = self._text(), self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise self._broken(f"{name} has {dimensions} dimensions")
        sizes = [self._number("Q") for _ in range(dimensions)]
        self._number("I")
        self._number("Q")
        return math.prod(sizes)

    def _text(self) -> str:
        length = self._count(1)
        start = self._at
        self._pass(length)
        return bytes(self._data[start : self._at]).decode("utf-8", "replace")

    def _count(self, size: int) -> int:
        """A number of things of at least `size` bytes, which must lie in the rest of the file."""
        count = self._number("Q")
        if count * size > len(self._data) - self._at:
            raise self._broken(f"it counts {count:,} at byte {self._at - 8}, beyond its end")
        return count

    def _number(self, form: str) -> int:
        start = self._at
        self._pass(struct.calcsize(form))
        return struct.unpack_from(self._order + form, self._data, start)[0]

    def _form(self, kind: int) -> str:
        if kind not in _FORMS:
            raise self._broken(f"it has a value of the unknown type {kind} at byte {self._at}")
        return _FORMS[kind]

    def _pass(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise self._broken("it ends too early")

    def _broken(self, what: str) -> ModelError:
        return ModelError(f"{self._name} is no whole GGUF file: {what}")
