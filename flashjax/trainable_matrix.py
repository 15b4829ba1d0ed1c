"""Sparse weights with trainable values: gradients at the stored positions alone.

A place in the packed `values` of a SparseMatrix, one of the two halves of a word, is a
slot. The trainable values are a float array with an entry for each slot. Packed words
are a cast and a bitcast of it; the gradient is a sampled dense-dense product (SDDMM, as
in Gale et al., "Sparse GPU Kernels for Deep Learning", 2020): the columns of x^T dy are
computed a block at a time and sampled straight into the slots.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flashjax import layouts, packing, reference, sample
from flashjax import trainable_rules as rules
from flashjax.matmul_checks import make_call
from flashjax.matrix import PackedMatrix
from flashjax.partitioning import vary_alike
from flashjax.sparse_matrix import SparseMatrix

_FLOATS = tuple(np.dtype(d) for d in (jnp.float32, jnp.float16, jnp.bfloat16))
_LEAVES = ("bitmap", "entries", "counts", "live")
_MAGNITUDE = np.uint32(0x7FFF)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparsePositions:
    """Where a matrix has stored values: a SparseMatrix without them.

    Attributes:
      bitmap: see `cpu/lscd_layout.h`, like entries and counts.
      entries: where the streams of values stand.
      counts: (strips,) uint32, nonzeros.
      live: (segments, 32) uint32, which slots hold a value of the matrix (bit
        16 stream + word of the lane's word); the others are padding.
      shape: (in_features, out_features).
      dtype: float16 or bfloat16, which products compute in.
      layout: name and version of the packed layout.
    """

    bitmap: Any
    entries: Any
    counts: Any
    live: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})

    @property
    def arrays(self) -> rules.Positions:
        """What products need."""
        return rules.Positions(self.bitmap, self.entries, self.live)

    @property
    def slots(self) -> tuple[int, int, int, int]:
        """Shape of the values."""
        words, lanes = reference.SEGMENT_WORDS, reference.LANES
        return (self.live.shape[-2], words, lanes, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainableMatrix(PackedMatrix):
    """A sparse matrix whose nonzero values can be trained; their positions stay.

    ``fj.sparse_matmul(x, t)`` equals ``x @ t.to_dense()`` and has a gradient with
    respect to `values`. Products use the values rounded to `dtype`, gradients are
    accumulated in float32. As the positions are integers, differentiate with respect
    to the values::

        def loss(values):
            return jnp.sum(fj.sparse_matmul(x, t.replace(values=values)) ** 2)

        gradient = jax.grad(loss)(t.values)

    Build one with `from_sparse`; `to_sparse` folds the values back. The arrays follow
    the packed layout, which may change with the version in `positions.layout`.

    Attributes:
      positions: SparsePositions.
      values: (segments, 16, 32, 2) float32, float16 or bfloat16; a few percent more
        entries than the matrix has nonzeros. The others are padding: they count as 0
        and get a gradient of 0.
    """

    positions: SparsePositions
    values: Any

    @classmethod
    def from_sparse(
        cls, matrix: SparseMatrix, dtype: DTypeLike = jnp.float32
    ) -> "TrainableMatrix":
        """Makes the values of a matrix trainable.

        Args:
          matrix: (in_features, out_features). What is zero stays zero.
          dtype: of the values that are trained: float32, float16 or bfloat16.

        Raises:
          ValueError: another dtype.
          TypeError: `matrix` is no SparseMatrix.
        """
        if not isinstance(matrix, SparseMatrix):
            raise TypeError(
                "TrainableMatrix.from_sparse: expected a SparseMatrix, got "
                f"{type(matrix).__name__}"
            )
        matrix.check_leaves("TrainableMatrix.from_sparse")
        if matrix.layout != layouts.DEFAULT:
            matrix = matrix.repack()
        dtype = _check_dtype(dtype)
        values, live = _unfold(jnp.asarray(matrix.values), matrix.dtype, dtype)
        positions = SparsePositions(
            matrix.bitmap,
            matrix.entries,
            matrix.counts,
            live,
            shape=matrix.shape,
            dtype=matrix.dtype,
            layout=matrix.layout,
        )
        return cls(positions, values)

    def to_sparse(self) -> SparseMatrix:
        """The SparseMatrix of the same positions; works inside `jax.jit`.

        A value that was trained to 0 keeps its position and counts in `nnz`; packing
        `to_dense()` anew removes it. One that `dtype` cannot hold becomes infinite:
        `flashjax.freeze` refuses it.
        """
        self.check_leaves("TrainableMatrix.to_sparse")
        positions = self.positions
        return SparseMatrix(
            positions.bitmap,
            positions.entries,
            _fold(positions.live, self.values, positions.dtype),
            positions.counts,
            shape=positions.shape,
            dtype=positions.dtype,
            layout=positions.layout,
        )

    def to_dense(self) -> jax.Array:
        """The dense (in_features, out_features) array of `dtype`.

        Differentiable in reverse mode.
        """
        self.check_leaves("TrainableMatrix.to_dense")
        call = rules.SampleCall(self.shape, self.dtype)
        return _to_dense(call, self.values, self.positions.arrays)

    def replace(self, values: Any) -> "TrainableMatrix":
        """The matrix with other values at the same positions."""
        return dataclasses.replace(self, values=values)

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.positions.shape

    @property
    def dtype(self) -> np.dtype:
        """What the values are rounded to in products: float16 or bfloat16."""
        return self.positions.dtype

    @property
    def counts(self) -> Any:
        """(strips,) numbers of trainable values."""
        return self.positions.counts

    def check_leaves(self, op: str) -> None:
        """Raises ValueError unless the arrays fit the static shape and each other."""
        leaf_shapes = reference.leaf_shapes(self.shape)
        leaf_shapes["live"] = (None, reference.LANES)
        for name in _LEAVES:
            leaf = getattr(self.positions, name)
            _check_leaf(op, self.shape, name, leaf, leaf_shapes[name], (np.uint32,))
        _check_leaf(
            op, self.shape, "values", self.values, self.positions.slots, _FLOATS
        )

    def __sparse_matmul__(
        self,
        x,
        *,
        bias=None,
        activation=None,
        implementation=None,
        preferred_element_type=None,
        layer=None,
    ) -> jax.Array:
        """What `sparse_matmul` calls."""
        if layer is not None:
            raise ValueError(
                "sparse_matmul: layer: expected a stack of SparseMatrix, got a "
                "TrainableMatrix: use jax.lax.scan over a stack of these"
            )
        self.check_leaves("sparse_matmul")
        # Here, because what JAX traces next must be arrays.
        call = make_call(
            x,
            self,
            bias,
            implementation,
            preferred_element_type,
            activation=activation,
        )
        return _multiply(call, x, self.values, self.positions.arrays, bias)

    def __repr__(self) -> str:
        values = getattr(self.values, "dtype", type(self.values).__name__)
        return (
            f"TrainableMatrix(shape={self.shape}, dtype={self.dtype.name}, "
            f"values={values}, layout={self.positions.layout!r})"
        )


# --- Values and packed words --------------------------------------------------------


@jax.jit(static_argnums=(1, 2))
def _unfold(words, half_dtype, dtype):
    """Packed values -> the same as floats, and which of them are not 0."""
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    stored = (halves.astype(jnp.uint32) & _MAGNITUDE) != 0
    bits = jnp.where(stored, np.uint32(1), np.uint32(0)) << sample.LIVE_BIT[None]
    live = jnp.sum(bits, axis=(1, 3), dtype=jnp.uint32)
    values = jax.lax.bitcast_convert_type(halves, half_dtype).astype(dtype)
    return jnp.where(stored, values, jnp.zeros((), dtype)), live


_fold = jax.jit(rules.fold, static_argnums=2)


# --- Products -----------------------------------------------------------------------


# One name in jaxprs and profiles, like sparse_matmul's.
@jax.jit(static_argnums=0)
def _multiply(call, x, values, positions, bias):
    x = packing.gather(x, keep=x.ndim - 1)
    others = jax.tree.map(packing.gather, (values, bias, positions))
    return rules.product(call, rules.Operands(*vary_alike((x, *others))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@jax.jit(static_argnums=0)
def _to_dense(call, values, positions):
    values, positions = jax.tree.map(packing.gather, (values, positions))
    words = rules.fold(positions.live, values, call.dtype)
    packed = positions.bitmap, positions.entries, words
    return packing.unpack(packed, call.shape, call.dtype)


def _to_dense_fwd(call, values, positions):
    like = jnp.zeros((0,), values.dtype)
    return _to_dense(call, values, positions), (positions, like)


def _to_dense_bwd(call, residuals, gradient):
    positions, like = residuals
    factors = rules.Factors(None, gradient, positions)
    return rules.sampled_product(call, factors).astype(like.dtype), None


_to_dense.defvjp(_to_dense_fwd, _to_dense_bwd)


# --- Checks -------------------------------------------------------------------------


def _check_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        found: Any = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in _FLOATS:
        raise ValueError(
            "TrainableMatrix.from_sparse: expected dtype float32, float16 or bfloat16, "
            f"got {dtype}"
        )
    return found


def _check_leaf(op, matrix_shape, name, leaf, shape, dtypes) -> None:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(
            f"{op}: expected the array {name!r} of a TrainableMatrix, got "
            f"{type(leaf).__name__}"
        )
    got = tuple(leaf.shape)
    fits = len(got) == len(shape)
    fits = fits and all(e is None or e == g for g, e in zip(got, shape, strict=True))
    if leaf.dtype not in dtypes or not fits:
        wanted = " or ".join(np.dtype(d).name for d in dtypes)
        sizes = ", ".join("*" if d is None else str(d) for d in shape)
        raise ValueError(
            f"{op}: expected {name!r} of a TrainableMatrix of shape {matrix_shape} as "
            f"{wanted} ({sizes}), got {leaf.dtype} {got}"
        )
