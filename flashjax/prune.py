"""Pruning: dense arrays with zeros, ready for `SparseMatrix.from_dense`."""

import math
import numbers
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)


def magnitude(dense: Array, sparsity: float) -> Array:
    """Zeroes the elements of smallest magnitude.

    The magnitude pruning of Han et al., "Learning both Weights and Connections for
    Efficient Neural Networks" (2015), over the whole array.

    Args:
      dense: a float array of any shape, numpy or JAX; float16, bfloat16, float32 or
        float64. Not modified.
      sparsity: share of the elements to zero, from 0 to 1. Exactly
        ``round(sparsity * dense.size)`` elements are zeroed, those that were zero
        before included; of equal magnitudes the first in row-major order go first.

    Returns:
      An array of the same type, shape and dtype, on the same device; computed on the
      host.

    Raises:
      ValueError: sparsity is not finite or not within 0 to 1; the dtype is no float
        dtype; the array holds NaN, which has no magnitude.
      TypeError: `dense` is no array, or is traced; sparsity is no number.
    """
    sparsity = _check_sparsity(sparsity)
    if isinstance(dense, jax.core.Tracer):
        raise TypeError(
            "prune.magnitude: expected a concrete array, got a traced one "
            f"({jax.typeof(dense)}); prune outside of jit, vmap and grad"
        )
    if not isinstance(dense, np.ndarray | jax.Array):
        raise TypeError(
            "prune.magnitude: expected a numpy or JAX array, got "
            f"{type(dense).__name__}"
        )
    is_float = jnp.issubdtype(dense.dtype, jnp.floating)
    if not is_float or dense.dtype.itemsize not in (2, 4, 8):
        raise ValueError(
            "prune.magnitude: expected dtype float16, bfloat16, float32 or float64, "
            f"got {dense.dtype}"
        )
    if isinstance(dense, jax.Array):
        pruned = _magnitude(np.asarray(dense), sparsity)
        if dense.committed:
            return jax.device_put(pruned, dense.sharding)
        with jax.default_device(next(iter(dense.devices()))):
            return jnp.asarray(pruned)
    return _magnitude(dense, sparsity)


def _check_sparsity(sparsity: float) -> float:
    if isinstance(sparsity, np.ndarray | jax.Array) and sparsity.ndim == 0:
        sparsity = float(sparsity)
    if not isinstance(sparsity, numbers.Real) or isinstance(sparsity, bool):
        raise TypeError(
            "prune.magnitude: expected sparsity to be a number from 0 to 1, got "
            f"{type(sparsity).__name__}"
        )
    sparsity = float(sparsity)
    if not math.isfinite(sparsity) or not 0.0 <= sparsity <= 1.0:
        raise ValueError(
            f"prune.magnitude: expected sparsity from 0 to 1, got {sparsity}"
        )
    return sparsity


def _magnitude(dense: np.ndarray, sparsity: float) -> np.ndarray:
    native = np.ascontiguousarray(dense, dense.dtype.newbyteorder("="))
    # Without its sign bit, a float's bit pattern orders like its magnitude.
    bits = 8 * native.dtype.itemsize
    unsigned = np.dtype(f"uint{bits}")
    keys = native.reshape(-1).view(unsigned) & unsigned.type((1 << (bits - 1)) - 1)
    infinity = np.array(np.inf, native.dtype).view(unsigned)
    nans = int(np.count_nonzero(keys > infinity))
    if nans:
        raise ValueError(
            f"prune.magnitude: expected an array without NaN, got {nans} NaN among "
            f"{dense.size} elements"
        )
    pruned = np.array(dense, order="C")
    count = round(sparsity * dense.size)
    if not count:
        return pruned
    threshold = np.partition(keys, count - 1)[count - 1]
    if threshold > 0:  # otherwise there are enough zeros already
        flat = pruned.reshape(-1)
        below = keys < threshold
        ties = np.flatnonzero(keys == threshold)
        flat[below] = 0
        flat[ties[: count - int(np.count_nonzero(below))]] = 0
    return pruned
