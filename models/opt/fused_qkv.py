"""Queries, keys and values of a layer from one product.

Every product of the sparse kernel has a constant part of its time; one product of
three times the size has it once. The outputs of the fused layer `qkv_proj` are ordered
by head: query, key and value of head 0, then those of head 1, and so on. A slice of
whole heads, as a device holds one, is then contiguous, and the order is the same for
every number of devices.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

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
      tensors: the fused weight (3 * hidden, in) under "kernel", and the bias.
    """

    def __init__(self, num_heads: int, use_bias: bool):
        self.tensors: dict[str, np.ndarray] = {}
        self._num_heads = num_heads
        attributes = ("kernel", "bias") if use_bias else ("kernel",)
        self._missing = {(name, a) for name in QKV for a in attributes}
        self._sparse: dict[str, bool] = {}

    def add(
        self, projection: str, attribute: str, array: np.ndarray, sparse: bool
    ) -> None:
        """Copies one tensor to its rows.

        Args:
          projection: one of `QKV`.
          attribute: "kernel" or "bias".
          array: the tensor as a checkpoint orients it.
          sparse: whether a kernel becomes sparse; without meaning for a bias.
        """
        if attribute not in self.tensors:
            shape = (len(QKV) * array.shape[0], *array.shape[1:])
            self.tensors[attribute] = np.empty(shape, array.dtype)
        rows = _by_head(self.tensors[attribute], self._num_heads)
        rows[:, QKV.index(projection)] = array.reshape(rows[:, 0].shape)
        if attribute == "kernel":
            self._sparse[projection] = sparse
        self._missing.remove((projection, attribute))

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
