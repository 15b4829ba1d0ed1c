"""Queries, keys and values of a layer from one product.

Every product of the sparse kernel has a constant part of its time; one product of
three times the size has it once. The outputs of the fused layer `qkv_proj` are ordered
by head: query, key and value of head 0, then those of head 1, and so on. A slice of
whole heads, as a device holds one, is then contiguous, and the order is the same for
every number of devices.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashjax.sparse_rows import SparseRows

# The separate layers, in the order of the outputs of a head, and the fused one.
QKV = ("q_proj", "k_proj", "v_proj")
FUSED = "qkv_proj"


def split_by_head(
    outputs: jax.Array, num_heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits what the fused layer gives.

    Args:
      outputs: (batch, length, 3 * hidden).
      num_heads: number of heads.

    Returns:
      Queries, keys and values, each (batch, num_heads, length, head_dim). Nothing
      moves between devices where the outputs are split by heads.
    """
    parts = outputs.reshape(*outputs.shape[:2], num_heads, len(QKV), -1)
    queries, keys, values = (
        jnp.swapaxes(jax.lax.index_in_dim(parts, i, 3, keepdims=False), 1, 2)
        for i in range(len(QKV))
    )
    return queries, keys, values


def rows_of(fused: np.ndarray, projection: str, num_heads: int) -> np.ndarray:
    """The part of a fused tensor that is a layer's own.

    Args:
      fused: a weight (3 * hidden, in) or a bias (3 * hidden,).
      projection: one of `QKV`.
      num_heads: number of heads.

    Returns:
      A copy, (hidden, in) or (hidden,).
    """
    part = _by_head(fused, num_heads)[:, QKV.index(projection)]
    return part.reshape(-1, *fused.shape[1:]).copy()


class JoinedQKV:
    """The tensors of `QKV` of one layer, joined as they are read.

    What was not added yet takes no memory but addresses.

    Attributes:
      tensors: the fused weight (3 * hidden, in) under "kernel", and the bias. Where all
        weights came as `SparseRows`, so does the fused one.
    """

    def __init__(self, num_heads: int, use_bias: bool):
        self.tensors: dict[str, Any] = {}
        self._rows: dict[str, SparseRows] = {}
        self._num_heads = num_heads
        attributes = ("kernel", "bias") if use_bias else ("kernel",)
        self._missing = {(name, a) for name in QKV for a in attributes}
        self._sparse: dict[str, bool] = {}

    def add(
        self,
        projection: str,
        attribute: str,
        array: np.ndarray | SparseRows,
        sparse: bool,
    ) -> None:
        """Copies one tensor to its rows; keeps one that is stored sparse as it is.

        Args:
          projection: one of `QKV`.
          attribute: "kernel" or "bias".
          array: the tensor as a checkpoint orients it.
          sparse: whether a kernel becomes sparse; without meaning for a bias.
        """
        if isinstance(array, SparseRows):
            self._rows[projection] = array
        else:
            self._copy(projection, attribute, array)
        if attribute == "kernel":
            self._sparse[projection] = sparse
        self._missing.remove((projection, attribute))
        if self.complete:
            self._settle()

    def _copy(self, projection: str, attribute: str, array: np.ndarray) -> None:
        if attribute not in self.tensors:
            shape = (len(QKV) * array.shape[0], *array.shape[1:])
            self.tensors[attribute] = np.empty(shape, array.dtype)
        rows = _by_head(self.tensors[attribute], self._num_heads)
        rows[:, QKV.index(projection)] = array.reshape(rows[:, 0].shape)

    def _settle(self) -> None:
        """Joins what came as stored rows: in that form if all did."""
        if len(self._rows) == len(QKV):
            parts = [self._rows[projection] for projection in QKV]
            hidden = parts[0].shape[0]
            order = np.empty(len(QKV) * hidden, np.int64)
            for i in range(len(QKV)):
                places = _by_head(order, self._num_heads)[:, i]
                places[...] = (i * hidden + np.arange(hidden)).reshape(places.shape)
            self.tensors["kernel"] = SparseRows.join(parts, order)
        else:
            for projection, rows in self._rows.items():
                self._copy(projection, "kernel", rows.to_dense())
        self._rows.clear()

    @property
    def complete(self) -> bool:
        """Whether all tensors were added."""
        return not self._missing

    @property
    def alike(self) -> bool:
        """Whether all kernels become sparse, or all stay dense."""
        return len(set(self._sparse.values())) == 1

    def is_sparse(self, projection: str) -> bool:
        """Whether the kernel of one becomes sparse."""
        return self._sparse[projection]

    def separate(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Takes the tensors apart again: (projection, attribute, tensor) one by one."""
        for attribute, fused in self.tensors.items():
            for projection in QKV:
                yield projection, attribute, rows_of(fused, projection, self._num_heads)


def _by_head(fused: np.ndarray, num_heads: int) -> np.ndarray:
    """A view (num_heads, 3, head_dim, ...) of (3 * hidden, ...)."""
    return fused.reshape(num_heads, len(QKV), -1, *fused.shape[1:])
