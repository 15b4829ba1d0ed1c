"""The container of a sparse matrix."""

import copy
import dataclasses
from typing import Any

import jax
import numpy as np

from flashjax import packing, reference

LAYOUT = "lscd16/1"

_LEAVES = ("bitmap", "entries", "values", "counts")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SparseMatrix:
    """A half-precision matrix of any sparsity pattern, compressed.

    Behaves like an array of shape (in_features, out_features) that can only be
    multiplied: ``fj.sparse_matmul(x, w)`` equals ``x @ w.to_dense()``. It is a pytree
    of four uint32 arrays, so it can be an argument of a jitted function, a leaf of a
    model, or stacked for `jax.lax.scan`.

    Build one with `from_dense`. The packed arrays follow `cpu/lscd_layout.h`; they are
    private, may change with the version in `layout`, and are not meant for storage
    (`pickle` stores an independent form).

    Attributes:
      shape: (in_features, out_features).
      dtype: float16 or bfloat16.
      layout: name and version of the packed layout.
    """

    bitmap: Any
    entries: Any
    values: Any
    counts: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(default=LAYOUT, metadata={"static": True})

    # numpy arrays defer `array @ matrix` to `__rmatmul__`.
    __array_ufunc__ = None

    def __post_init__(self):
        # Tree utilities put anything in the place of the arrays: only what is static
        # can be checked here, the arrays when they are used.
        shape = tuple(self.shape)
        if len(shape) != 2 or not all(isinstance(d, int) and d >= 0 for d in shape):
            raise ValueError(
                "SparseMatrix: expected a shape (in_features, out_features), got "
                f"{self.shape}"
            )
        if self.layout != LAYOUT:
            raise ValueError(
                f"SparseMatrix: expected packed layout {LAYOUT!r}, got {self.layout!r}"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", _check_dtype("SparseMatrix", self.dtype))

    @classmethod
    def from_dense(
        cls, dense: np.ndarray | jax.Array, *, threads: int = 0
    ) -> "SparseMatrix":
        """Compresses a dense matrix.

        Args:
          dense: (in_features, out_features), float16 or bfloat16, a numpy array of any
            memory order or a JAX array. An array that lives on a GPU is packed there.
          threads: threads of the packer on the host, 0 for all cores.

        Returns:
          The matrix, on the device of `dense` (a numpy array, or an array spread over
          several devices: on JAX's default device). `to_dense` gives back every bit,
          except that -0.0 becomes 0.

        Raises:
          ValueError: `dense` is not two-dimensional or has another dtype.
          TypeError: `dense` is no array, or is traced: how large the result is depends
            on the data, so packing cannot be part of a jitted function.
        """
        if isinstance(dense, jax.core.Tracer):
            raise TypeError(
                "SparseMatrix.from_dense: expected a concrete array, got a traced one "
                f"({jax.typeof(dense)}). The packed size depends on the data: pack "
                "outside of jit, vmap and grad and pass the SparseMatrix as an argument"
            )
        if not isinstance(dense, np.ndarray | jax.Array):
            raise TypeError(
                "SparseMatrix.from_dense: expected a numpy or JAX array, got "
                f"{type(dense).__name__}"
            )
        if dense.ndim != 2:
            raise ValueError(
                "SparseMatrix.from_dense: expected a matrix of shape (in_features, "
                f"out_features), got shape {dense.shape}"
            )
        dtype = _check_dtype("SparseMatrix.from_dense", dense.dtype)
        if not isinstance(threads, int) or threads < 0:
            raise ValueError(
                f"SparseMatrix.from_dense: expected threads >= 0, got {threads!r}"
            )
        k, m = dense.shape
        bitmap, entries, values, counts = packing.pack(dense, threads)
        return cls(bitmap, entries, values, counts, shape=(k, m), dtype=dtype)

    def to_dense(self) -> jax.Array:
        """The dense (in_features, out_features) array; works inside `jax.jit`."""
        self.check_leaves("SparseMatrix.to_dense")
        return _to_dense(self.packed, self.shape, self.dtype)

    @property
    def packed(self) -> tuple[Any, Any, Any]:
        """What the kernels read: bitmap, entries and values."""
        return self.bitmap, self.entries, self.values

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
        """Number of nonzero elements; needs concrete arrays."""
        return int(np.asarray(self.counts).sum(dtype=np.int64))

    @property
    def sparsity(self) -> float:
        """Share of zeros, from 0 to 1; 0 for a matrix without elements."""
        return 1.0 - self.nnz / self.size if self.size else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed arrays."""
        leaves = [getattr(self, name) for name in _LEAVES]
        return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in leaves)

    def check_leaves(self, op: str) -> None:
        """Raises ValueError unless the arrays fit the static shape."""
        expected = reference.leaf_shapes(self.shape)
        for name, shape in expected.items():
            leaf = getattr(self, name)
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                raise ValueError(
                    f"{op}: expected the packed array {name!r} of a SparseMatrix, got "
                    f"{type(leaf).__name__}"
                )
            got = tuple(leaf.shape)
            extra = len(got) - len(shape)
            if leaf.dtype != np.uint32 or extra < 0 or not _fits(got[extra:], shape):
                raise ValueError(
                    f"{op}: expected the packed array {name!r} of a SparseMatrix of "
                    f"shape {self.shape} as uint32 {_show(shape)}, got {leaf.dtype} "
                    f"{_show(got)}"
                )
            if extra:
                raise ValueError(
                    f"{op}: expected one SparseMatrix, got a stack ({name!r} has shape "
                    f"{_show(got)}, expected {_show(shape)}): use jax.vmap or "
                    "jax.lax.scan over it, or take one out with "
                    "jax.tree.map(lambda leaf: leaf[i], w)"
                )

    def __rmatmul__(self, x: np.ndarray | jax.Array) -> jax.Array:
        from flashjax.matmul import sparse_matmul  # matmul.py imports this module

        return sparse_matmul(x, self)

    def __repr__(self) -> str:
        details = f"shape={self.shape}, dtype={self.dtype.name}"
        if all(_is_concrete(getattr(self, name)) for name in _LEAVES):
            if np.ndim(self.counts) == 1:
                details += f", nnz={self.nnz}, sparsity={self.sparsity:.3f}"
            details += f", nbytes={self.nbytes}"
        return f"SparseMatrix({details}, layout={self.layout!r})"

    def __copy__(self) -> "SparseMatrix":
        return dataclasses.replace(self)

    def __deepcopy__(self, memo: dict) -> "SparseMatrix":
        leaves = {name: copy.deepcopy(getattr(self, name), memo) for name in _LEAVES}
        return dataclasses.replace(self, **leaves)

    def __reduce__(self):
        leaves = [getattr(self, name) for name in _LEAVES]
        if not all(map(_is_concrete, leaves)) or np.ndim(self.counts) != 1:
            return SparseMatrix, (*leaves, self.shape, self.dtype, self.layout)
        # A pickle is a checkpoint to many: keep it independent of the packed layout.
        from flashjax import checkpoint

        return checkpoint.from_arrays, (checkpoint.to_arrays(self),)


def _check_dtype(op: str, dtype: Any) -> np.dtype:
    try:
        native = np.dtype(dtype).newbyteorder("=")
    except TypeError:
        native = None
    if native not in packing.WEIGHT_DTYPES:
        raise ValueError(
            f"{op}: expected dtype float16 or bfloat16, got {dtype}; cast the matrix "
            "first, for example with dense.astype(jnp.bfloat16)"
        )
    return native


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | jax.Array) and not isinstance(
        leaf, jax.core.Tracer
    )


def _fits(got: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return all(e is None or e == g for g, e in zip(got, expected, strict=True))


def _show(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("*" if d is None else str(d) for d in shape) + ")"


@jax.jit(static_argnums=(1, 2))
def _to_dense(packed, shape, dtype):
    return packing.unpack(jax.tree.map(packing.gather, packed), shape, dtype)
