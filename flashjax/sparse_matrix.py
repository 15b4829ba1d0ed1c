"""The container of a sparse matrix."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import layouts, packing
from flashjax.matrix import PackedMatrix, is_concrete, is_readable
from flashjax.sparse_rows import SparseRows

_LEAVES = ("bitmap", "entries", "values", "counts")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SparseMatrix(PackedMatrix):
    """A half-precision matrix of any sparsity pattern, compressed.

    Behaves like an array of shape (in_features, out_features) that can only be
    multiplied: ``fj.sparse_matmul(x, w)`` equals ``x @ w.to_dense()``. It is a pytree
    of four uint32 arrays, so it can be an argument of a jitted function, a leaf of a
    model, or stacked for `jax.lax.scan`.

    Build one with `from_dense`. The packed arrays follow `cpu/lscd_layout.h`, or
    `cpu/gather_layout.h` where `layout` says so (see `flashjax.layouts`); they are
    private, may change with the version in `layout`, and are not meant for storage
    (`pickle` stores an independent form, but of a stack the packed one).

    Attributes:
      shape: (in_features, out_features).
      dtype: float16 or bfloat16.
      layout: name and version of the packed layout.
      transposed: the transposed matrix, packed as well, or None; see with_transpose().
    """

    bitmap: Any
    entries: Any
    values: Any
    counts: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(default=layouts.DEFAULT, metadata={"static": True})
    transposed: "SparseMatrix | None" = None

    def __post_init__(self):
        # Tree utilities put anything in the place of the arrays: only what is static
        # can be checked here, the arrays when they are used.
        shape = tuple(self.shape)
        if len(shape) != 2 or not all(isinstance(d, int) and d >= 0 for d in shape):
            raise ValueError(
                "SparseMatrix: expected a shape (in_features, out_features), got "
                f"{self.shape}"
            )
        layouts.check("SparseMatrix", self.layout)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", _check_dtype("SparseMatrix", self.dtype))

    @classmethod
    def from_dense(
        cls,
        dense: np.ndarray | jax.Array,
        *,
        tokens: int | None = None,
        threads: int = 0,
    ) -> "SparseMatrix":
        """Compresses a dense matrix.

        Args:
          dense: (in_features, out_features), float16 or bfloat16, a numpy array of any
            memory order or a JAX array. An array that lives on a GPU is packed there.
          tokens: how many rows of x most products will have, where that is known: up
            to 8, a matrix with many zeros is packed otherwise on a Hopper GPU. From
            75% zeros on it takes 4% more memory and is faster with any number; with
            very many it gets another layout, which is faster still and much slower
            with more rows. It is packed on the host. None is for any number.
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
        if not isinstance(dense, np.ndarray | jax.Array) or isinstance(
            dense, np.ma.MaskedArray
        ):
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
        if not isinstance(threads, int | np.integer) or not 0 <= threads < 2**31:
            raise ValueError(
                f"SparseMatrix.from_dense: expected threads >= 0, got {threads!r}"
            )
        check_tokens("SparseMatrix.from_dense", tokens)
        k, m = dense.shape
        leaves, layout = packing.pack_for(tokens, dense, int(threads))
        bitmap, entries, values, counts = leaves
        return cls(
            bitmap, entries, values, counts, shape=(k, m), dtype=dtype, layout=layout
        )

    @classmethod
    def from_rows(cls, rows: SparseRows, *, threads: int = 0) -> "SparseMatrix":
        """Packs a weight that a checkpoint stores, on the host, without expanding it.

        Args:
          rows: (out_features, in_features), as `CheckpointReader.load_rows` reads it.
          threads: threads of the packer, 0 for all cores.

        Returns:
          The (in_features, out_features) matrix, on JAX's default device.

        Raises:
          ValueError: bitmap and values do not belong together.
        """
        bitmap, entries, values, counts = packing.put(rows.pack(threads))
        shape = rows.shape[::-1]
        return cls(bitmap, entries, values, counts, shape=shape, dtype=rows.dtype)

    def repack(self, *, tokens: int | None = None) -> "SparseMatrix":
        """The same matrix, packed for another number of tokens; see `from_dense`.

        Raises:
          TypeError: the matrix is traced.
          ValueError: tokens is no positive number, or the matrix is a stack.
        """
        self._check_concrete("SparseMatrix.repack", "repack()")
        check_tokens("SparseMatrix.repack", tokens)
        self.check_leaves("SparseMatrix.repack")
        new = SparseMatrix.from_dense(self.to_dense(), tokens=tokens)
        return dataclasses.replace(new, transposed=self.transposed)

    def to_dense(self) -> jax.Array:
        """The dense (in_features, out_features) array; works inside `jax.jit`."""
        self.check_leaves("SparseMatrix.to_dense")
        return _to_dense(self.packed, self.shape, self.dtype, self.layout)

    def with_transpose(self) -> "SparseMatrix":
        """The same matrix, with a second packing: that of its transpose.

        On a GPU, the gradient with respect to x then is a product of the sparse kernel
        for as many rows as the product itself, instead of expanding the matrix. It
        takes the memory of the matrix once more. CPUs need no second packing for that.
        Everything else ignores it: `pickle` makes it again, checkpoints leave it out.

        Returns:
          A matrix that shares this one's arrays, with `transposed` on the same device
          (of a matrix on several devices, on JAX's default device).

        Raises:
          TypeError: the matrix is traced.
        """
        if self.transposed is not None:
            return self
        self._check_concrete("SparseMatrix.with_transpose")
        return dataclasses.replace(
            self, transposed=SparseMatrix.from_dense(self.to_dense().T)
        )

    @property
    def T(self) -> "SparseMatrix":  # noqa: N802  as numpy's
        """The transposed matrix: the second packing, or else packed now.

        Raises:
          TypeError: the matrix is traced and has no second packing.
        """
        if self.transposed is not None:
            alone = dataclasses.replace(self, transposed=None)
            return dataclasses.replace(self.transposed, transposed=alone)
        self._check_concrete("SparseMatrix.T")
        return SparseMatrix.from_dense(self.to_dense().T)

    def _check_concrete(self, op: str, call: str = "with_transpose()") -> None:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in self.packed):
            raise TypeError(
                f"{op}: expected a concrete matrix, got a traced one. The packed size "
                f"depends on the data: call {call} outside of jit, vmap and grad and "
                "pass the matrix as an argument"
            )

    @staticmethod
    def stack(matrices: Sequence["SparseMatrix"]) -> "SparseMatrix":
        """Stacks the matrices of several layers, for loops over them.

        `sparse_matmul(x, stack, layer=i)` multiplies by one of them. The arrays get a
        dimension in front; `values` are padded to the longest.

        Args:
          matrices: of one shape and dtype, all or none of them with their transpose.

        Returns:
          A SparseMatrix with the shape of one layer.

        Raises:
          ValueError: there are no matrices, or they differ or are stacks.
          TypeError: something else than a SparseMatrix is among them.
        """
        if isinstance(matrices, SparseMatrix):
            raise TypeError(
                "SparseMatrix.stack: expected a sequence of SparseMatrix, got one"
            )
        matrices = list(matrices)
        if not matrices:
            raise ValueError(
                "SparseMatrix.stack: expected at least one matrix, got none"
            )
        for i, w in enumerate(matrices):
            if not isinstance(w, SparseMatrix):
                raise TypeError(
                    "SparseMatrix.stack: expected every element to be a SparseMatrix, "
                    f"got {type(w).__name__} at {i}"
                )
            w.check_leaves("SparseMatrix.stack")
            if _kind(w) != _kind(matrices[0]):
                raise ValueError(
                    "SparseMatrix.stack: expected matrices of one shape and dtype and "
                    "of one layout (repack() gives the default one), all or none with "
                    f"their transposes, got {matrices[0]!r} and, at {i}, "
                    f"{w!r}"
                )
        return jax.tree.map(_stack_padded, *matrices)

    def unstack(self) -> list["SparseMatrix"]:
        """The matrices of a stack; their `values` stay padded."""
        self.check_leaves("SparseMatrix.unstack", stacked=True)
        layers = self.bitmap.shape[0]
        return [jax.tree.map(lambda leaf: leaf[i], self) for i in range(layers)]  # noqa: B023

    def shard(self, mesh: Any, axis: str, *, dim: Any) -> Any:
        """Splits the matrix over an axis of a mesh; see ShardedSparseMatrix.from_dense.

        The dense matrix exists for the duration of the call.
        """
        # It imports this module.
        from flashjax.sharding import ShardedSparseMatrix, without_mesh

        with without_mesh():
            dense = self.to_dense()
        return ShardedSparseMatrix.from_dense(dense, mesh, axis, dim=dim)

    @property
    def packed(self) -> tuple[Any, Any, Any]:
        """What the kernels read: bitmap, entries and values."""
        return self.bitmap, self.entries, self.values

    def check_leaves(self, op: str, stacked: bool = False) -> None:
        """Raises ValueError unless the arrays fit the static shape, or are a stack."""
        expected = layouts.plain(self.layout).leaf_shapes(self.shape)
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
            if stacked and extra != 1:
                raise ValueError(
                    f"{op}: expected a stack of SparseMatrix for a layer, got {name!r} "
                    f"of shape {_show(got)}, expected (layers, {_show(shape)[1:]}: use "
                    "SparseMatrix.stack"
                )
            if extra and not stacked:
                raise ValueError(
                    f"{op}: expected one SparseMatrix, got a stack ({name!r} has shape "
                    f"{_show(got)}, expected {_show(shape)}): use jax.vmap or "
                    "jax.lax.scan over it, sparse_matmul with layer=i, or take one out "
                    "with jax.tree.map(lambda leaf: leaf[i], w)"
                )

        if self.transposed is not None:
            _check_transposed(self, op, stacked)

    def __repr__(self) -> str:
        details = f"shape={self.shape}, dtype={self.dtype.name}"
        # Anything may stand in a leaf's place: a gradient's float0, what was donated.
        if all(is_readable(getattr(self, name)) for name in _LEAVES):
            if np.ndim(self.counts) == 1:
                details += f", nnz={self.nnz}, sparsity={self.sparsity:.3f}"
            else:
                layers = "x".join(map(str, np.shape(self.counts)[:-1]))
                details = f"layers={layers}, {details}"
            details += f", nbytes={self.nbytes}"
        if self.transposed is not None:
            details += ", with its transpose"
        return f"SparseMatrix({details}, layout={self.layout!r})"

    def __copy__(self) -> "SparseMatrix":
        return dataclasses.replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseMatrix":
        leaves = {name: copy.deepcopy(getattr(self, name), memo) for name in _LEAVES}
        leaves["transposed"] = copy.deepcopy(self.transposed, memo)
        return dataclasses.replace(self, **leaves)

    def __reduce__(self):
        leaves = [getattr(self, name) for name in _LEAVES]
        if not all(map(is_concrete, leaves)) or np.ndim(self.counts) != 1:
            static = (self.shape, self.dtype, self.layout)
            return SparseMatrix, (*leaves, *static, self.transposed)
        # A pickle is a checkpoint to many: keep it independent of the packed layout.
        from flashjax import checkpoint

        arrays = checkpoint.to_arrays(self)
        if self.transposed is not None:
            return _unpickle_with_transpose, (arrays,)
        return checkpoint.from_arrays, (arrays,)


