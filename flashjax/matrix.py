"""What the containers of packed weights have in common."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np


class PackedMatrix:
    """Base of SparseMatrix, ShardedSparseMatrix and TrainableMatrix.

    A pytree with `shape` (in_features, out_features), `dtype` and the array `counts`
    of nonzeros, whose type has `__sparse_matmul__`: what `sparse_matmul` calls.
    """

    if TYPE_CHECKING:  # fields of the subclasses, or properties

        @property
        def shape(self) -> tuple[int, int]: ...  # noqa: D102
        @property
        def dtype(self) -> np.dtype: ...  # noqa: D102
        @property
        def counts(self) -> Any: ...  # noqa: D102

    # numpy arrays defer `array @ matrix` to `__rmatmul__`.
    __array_ufunc__ = None

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @property
    def size(self) -> int:
        """Number of elements of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def nnz(self) -> int:
        """Nonzero elements, of a stack in all; needs concrete arrays of the process."""
        if isinstance(self.counts, jax.core.Tracer):
            raise TypeError(
                f"{type(self).__name__}.nnz: expected a concrete matrix, got a traced "
                "one: read nnz and sparsity outside of jit, vmap and grad"
            )
        return int(np.asarray(self.counts).sum(dtype=np.int64))

    @property
    def sparsity(self) -> float:
        """Share of zeros, from 0 to 1, in all of a stack; 0 without elements."""
        elements = self.size * self._layers
        return 1.0 - self.nnz / elements if elements else 0.0

    @property
    def _layers(self) -> int:
        """Matrices of a stack; 1 of none."""
        return int(np.prod(np.shape(self.counts)[:-1]))

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays, padding and a second packing included."""
        leaves = jax.tree.leaves(self)
        return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in leaves)

    def __rmatmul__(self, x: np.ndarray | jax.Array) -> jax.Array:
        from flashjax.matmul import sparse_matmul  # its modules import this one

        return sparse_matmul(x, self)


def is_concrete(leaf: Any) -> bool:
    """Whether a leaf is an array that is not traced."""
    return isinstance(leaf, np.ndarray | jax.Array) and not isinstance(
        leaf, jax.core.Tracer
    )


def is_readable(leaf: Any) -> bool:
    """Whether a leaf is one of packed arrays whose values are still there."""
    if not is_concrete(leaf) or leaf.dtype != np.uint32:
        return False
    return not (isinstance(leaf, jax.Array) and leaf.is_deleted())
