"""Loops over blocks of rows, so that logits of a block exist and never those of all rows."""

from collections.abc import Callable, Iterator

from torch import Tensor

from tip_analysis.core.errors import LogitsError

Columns = dict[str, Tensor]
"""Numbers of N rows, [N] or [N, k] each, by name."""


def row_blocks(num_rows: int, step: int) -> Iterator[slice]:
    """Slices that cut `num_rows` rows into blocks of `step`, the last one shorter."""
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def in_blocks(num_rows: int, step: int, work: Callable[[slice], Columns]) -> Columns:
    """Columns of `num_rows` rows, made by `work` for `step` rows at a time; an error names the row
    among all."""
    columns: Columns = {}
    for rows in row_blocks(num_rows, step):
        try:
            block = work(rows)
        except LogitsError as error:
            error.row = rows.start + (error.row or 0)
            raise
        # Made once, at the first block: small tensors left behind by every block would keep the
        # blocks' memory in pieces.
        columns = columns or {
            name: values.new_empty(num_rows, *values.shape[1:]) for name, values in block.items()
        }
        for name, values in block.items():
            columns[name][rows] = values
    return columns
