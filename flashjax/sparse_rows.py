"""A sparse weight as checkpoints store it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from flashjax import _native


@dataclasses.dataclass(frozen=True, eq=False)
class SparseRows:
    """Rows (outputs) of which a bitmap says what is stored; see `flashjax.checkpoint`.

    It is what was read, not copied, and not expanded until `to_dense`.

    Attributes:
      parts: weights whose rows follow each other, each as its bitmap, uint8
        (ceil(rows * columns / 8),), its values, float16 or bfloat16 (nnz,), and its
        number of rows.
      columns: of every part.
      order: int64 (rows,), which of all parts' rows are meant, and in which order;
        None: all as they come.
    """

    parts: tuple[tuple[np.ndarray, np.ndarray, int], ...]
    columns: int
    order: np.ndarray | None = None

    @classmethod
    def join(cls, weights: Sequence["SparseRows"], order: np.ndarray) -> "SparseRows":
        """Several weights of one dtype and of one part each, in an order of rows."""
        parts = tuple(part for weight in weights for part in weight.parts)
        return cls(parts, weights[0].columns, np.asarray(order, np.int64))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows = sum(count for *_, count in self.parts)
        return rows if self.order is None else len(self.order), self.columns

    @property
    def dtype(self) -> np.dtype:
        """Of the values."""
        return self.parts[0][1].dtype

    def to_dense(self, threads: int = 0) -> np.ndarray:
        """The dense weight, (out, in)."""
        bits = _native.cpu.decode_rows(*self._arguments(), threads=threads)
        return bits.view(self.dtype)

    def pack(self, threads: int = 0) -> tuple[np.ndarray, ...]:
        """The arrays of a `SparseMatrix`, (in, out), on the host."""
        return _native.cpu.pack_rows(*self._arguments(), threads=threads)

    def _arguments(self) -> tuple[Any, ...]:
        bits = [
            (
                np.ascontiguousarray(bitmap),
                np.ascontiguousarray(values).view(np.uint16),
                rows,
            )
            for bitmap, values, rows in self.parts
        ]
        return bits, self.columns, self.order