def check_tokens(op: str, tokens: Any) -> None:
    """Raises ValueError unless it is a number of rows, or None."""
    if tokens is None:
        return
    is_integer = isinstance(tokens, int | np.integer) and not isinstance(tokens, bool)
    if not is_integer or tokens < 1:
        raise ValueError(f"{op}: expected tokens >= 1 or None, got {tokens!r}")


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


def _kind(w: SparseMatrix) -> tuple[Any, ...]:
    return w.shape, w.dtype, w.layout, w.transposed and w.transposed.layout


def _stack_padded(*leaves: Any) -> jax.Array:
    """Stacks arrays that may differ in their first dimension."""
    size = max(leaf.shape[0] for leaf in leaves)

    def pad(leaf):
        missing = size - leaf.shape[0]
        return jnp.pad(leaf, ((0, missing), *[(0, 0)] * (leaf.ndim - 1)))

    return jnp.stack([pad(leaf) for leaf in leaves])


def _check_transposed(w: SparseMatrix, op: str, stacked: bool) -> None:
    other = w.transposed
    if (
        not isinstance(other, SparseMatrix)
        or (other.shape, other.dtype) != (w.shape[::-1], w.dtype)
        or other.transposed is not None
    ):
        raise ValueError(
            f"{op}: expected the transpose of a SparseMatrix of shape {w.shape} and "
            f"dtype {w.dtype.name}, got {other!r}"
        )
    other.check_leaves(op, stacked)


def _unpickle_with_transpose(arrays: dict[str, Any]) -> SparseMatrix:
    from flashjax import checkpoint

    return checkpoint.from_arrays(arrays).with_transpose()


def _fits(got: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return all(e is None or e == g for g, e in zip(got, expected, strict=True))


def _show(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("*" if d is None else str(d) for d in shape) + ")"


@jax.jit(static_argnums=(1, 2, 3))
def _to_dense(packed, shape, dtype, layout):
    packed = jax.tree.map(packing.gather, packed)
    return packing.unpack(packed, shape, dtype, layout)
